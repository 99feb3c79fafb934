"""The chain of transactions in an image file, read without trusting it: where it is sound, and what follows.

The format has no magic numbers and no checksums within the file. What a transaction says about itself more
than once must agree: its length at both ends, its id and its place in each of its records. Layer 1; knows
ZODB's format and nothing of the image.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from ZODB.FileStorage.FileStorage import packed_version
from ZODB.FileStorage.format import DATA_HDR, DATA_HDR_LEN, TRANS_HDR, TRANS_HDR_LEN

MAGIC: bytes = packed_version
NO_TID = b"\0" * 8
UNFINISHED = b"c"
_DONE = (b" ", b"p")
_UNDONE = b"u"  # its records are not looked at; no longer written
_TRANSACTION, _RECORD, _NUMBER = struct.Struct(TRANS_HDR), struct.Struct(DATA_HDR), struct.Struct(">Q")
_WINDOW = 4 << 20
_STRIDE = 1 << 16
# A length below 2**40, then the status of a finished transaction: a header may begin 8 bytes before.
_HEADER = re.compile(rb"\0(?=\0\0.{5}[ p])", re.DOTALL)

Note = Callable[[bytes, int], None]


@dataclass(frozen=True, slots=True)
class Sound:
    """A whole transaction.

    Attributes:
        start: offset of its first byte.
        end: offset behind its last byte.
        shift: how far its records say that it lies elsewhere; None where it has no records.
    """

    tid: bytes
    start: int
    end: int
    status: bytes
    shift: int | None


@dataclass(frozen=True, slots=True)
class Chain:
    """How far the transactions of a file are sound.

    Attributes:
        end: offset behind the last sound transaction.
        last: its id; NO_TID where there is none.
        size: of the file.
    """

    end: int
    last: bytes
    size: int


class ChainReader:
    """Reads a file through one window of bounded size.

    Args:
        file: opened for reading, unbuffered or not.
        size: how much of the file is looked at.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self._start = 0
        self._window = b""

    def bytes_at(self, start: int, length: int) -> bytes:
        """Returns up to `length` bytes, fewer at the end of the file."""
        self._show(start, length)
        offset = start - self._start
        return self._window[offset : offset + length]

    def follow(self, start: int, last: bytes, note: Note) -> Chain:
        """Follows the chain from `start` as far as it is sound.

        Args:
            last: id of the transaction before `start`.
            note: called with oid and offset of each record of a sound transaction.
        """
        end = start
        while end < self.size:
            records: list[tuple[bytes, int]] = []
            found = self.sound(end, records)
            if found is None or found.status == UNFINISHED or found.shift or found.tid <= last:
                break
            for oid, place in records:
                note(oid, place)
            end, last = found.end, found.tid
        return Chain(end, last, self.size)

    def sound(self, start: int, records: list[tuple[bytes, int]] | None = None) -> Sound | None:
        """Returns the whole transaction that begins at `start`, or None; `records` gets (oid, offset)."""
        header = self._header(start)
        if header is None:
            return None
        tid, length, status, above = header
        end = start + length
        if end + _NUMBER.size > self.size or length < above:
            return None
        if self._number(end) != length:
            return None
        if status == _UNDONE:
            return Sound(tid, start, end + _NUMBER.size, status, None)
        reached, shift = self._records(start, start + above, end, tid, records)
        if reached != end:
            return None
        return Sound(tid, start, end + _NUMBER.size, status, shift)

    def is_unfinished(self, start: int, last: bytes) -> bool:
        """Returns whether from `start` to the end of the file there is what a killed commit leaves.

        That is the beginning, or all, of one transaction that was never acknowledged: its status says so.
        """
        header = self._header(start)
        if header is None:
            return False
        tid, length, status, above = header
        end = start + length
        if status != UNFINISHED or tid <= last or length < above or end + _NUMBER.size < self.size:
            return False
        if start + above >= self.size:
            return True
        reached, shift = self._records(start, start + above, end, tid, None)
        if shift:
            return False
        rest = self.bytes_at(end, _NUMBER.size)
        return reached == -1 or (reached == end and _NUMBER.pack(length).startswith(rest))

    def next_sound(self, start: int, last: bytes) -> Sound | None:
        """Searches from `start` for a finished transaction that is whole, whatever lies before it.

        One that lies where its records say is taken for what it is; one that lies elsewhere (bytes were put
        in or taken out before it), or has no records, only where its id comes after `last`.
        """
        place = start
        while place < self.size:
            stretch = self.bytes_at(place, _STRIDE + 17)
            if stretch.count(0) < len(stretch):
                for match in _HEADER.finditer(stretch):
                    begin = match.start() - 8
                    found = self._finished(place + begin, last) if 0 <= begin < _STRIDE else None
                    if found is not None:
                        return found
            place += _STRIDE
        return None

    def _finished(self, start: int, last: bytes) -> Sound | None:
        found = self.sound(start)
        good = found is not None and found.status in _DONE and (found.shift == 0 or found.tid > last)
        return found if good else None

    def _header(self, start: int) -> tuple[bytes, int, bytes, int] | None:
        """Returns id, length, status, and the bytes before the first record."""
        data = self.bytes_at(start, TRANS_HDR_LEN)
        if len(data) < TRANS_HDR_LEN:
            return None
        tid, length, status, user, note, extension = _TRANSACTION.unpack(data)
        if status not in (*_DONE, _UNDONE, UNFINISHED):
            return None
        return tid, length, status, TRANS_HDR_LEN + user + note + extension

    def _records(
        self, start: int, place: int, end: int, tid: bytes, records: list[tuple[bytes, int]] | None
    ) -> tuple[int, int | None]:
        """Walks the records of a transaction.

        Returns:
            The offset that it reached: `end` where all add up, -1 where the file ended before, 0 where they
            do not; and how far the records say that the transaction lies elsewhere.
        """
        shift: int | None = None
        window, base = self._window, self._start
        while place < end:
            if place < base or place + DATA_HDR_LEN + 8 > base + len(window):
                self._show(place, DATA_HDR_LEN + 8)
                window, base = self._window, self._start
                if place + DATA_HDR_LEN > base + len(window):
                    return -1, shift
            oid, of, before, beginning, version, size = _RECORD.unpack_from(window, place - base)
            length = DATA_HDR_LEN + (size or 8)
            if shift is None:
                shift = beginning - start
            if of != tid or beginning - start != shift or version or before >= place + abs(shift):
                return 0, shift
            if not size and self._number(place + DATA_HDR_LEN) >= place + abs(shift):
                return 0, shift
            if records is not None:
                records.append((oid, place))
            place += length
        if place != end:
            return 0, shift
        return (end if end <= self.size else -1), shift

    def _number(self, place: int) -> int:
        """Returns the number at `place`, without moving the window; 0 beyond the end."""
        offset = place - self._start
        if 0 <= offset <= len(self._window) - _NUMBER.size:
            return int(_NUMBER.unpack_from(self._window, offset)[0])
        if place + _NUMBER.size > self.size:
            return 0
        self._file.seek(place)
        return int(_NUMBER.unpack(self._file.read(_NUMBER.size))[0])

    def _show(self, start: int, length: int) -> None:
        """Moves the window, if need be, so that it shows `length` bytes from `start`, or what is left."""
        stop = min(start + length, self.size)
        if start >= self.size:
            self._window, self._start = b"", start
        elif start < self._start or stop > self._start + len(self._window):
            self._file.seek(start)
            self._window = self._file.read(min(max(_WINDOW, length), self.size - start))
            self._start = start
