"""The verbs of `files`: reading sees what the same call and transaction have written, writing is only staged.

A call's changes lie over those of its transaction, and these over the disk. Each use works on a copy of its
own, in a thread: one that was given up, and ends later all the same, changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from uvm.broker import folder
from uvm.broker.folder import Parts, Signature
from uvm.broker.moves import MISSING, MovesLog
from uvm.broker.staging import Change, Place, StagedFiles
from uvm.image.txn import Txn

MOVES = "moves"  # what a transaction of the image carries the token of its moves as
MAX_STAGED_FILES = 64  # of one call
MAX_STAGED_BYTES = 16 << 20  # of one call


@dataclass(frozen=True, slots=True)
class Granted:
    """A grant of `files`, as its verbs need it.

    Attributes:
        root: the folder, without links in its path.
        limit: bytes of the largest file.
        write: whether it may be written.
        holds: whether the grant still holds.
    """

    root: str
    limit: int
    write: bool
    holds: Callable[[], bool]

    def check_writable(self) -> None:
        """Raises PermissionError where the grant is for reading."""
        if not self.write:
            raise PermissionError("the folder was granted for reading only")


class Files:
    """What one call does with files.

    Args:
        txn: the transaction that the call runs in.
        moves: told of what a commit is to do on the disk.
    """

    def __init__(self, txn: Txn, moves: MovesLog) -> None:
        self._txn = txn
        self._moves = moves
        self._changes: dict[str, Change] = {}
        self._read: dict[str, Signature] = {}

    def keep(self) -> None:
        """Hands the call's changes over to its transaction, which writes them when it commits."""
        if not self._changes:
            return
        staged = self._txn.companion(StagedFiles)
        if staged is None:
            staged = StagedFiles(dict(self._changes), self._moves, self._txn.newest)
            self._txn.mark(MOVES, staged.token)
            self._txn.join(staged)
        else:
            staged.changes.update(self._changes)

    def attempt(self) -> Attempt:
        """Returns what one use needs to know and may change, as a copy for another thread."""
        staged = self._txn.companion(StagedFiles)
        return Attempt(dict(staged.changes) if staged else {}, dict(self._changes), dict(self._read))

    def adopt(self, done: Attempt) -> None:
        """Takes over what a use has done."""
        self._changes, self._read = done.changes, done.read


class Attempt:
    """One use of `files`. Blocking.

    Args:
        earlier: the changes of the transaction.
        changes: those of the call, by path on the disk; the use adds its own.
        read: signatures of the files that were read, which changes will build on.
    """

    def __init__(
        self, earlier: dict[str, Change], changes: dict[str, Change], read: dict[str, Signature]
    ) -> None:
        self.changes = changes
        self.read = read
        self._earlier = earlier

    def carry_out(self, granted: Granted, verb: str, values: dict[str, Any]) -> Any:
        """Carries out one verb of `files` and returns its result.

        Raises:
            OSError, ValueError: it can't be done; the text is for the method.
        """
        return _VERBS[verb](self, granted, folder.parts_of(values.pop("path")), **values)

    # The verbs

    def read_bytes(self, granted: Granted, parts: Parts) -> bytes:
        place = Place(granted.root, parts)
        change = self._change(place)
        if change is None:
            content, seen = folder.read(granted.root, parts, granted.limit)
            self.read.setdefault(place.path, seen)
            return content
        if change.content is None:
            raise FileNotFoundError(f"there is no file {'/'.join(parts)!r}")
        folder.check_size(len(change.content), granted.limit, parts)
        return change.content

    def read_text(self, granted: Granted, parts: Parts) -> str:
        return _decoded(self.read_bytes(granted, parts), parts)

    def write_bytes(self, granted: Granted, parts: Parts, data: bytes) -> None:
        granted.check_writable()
        self._stage(granted, parts, data)

    def write_text(self, granted: Granted, parts: Parts, text: str) -> None:
        self.write_bytes(granted, parts, text.encode())

    def append_text(self, granted: Granted, parts: Parts, text: str) -> None:
        granted.check_writable()
        try:
            before = self.read_bytes(granted, parts)
        except FileNotFoundError:
            before = b""
            self.read.setdefault(Place(granted.root, parts).path, MISSING)
        self._stage(granted, parts, before + text.encode())

    def delete(self, granted: Granted, parts: Parts) -> None:
        granted.check_writable()
        if not self._is_file(granted, parts):
            raise FileNotFoundError(f"there is no file {'/'.join(parts)!r}")
        self._stage(granted, parts, None)

    def names(self, granted: Granted, parts: Parts) -> list[str]:
        found = set(folder.entries(granted.root, parts))
        here = Place(granted.root, parts).path
        for change in {**self._earlier, **self.changes}.values():
            if os.path.dirname(change.place.path) == here:
                (found.discard if change.content is None else found.add)(change.place.parts[-1])
        return sorted(found)

    def exists(self, granted: Granted, parts: Parts) -> bool:
        change = self._change(Place(granted.root, parts))
        return folder.look(granted.root, parts) is not None if change is None else change.content is not None

    def size(self, granted: Granted, parts: Parts) -> int:
        if not self._is_file(granted, parts):
            raise FileNotFoundError(f"there is no file {'/'.join(parts)!r}")
        change = self._change(Place(granted.root, parts))
        if change is not None:
            return len(change.content or b"")
        known = folder.look(granted.root, parts)
        return known.st_size if known else 0

    # Their parts

    def _change(self, place: Place) -> Change | None:
        return self.changes.get(place.path) or self._earlier.get(place.path)

    def _is_file(self, granted: Granted, parts: Parts) -> bool:
        change = self._change(Place(granted.root, parts))
        if change is not None:
            return change.content is not None
        known = folder.look(granted.root, parts)
        return known is not None and stat.S_ISREG(known.st_mode)

    def _stage(self, granted: Granted, parts: Parts, content: bytes | None) -> None:
        folder.check_size(len(content or b""), granted.limit, parts)
        place = Place(granted.root, parts)
        with folder.opened(granted.root) as root, folder.parent_of(root, folder.named(parts)) as parent:
            folder.found(parent, parts)  # refuses at once what could not be replaced
        earlier = self._change(place)
        before = earlier.before if earlier else self.read.get(place.path)
        staged = {**self.changes, place.path: Change(place, content, before, granted.holds)}
        if len(staged) > MAX_STAGED_FILES or _bytes(staged.values()) > MAX_STAGED_BYTES:
            raise ValueError(f"one call writes at most {MAX_STAGED_FILES} files and {MAX_STAGED_BYTES} bytes")
        self.changes = staged


def _bytes(changes: Iterable[Change]) -> int:
    return sum(len(change.content or b"") for change in changes)


def _decoded(content: bytes, parts: Parts) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{'/'.join(parts)!r} is no UTF-8 text; use read_bytes") from None


_VERBS: dict[str, Callable[..., Any]] = {
    "read_text": Attempt.read_text,
    "read_bytes": Attempt.read_bytes,
    "list": Attempt.names,
    "exists": Attempt.exists,
    "size": Attempt.size,
    "write_text": Attempt.write_text,
    "write_bytes": Attempt.write_bytes,
    "append_text": Attempt.append_text,
    "delete": Attempt.delete,
}
