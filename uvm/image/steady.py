"""A FileStorage that a full disk does not spoil.

ZODB writes through Python's buffers. Where a write fails, what is in the buffer stays there: the truncation
that is to take the failed transaction back fails with it, later reads fail, and once there is room again the
rest is written, to where the next transaction has its place; a shorter one leaves garbage behind itself, and
the next start finds a damaged file. Without buffers ZODB's own way back works. Layer 1.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ZODB.blob import LAYOUT_MARKER
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import TempFormatter


class WholeFile(io.FileIO):
    """A file that is written to at once and in full, or raises."""

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) :]
        return len(data)


class SteadyFileStorage(FileStorage):
    """A FileStorage whose files have no buffers, and whose scratch file does not stay large."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._be_steady()

    def _be_steady(self) -> None:
        self._file = self._file
        self._tfile: Any = _whole(self._tfile)
        self._tfmt = TempFormatter(self._tfile)

    @property
    def _file(self) -> Any:
        return self.__dict__.get("_file")

    @_file.setter
    def _file(self, file: Any) -> None:  # a pack puts a new one here
        self.__dict__["_file"] = _whole(file)

    def _abort(self) -> None:
        super()._abort()
        self._tfile.truncate(0)  # what was too large must not keep the room of smaller ones


def steady(storage: Any) -> Any:
    """Returns an open storage; a FileStorage becomes one that a full disk does not spoil."""
    if type(storage) is FileStorage and not storage.isReadOnly():
        storage.__class__ = SteadyFileStorage  # zodburi makes plain ones
        storage._be_steady()
    return storage


def whole_layout(blob_dir: Path) -> None:
    """Writes the marker of a folder of blobs again, where a power cut left it empty: ZODB expects a name."""
    marker = blob_dir / LAYOUT_MARKER
    if marker.is_file() and not marker.stat().st_size:
        marker.write_text("bushy")  # as ZODB makes every new folder


def gave_up(storage: Any) -> bool:
    """Returns whether a FileStorage has closed itself, as it does where a commit fails in its last step."""
    return isinstance(storage, FileStorage) and bool(storage._file.closed)


def _whole(file: Any) -> Any:
    if file is None or isinstance(file, WholeFile):
        return file
    whole = WholeFile(file.name, "r+b")
    file.close()
    return whole
