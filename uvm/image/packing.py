"""Packing an image file: forgetting versions that nobody needs any more, and nothing else. Layer 1.

ZODB's own packer, with three things added: what a version after the pack time refers to stays, even where it
was garbage at that time; the packed file is on disk before it takes the place of the image; and the index of
the file before is gone by then. `mend` puts right what a pack leaves that is killed between its two renames.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zc.lockfile import LockError, LockFile
from ZODB.FileStorage.format import CorruptedDataError, FileStorageFormatter
from ZODB.FileStorage.fspack import GC, FileStoragePacker

References = Callable[[bytes], list[bytes]]


class _Collector(GC):
    """Finds what is reachable; oids at hand can bring back an object that was garbage at the pack time."""

    def findReachableFromFuture(self) -> None:  # noqa: N802 (ZODB's name)
        super().findReachableFromFuture()
        pos = self.packpos
        while pos < self.eof:
            header = self._read_txn_header(pos)
            end = pos + header.tlen
            pos += header.headerlen()
            while pos < end:
                following = pos + self._read_data_header(pos).recordlen()
                self._keep(self.findrefs(pos))
                pos = following
            pos += 8

    def _keep(self, oids: list[bytes]) -> None:
        while oids:
            oid = oids.pop()
            pos = None if oid in self.reachable else self.oid2curpos.get(oid)
            if pos is not None:
                self.reachable[oid] = pos
                oids += self.findrefs(pos)


def packer(storage: Any, references: References, stop: bytes, gc: bool) -> tuple[int, Any] | None:
    """Packs into `FILE.pack` as `FileStorage.packer` does; holds the commit lock where it returns a result.

    Raises:
        OSError: the disk is full or broken; the image is as it was.
    """
    work = FileStoragePacker(storage, references, stop, gc)
    work.gc = _Collector(work._file, work.file_end, stop, gc, references)
    try:
        end = work.pack()
        if end is None:
            return None
        try:
            with open(f"{work._path}.pack", "rb+") as packed:
                os.fsync(packed.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{work._path}.index")  # it tells of the file that goes
        except BaseException:
            storage._commit_lock.release()
            raise
        return end, work.index
    finally:
        work.close()


def mend(path: Path) -> None:
    """Puts an image back that a killed pack had renamed, and removes what it had packed so far.

    Does nothing while another process has the image open.
    """
    packed, old = Path(f"{path}.pack"), Path(f"{path}.old")
    if not packed.exists():
        return
    try:
        lock = LockFile(f"{path}.lock")
    except LockError:
        return
    try:
        if not path.exists() and old.exists():
            os.rename(old, path)  # complete, and nothing was committed since
        packed.unlink(missing_ok=True)
    finally:
        lock.close()


class _Headers(FileStorageFormatter):
    def __init__(self, file: Any) -> None:
        self._file = file

    def last_packed(self) -> bytes:
        pos, last = 4, b""
        with contextlib.suppress(CorruptedDataError):  # the end of the file
            while (header := self._read_txn_header(pos)).status == "p":
                last = header.tid
                pos += header.tlen + 8
        return last


def beginning(path: str) -> bytes:
    """Returns the id of the last packed transaction: what was before it can't be told. Empty if none is."""
    with open(path, "rb") as file:
        return _Headers(file).last_packed()
