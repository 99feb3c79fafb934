"""The image's file: ZODB's `FileStorage`, looked at under its lock before it is opened, with a lasting index.

FileStorage saves its index at a clean end alone and doubts only its last entries. Here the index carries a
digest and the id of the transaction that it ends with, and is saved anew as the file grows, so that what has
to be read after a kill stays short. ZODB's own tools read it too. Layer 1.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ZODB._compat import Pickler, _protocol
from ZODB.fsIndex import fsIndex

from uvm.image.chain import MAGIC, UNFINISHED, ChainReader
from uvm.image.packing import packer
from uvm.image.steady import SteadyFileStorage

MIN_STEP = 32 << 20  # bytes that the file grows by before its index is saved again
_BYTES_OF_AN_ENTRY = 8
_MARK = b"\nBATOS-1"
_TRAILER = len(_MARK) + 8 + 32  # mark, id of the last transaction, SHA-256 of all that comes before it
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Index:
    """Where the current record of each object is.

    Attributes:
        entries: ZODB's `fsIndex`: oid -> offset.
        end: offset behind the last transaction that it knows.
        tid: id of that transaction.
        saved: how much of the file its saved form knows.
    """

    entries: Any
    end: int
    tid: bytes
    saved: int


Preflight = Callable[[Path], Index | None]


class ImageStorage(SteadyFileStorage):
    """A FileStorage whose file is looked at first.

    Args:
        path: the file.
        blob_dir: folder of its blobs.
        preflight: called under the lock, before the file is opened; returns its whole index, or None where
            there is no transaction. What it raises is raised.
    """

    packer = staticmethod(packer)

    def __init__(self, path: Path, blob_dir: Path, preflight: Preflight) -> None:
        self._preflight = preflight
        self._found: Index | None = None
        self._snapshots = 0
        self._written = 0
        self._finishing = False  # a commit is in its last step
        self._saved_to: tuple[int, bytes | None] = (0, None)
        self._writing = threading.Lock()
        self._saver: threading.Thread | None = None
        try:
            super().__init__(str(path), blob_dir=str(blob_dir))
        except BaseException:
            self._let_go()
            raise
        self._save_if_behind()

    def _let_go(self) -> None:
        for name in ("_file", "_tfile", "_files", "_lock_file"):
            if (held := getattr(self, name, None)) is not None:
                with suppress(OSError):
                    held.close()

    def _newIndexes(self) -> Any:  # noqa: N802 (ZODB's hook, between the lock and the opening)
        self._found = self._preflight(Path(self._file_name))
        return super()._newIndexes()

    def _restore_index(self) -> tuple[Any, int, bytes] | None:
        found, self._found = self._found, None
        if found is None:
            return None
        self._saved_to = (found.saved, found.tid if found.saved == found.end else None)
        return found.entries, found.end, found.tid

    def tpc_finish(self, transaction: Any, f: Any = None) -> bytes:
        """Finishes a commit; now and then has the index saved, beside the work."""
        self._finishing = True
        try:
            tid: bytes = super().tpc_finish(transaction, f)
        finally:
            self._finishing = False
        self._save_if_behind()
        return tid

    def _save_if_behind(self) -> None:
        """Has the index saved where it is far behind; whatever keeps it from that, the commit stands."""
        step = max(MIN_STEP, 2 * _BYTES_OF_AN_ENTRY * len(self._index))
        if self._pos - self._saved_to[0] < step or (self._saver is not None and self._saver.is_alive()):
            return
        saver = threading.Thread(target=self._save_quietly, name="save-index")
        with suppress(RuntimeError, MemoryError):  # no thread is to be had: the next commit tries again
            saver.start()
            self._saver = saver

    def _save_quietly(self) -> None:
        with suppress(OSError, MemoryError):  # the index is only there to spare time
            self._save_index()

    def _save_index(self) -> None:
        """Writes the index, whole and safe on the disk, in place of the one before."""
        with self._lock:
            end, tid = self._pos, getattr(self, "_ltid", None)
            if tid is None or end <= len(MAGIC) or self._saved_to == (end, tid):
                return
            parts = [(prefix, bucket.toString()) for prefix, bucket in self._index._data.items()]
            self._snapshots += 1
            number = self._snapshots
        with self._writing:
            if number > self._written:  # else a later one was written meanwhile
                write_index(Path(self._file_name), end, tid, parts)
                self._written, self._saved_to = number, (end, tid)
                self._saved += 1  # FileStorage counts

    def close(self) -> None:
        """Closes the file; its index is saved while the file's lock is still held.

        ZODB closes it too where a commit fails in its last step: then somebody holds `_lock`, which the
        saving of the index needs, and the index stays as it is.
        """
        if not self._finishing:
            if self._saver is not None:
                self._saver.join()
            self._save_quietly()
        super().close()


class _Digesting:
    """A file to write to that keeps a digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def index_of(path: Path) -> Path:
    """Returns where the index of an image file is."""
    return path.with_name(path.name + ".index")


