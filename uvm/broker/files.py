"""The verbs of `files`: reading sees what the same call and transaction have written, writing is only staged.

A call's changes lie over those of its transaction, and these over the disk. Blocking.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvm.broker import folder
from uvm.broker.folder import Parts, Signature
from uvm.broker.staging import MISSING, Change, Place, StagedFiles
from uvm.image.image import Txn

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
    """

    def __init__(self, txn: Txn) -> None:
        self._txn = txn
        self._changes: dict[str, Change] = {}
        self._read: dict[str, Signature] = {}  # what changes to these files will build on

    def keep(self) -> None:
        """Hands the call's changes over to its transaction, which writes them when it commits."""
        if not self._changes:
            return
        staged = self._txn.companion(StagedFiles)
        if staged is None:
            self._txn.join(StagedFiles(self._changes))
        else:
            staged.changes.update(self._changes)

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
            self._read.setdefault(place.path, seen)
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
            self._read.setdefault(Place(granted.root, parts).path, MISSING)
        self._stage(granted, parts, before + text.encode())

    def delete(self, granted: Granted, parts: Parts) -> None:
        granted.check_writable()
        if not self._is_file(granted, parts):
            raise FileNotFoundError(f"there is no file {'/'.join(parts)!r}")
        self._stage(granted, parts, None)

    def names(self, granted: Granted, parts: Parts) -> list[str]:
        found = set(folder.entries(granted.root, parts))
        here = Place(granted.root, parts).path
        for change in self._all():
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

    def _all(self) -> list[Change]:
        """Returns the changes of the transaction, then those of the call."""
        staged = self._txn.companion(StagedFiles)
        return [*(staged.changes.values() if staged else ()), *self._changes.values()]

    def _change(self, place: Place) -> Change | None:
        staged = self._txn.companion(StagedFiles)
        return self._changes.get(place.path) or (staged.changes.get(place.path) if staged else None)

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
        before = earlier.before if earlier else self._read.get(place.path)
        self._changes[place.path] = Change(place, content, before, granted.holds)
        held = [len(change.content or b"") for change in self._changes.values()]
        if len(held) > MAX_STAGED_FILES or sum(held) > MAX_STAGED_BYTES:
            del self._changes[place.path]
            raise ValueError(f"one call writes at most {MAX_STAGED_FILES} files and {MAX_STAGED_BYTES} bytes")


def _decoded(content: bytes, parts: Parts) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{'/'.join(parts)!r} is no UTF-8 text; use read_bytes") from None


_VERBS: dict[str, Callable[..., Any]] = {
    "read_text": Files.read_text,
    "read_bytes": Files.read_bytes,
    "list": Files.names,
    "exists": Files.exists,
    "size": Files.size,
    "write_text": Files.write_text,
    "write_bytes": Files.write_bytes,
    "append_text": Files.append_text,
    "delete": Files.delete,
}
