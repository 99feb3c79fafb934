"""Packing an image file: forgetting versions that nobody needs any more, and nothing else. Layer 1.

ZODB's own packer, with three things added: what a version after the pack time refers to stays, even where it
was garbage at that time; the packed file is on disk before it takes the place of the image; and the index of
the file before is gone by then. What a killed pack leaves, `recovery` puts right.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

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