def write_index(path: Path, end: int, tid: bytes, parts: list[tuple[bytes, bytes]]) -> None:
    """Writes the index of the image file at `path` as ZODB does, and behind it what vouches for it."""
    final = index_of(path)
    draft = final.with_name(final.name + ".index_tmp")  # ZODB's name for it
    with draft.open("wb") as file:
        digesting = _Digesting(file)
        pickler = Pickler(digesting, _protocol)
        pickler.fast = True
        pickler.dump(end)
        for part in parts:
            pickler.dump(part)
        pickler.dump(None)
        digesting.write(_MARK + tid)
        file.write(digesting.digest.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, final)


def read_index(path: Path, reader: ChainReader) -> Index | None:
    """Returns the saved index of an image file if it can be relied on.

    It is whole as it was written, and the transaction that it ends with is in the file, is sound, and lies
    where the index says. Anything else is None: the file is then read from its beginning.
    """
    found = vouched_index(path)
    return found if found is not None and fits(found, reader) else None


def vouched_index(path: Path) -> Index | None:
    """Returns the saved index beside an image file if it is whole as it was written, whatever the file holds.

    It is written only of transactions that are on the disk, so it proves that the file had them.
    """
    file = index_of(path)
    try:
        tid = _vouched_tid(file)
        loaded = fsIndex.load(str(file)) if tid is not None else None
    except Exception:  # whatever bytes do to an unpickler that imports nothing
        return None
    if type(loaded) is not dict or type(loaded.get("pos")) is not int or tid is None:
        return None
    return Index(loaded["index"], loaded["pos"], tid, loaded["pos"])


def _vouched_tid(file: Path) -> bytes | None:
    """Returns the id that the trailer names where the digest is right."""
    size = file.stat().st_size
    if size <= _TRAILER:
        return None
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        left = size - 32
        while left:
            if not (piece := stream.read(min(left, _PIECE))):
                return None
            digest.update(piece)
            left -= len(piece)
        if stream.read() != digest.digest():
            return None
        stream.seek(size - _TRAILER)
        mark = stream.read(len(_MARK))
        return stream.read(8) if mark == _MARK else None


def fits(index: Index, reader: ChainReader) -> bool:
    """Returns whether the transaction that it ends with is there, and its records are in the index."""
    if not len(MAGIC) < index.end <= reader.size:
        return False
    start = index.end - 8 - int.from_bytes(reader.bytes_at(index.end - 8, 8))
    records: list[tuple[bytes, int]] = []
    found = reader.sound(start, records) if start >= len(MAGIC) else None
    if found is None or found.shift or found.status == UNFINISHED:
        return False
    if (found.tid, found.end) != (index.tid, index.end):
        return False
    try:
        return all(index.entries.get(oid) == place for oid, place in dict(records).items())
    except (TypeError, ValueError, AssertionError):
        return False
