"""The moves log: what a commit still has to do in granted folders, on the disk before the image commits.

A write-ahead log of renames and deletions. The transaction of the image carries the token of its entry, so
after a power cut between the image's commit and the last rename the next start knows which entries were
committed, and finishes them. Blocking.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uvm.broker import folder
from uvm.broker.folder import Parts, Signature
from uvm.disk import whole

MISSING: Signature = (0, 0, 0, 0)  # of a file that is not there
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Move:
    """One step: `temporary`, in the folder `root`, becomes the file at `parts`; None deletes that file.

    Attributes:
        target: signature of the file that is replaced or deleted, or `MISSING`.
    """

    root: str
    parts: Parts
    temporary: str | None
    target: Signature


@dataclass(frozen=True, slots=True)
class Entry:
    """The moves of one commit.

    Attributes:
        token: what the image's transaction carries.
        since: 16-digit hex id of the newest transaction before it.
    """

    token: str
    since: str
    moves: tuple[Move, ...]


class MovesLog:
    """A folder with one small file for each commit whose moves are not known to be done."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def write(self, entry: Entry) -> None:
        """Brings an entry to the disk.

        Raises:
            OSError: it can't be written; nothing of it is left.
        """
        self._place.mkdir(parents=True, exist_ok=True)
        path = self._path(entry.token)
        try:
            with whole(path) as file:
                file.write(json.dumps(asdict(entry)).encode())
        except OSError:
            with suppress(OSError):
                path.unlink()  # it has its name, but the folder may not know on the disk
            raise

    def forget(self, token: str) -> None:
        """Removes an entry; one that can't be removed is found to be done at the next start."""
        with suppress(OSError):
            self._path(token).unlink()

    def entries(self) -> list[Entry]:
        """Returns the entries, in the order of their tokens; half-written ones do not count.

        Raises:
            OSError: one can't be read.
        """
        return [entry for path in sorted(self._place.glob("*")) if (entry := _read(path))]

    def finish(self, committed: Callable[[Entry], bool]) -> list[str]:
        """Does what commits left undone, and forgets what was never committed.

        Args:
            committed: whether the image holds the transaction of an entry.

        Returns:
            One line for each file that was put in its place, or could not be.
        """
        lines = []
        for path in sorted(self._place.glob("*")):
            try:
                entry = _read(path)
            except OSError as error:  # it may be whole
                lines.append(f"{path} can't be read: {error.strerror or error}; the next start tries again")
                continue
            if entry is None:  # cut short before its commit, which would have waited for it
                path.unlink()
                continue
            left = False
            for move in entry.moves if committed(entry) else ():
                try:
                    lines += _carry_out(move)
                except OSError as error:
                    left = True
                    lines.append(f"{_told(move)} still can't be written: {error.strerror or error}")
            if not left:
                self.forget(entry.token)
        return lines

    def waiting(self) -> frozenset[str]:
        """Returns the names of the temporary files that entries still need."""
        return frozenset(move.temporary for entry in self.entries() for move in entry.moves if move.temporary)

    def _path(self, token: str) -> Path:
        return self._place / f"{token}{_SUFFIX}"


def _read(path: Path) -> Entry | None:
    """Returns the entry in a file, or None where there is none; raises OSError where it can't be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # done meanwhile
        return None
    try:
        told: dict[str, Any] = json.loads(content)
        moves = tuple(_move(**move) for move in told["moves"])
        entry = Entry(str(told["token"]), str(told["since"]), moves)
    except (OSError, ValueError, TypeError, KeyError):  # a path that leads out of its folder is an OSError
        return None
    return entry if path.name == f"{entry.token}{_SUFFIX}" else None


def _move(root: str, parts: list[str], temporary: str | None, target: list[int]) -> Move:
    if temporary is not None and not folder.LEFTOVER.fullmatch(temporary):
        raise ValueError(temporary)
    inode, size, modified, changed = map(int, target)
    named = folder.named(folder.parts_of("/".join(parts)))
    return Move(root, named, temporary, (inode, size, modified, changed))


def _carry_out(move: Move) -> list[str]:
    """Does a move that was not done yet; returns what is to be told."""
    with folder.opened(move.root) as root, folder.parent_of(root, move.parts) as parent:
        made = move.temporary is None or folder.found(root, (move.temporary,)) is not None
        now = folder.found(parent, move.parts)
        current = MISSING if now is None else folder.signature(now)
        if not made and current == move.target:
            return [f"{_told(move)} is as it was before its commit: its new content is not there any more"]
        if not made or (move.temporary is None and now is None):
            return []  # done before the power went
        if current != move.target:
            return [f"{_told(move)} was changed by somebody else meanwhile; it was left as it is"]
        settle(root, parent, move.parts[-1], move.temporary)
        return [f"{_told(move)} was put in its place, as its commit had it"]


def settle(root: int, parent: int, name: str, temporary: str | None) -> None:
    """Makes a change visible, on the disk too; without `temporary` it is a deletion."""
    if temporary is None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
    else:
        os.rename(temporary, name, src_dir_fd=root, dst_dir_fd=parent)
    listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fsync(listed)
    finally:
        os.close(listed)


def _told(move: Move) -> str:
    return os.path.join(move.root, *move.parts)
