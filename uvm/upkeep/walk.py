"""A walk through an image file, transaction by transaction: whether they hang together, and where each
object's current record is. Nothing of a record is loaded; `verify` does that. Reads beside a running kernel.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ZODB.FileStorage.FileStorage import packed_version
from ZODB.FileStorage.format import CorruptedError, FileStorageFormatter
from ZODB.fsIndex import fsIndex
from ZODB.utils import z64

from uvm.image.dump import class_of

MAX_PROBLEMS = 20
BLOB = "ZODB.blob.Blob"
_HEAD = 256  # bytes of a record that name its class
_UNREADABLE = (CorruptedError, struct.error, ValueError, OverflowError)


@dataclass
class Walk:
    """What a walk found.

    Attributes:
        index: oid -> offset of the current record.
        absent: oids whose creation was undone.
        blobs: (oid, transaction id) of each record that stands for a blob file.
        end: offset after the last whole transaction.
        last: 16-digit hex id of that transaction.
        unfinished: bytes after it, of a transaction that is being written or never was finished.
    """

    index: Any = field(default_factory=fsIndex)
    absent: set[bytes] = field(default_factory=set)
    blobs: set[tuple[bytes, bytes]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    transactions: int = 0
    records: int = 0
    end: int = 0
    last: str = ""
    unfinished: int = 0

    def complain(self, problem: str) -> None:
        """Adds a problem; the first ones are enough to act on."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


def walk(path: Path) -> Walk:
    """Returns what the file holds; what is wrong with it is in `problems`.

    Raises:
        OSError: it can't be opened or read.
    """
    with path.open("rb") as file:
        walker = _Walker(file)
        walker.run()
        return walker.found


class _Walker(FileStorageFormatter):  # type: ignore[misc]
    def __init__(self, file: Any) -> None:
        self._file = file
        self.found = Walk()
        self.ltid = z64

    def fail(self, pos: int, message: str, *details: Any) -> NoReturn:
        """Raises what is wrong, in place of ZODB's way of logging it as well."""
        raise CorruptedError(message % details)

    def run(self) -> None:
        size = self._size()
        if self._file.read(4) != packed_version:
            self.found.complain("it is no image file")
            return
        pos = 4
        try:
            while pos < size and not self._is_unfinished(pos):
                pos = self._transaction(pos)
        except _UNREADABLE as error:
            self.found.complain(f"offset {pos}: {str(error) or type(error).__name__}")
        self.found.end, self.found.last = pos, self.ltid.hex()
        self.found.unfinished = max(0, size - pos)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _is_unfinished(self, pos: int) -> bool:
        """Returns whether what begins here is the last transaction, and one that has not committed."""
        head = self._at(pos)
        if len(head) < 23:
            return True
        _, length, status, *_ = struct.unpack(">8sQcHHH", head)
        rest = self._size() - (pos + length + 8)
        if status != b"c":
            if rest < 0:
                raise CorruptedError(f"a committed transaction is cut short by {-rest} bytes")
            return False
        if rest > 0 and self._at(pos) == head:  # still the same one, and yet others come after it
            raise CorruptedError("a transaction that was not finished has others after it")
        return True

    def _at(self, pos: int) -> bytes:
        """Returns a transaction's header as it is now: a buffer could hold what it was before."""
        return os.pread(self._file.fileno(), 23, pos) if hasattr(os, "pread") else self._unbuffered(pos)

    def _unbuffered(self, pos: int) -> bytes:
        with open(self._file.name, "rb", 0) as file:
            file.seek(pos)
            return file.read(23)

    def _transaction(self, pos: int) -> int:
        header = self._read_txn_header(pos)
        self.checkTxn(header, pos)
        end: int = pos + header.tlen
        if header.status != "u":  # `u` was undone in a way that ZODB no longer has
            self._records(pos, pos + header.headerlen(), end)
        if self._read_num(end) != header.tlen:
            raise CorruptedError("its length at its end is another one than at its beginning")
        self.found.transactions += 1
        return end + 8

    def _records(self, start: int, pos: int, end: int) -> None:
        header = self._read_txn_header(start)
        places: dict[bytes, int] = {}
        while pos < end:
            record = self._read_data_header(pos)
            self.checkData(header, start, record, pos)
            self._check_record(header, record)
            places[record.oid] = pos
            self._class_matters(record, pos)
            pos += record.recordlen()
        if pos != end:
            raise CorruptedError("its records don't add up to its length")
        self.found.records += len(places)
        self.found.index.update(places)

    def _check_record(self, header: Any, record: Any) -> None:
        if record.tid != header.tid:
            raise CorruptedError(f"a record of object {record.oid.hex()} belongs to another transaction")
        if record.prev and self.found.index.get(record.oid) != record.prev:
            raise CorruptedError(f"object {record.oid.hex()} does not name its earlier record")
        if record.back and self._read_data_header(record.back).oid != record.oid:
            raise CorruptedError(f"object {record.oid.hex()} points back to another object")

    def _class_matters(self, record: Any, pos: int) -> None:
        """Notes whether the object is there after this record, and whether a blob file belongs to it."""
        place, holder = pos, record
        while not holder.plen and holder.back:
            place = holder.back
            holder = self._read_data_header(place)
        self.found.absent.discard(record.oid)
        if not holder.plen:
            self.found.absent.add(record.oid)
            return
        self._file.seek(place + 42)
        head = self._file.read(min(holder.plen, _HEAD))
        if b"ZODB.blob" in head and class_of(head) == BLOB:
            self.found.blobs.add((record.oid, record.tid))
