"""What is in an image file, without trusting it: nothing that a record names is imported, made or called.

`python -m uvm.image.dump FILE` is what `./puter.sh inspect` runs. It prints what ZODB's `fsdump` prints, in
the same form, reads beside a running kernel without a lock, and stops with one line at a torn end.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import pickletools
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from ZODB.FileStorage import FileIterator
from ZODB.FileStorage.format import FileStorageFormatter
from ZODB.POSException import POSError
from ZODB.TimeStamp import TimeStamp

MAX_TEXT = 400  # characters of a note, a user or a class that are printed
MAX_LOOK = 1 << 20  # bytes of a record that are looked into
MAX_OPCODES = 10_000
OID = re.compile(r"[0-9a-f]{1,16}")
_DAMAGED = (POSError, ValueError, AssertionError, struct.error, UnboundLocalError)
_UNREADABLE = (IsADirectoryError, PermissionError, *_DAMAGED)


@dataclass(frozen=True)
class Record:
    """One version of one object.

    Attributes:
        oid: 16 hex digits.
        size: of its data, in bytes; 0 where it only points back to an earlier version.
        data: the beginning of its data: two pickles, of its class and of its state.
        back: id of the transaction that it points back to, or empty.
    """

    oid: str
    size: int
    data: bytes
    back: str

    def line(self, number: int) -> str:
        """Returns the record as it is printed."""
        if not self.data:
            return f"  data #{number:05} oid={self.oid} class=undo or abort of object creation"
        back = f" bp={self.back}" if self.back else ""
        size = self.size or len(self.data)
        return f"  data #{number:05} oid={self.oid} size={size} class={_shown(class_of(self.data))}{back}"


class Torn(Exception):
    """The file ends in the middle of a transaction."""


class _File(FileStorageFormatter):
    """Reads the records of a transaction by their headers, each once, whatever they point to."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def records(self, start: int, end: int) -> Iterator[Record]:
        while start < end:
            header = self._read_data_header(start)
            following = start + header.recordlen()
            if following > end:
                raise ValueError(f"the record at offset {start} exceeds its transaction")
            size, back = header.plen, ""
            if not size and header.back:
                header_before = self._read_data_header(header.back)
                size, back = header_before.plen, header_before.tid.hex()
            data = self._file.read(min(size, MAX_LOOK)) if size else b""
            yield Record(header.oid.hex(), size, data, back)
            start = following


def class_of(data: bytes) -> str:
    """Returns the name of the class that a record claims, by reading its first pickle as text."""
    texts: list[str] = []
    try:
        for opcode, value in _opcodes(io.BytesIO(data)):
            if opcode in ("GLOBAL", "INST"):
                return str(value).replace(" ", ".")
            if opcode == "STACK_GLOBAL":
                return ".".join(texts[-2:])
            if isinstance(value, str):
                texts.append(value)
    except ValueError:
        return "(unreadable)"
    return ".".join(texts[:2]) if texts else "(none)"


def parts_of(data: bytes, name: str) -> str | None:
    """Returns the oid of an object's slots if this is the record of the object of that name."""
    file = io.BytesIO(data)
    try:
        list(_opcodes(file))
        values = [value for _, value in _opcodes(file) if isinstance(value, (str, bytes))]
    except ValueError:
        return None
    pairs = list(pairwise(values))
    slots = next((after for key, after in pairs if key == "_slots" and isinstance(after, bytes)), None)
    return slots.hex() if slots is not None and ("name", name) in pairs else None


def _opcodes(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yields opcodes and arguments of one pickle; ends after its STOP."""
    for opcode, value, _ in islice(pickletools.genops(file), MAX_OPCODES):
        yield opcode.name, value


def _shown(text: str) -> str:
    """Returns a text that can neither steer a terminal nor fill it."""
    short = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)


def _told(text: bytes) -> str:
    return repr(text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + b"...")


def lines(path: Path, wanted: set[str] | None = None) -> Iterator[str]:
    """Yields what there is to print: each transaction, then its records.

    Args:
        wanted: oids; transactions without any of them are left out. None takes all.

    Raises:
        Torn: after the last whole transaction, where something follows it.
        ValueError: the file is no image, or damaged; the text says where.
    """
    transactions = _transactions(path)
    for number, (found, records) in enumerate(transactions):
        told = [
            record.line(place)
            for place, record in enumerate(records)
            if wanted is None or record.oid in wanted
        ]
        if told or wanted is None:
            size, when = found._tend - found._tpos, TimeStamp(found.tid)
            yield f"Trans #{number:05} tid={found.tid.hex()} size={size} time={when} offset={found._pos}"
            user, description = _told(found.user), _told(found.description)
            yield f"    status={found.status!r} user={user} description={description}"
            yield from told


def oids_of(path: Path, name: str) -> set[str]:
    """Returns the oids of a named object: its own and that of its slots; empty if there is none."""
    oids: set[str] = set()
    try:
        for _, records in _transactions(path):
            for record in records:
                slots = parts_of(record.data, name)
                oids |= {record.oid, slots} if slots is not None else set()
    except (Torn, ValueError):  # the dump itself tells of it
        pass
    return oids


def _transactions(path: Path) -> Iterator[tuple[Any, list[Record]]]:
    end = 0
    try:
        iterator = FileIterator(str(path))
        try:
            size, end = iterator._file_size, iterator._pos
            for found in iterator:
                yield found, list(_File(iterator._file).records(found._pos, found._tend))
                end = iterator._pos
        finally:
            iterator.close()
    except _UNREADABLE as error:
        kind = type(error).__name__
        raise ValueError(f"can't be read beyond offset {end} ({kind}: {_shown(str(error))})") from None
    if end < size:
        raise Torn(
            f"the last {size - end} bytes are no whole transaction: one is being written, or the file is torn"
        )


def main(arguments: list[str]) -> int:
    """Prints a dump and returns the exit status: 1 where there is no image, or the object is not in it."""
    logging.disable(logging.CRITICAL)  # FileIterator tells the log what the last line tells the user
    parser = argparse.ArgumentParser(
        prog="inspect", description="Lists the transactions in an image file; runs nothing of it."
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--oid", help="only versions of this object: up to 16 hex digits")
    which.add_argument("--object", metavar="NAME", help="only versions of the object of this name")
    options = parser.parse_args(arguments)
    if options.oid is not None and not OID.fullmatch(options.oid):
        parser.error("--oid: up to 16 hexadecimal digits, in lower case")
    try:
        return _print(options)
    except FileNotFoundError:
        return _complain(f"there is no file {options.file}")
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print(options: argparse.Namespace) -> int:
    file, wanted = options.file, None
    if options.oid is not None:
        wanted = {options.oid.rjust(16, "0")}
    if options.object is not None:
        wanted = oids_of(file, options.object)
        if not wanted:
            return _complain(f"{file}: there is no object {options.object!r:.200}")
    try:
        for line in lines(file, wanted):
            print(line)
    except Torn as note:
        print(f"{file}: {note}", file=sys.stderr)
    except ValueError as error:
        return _complain(f"{file}: {error}")
    sys.stdout.flush()
    return 0


def _complain(reason: str) -> int:
    sys.stdout.flush()
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
