"""Whether an image file is sound: all transactions, and all current records, by the kernel's own reader.

Read-only, beside a running kernel too: it reads up to the last whole transaction. Nothing of the file is
imported or called but what the allow-list knows, as in the kernel.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transaction import TransactionManager
from ZODB.blob import FilesystemHelper
from ZODB.FileStorage import FileStorage
from ZODB.fsIndex import fsIndex
from ZODB.serialize import referencesf
from ZODB.utils import load_current, z64

from uvm.errors import NotVerified
from uvm.image import allowed
from uvm.image.chain import ChainReader
from uvm.image.defused import defuse
from uvm.image.loading import Database
from uvm.image.storage import read_index, write_index
from uvm.upkeep.walk import Walk, walk

ATTEMPTS = 3  # a pack that puts another file in this one's place makes it begin anew
_EVERY = 1000  # objects between two signs of progress
_BLOB = ("ZODB.blob", "Blob")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        bytes: up to the end of the last whole transaction.
        transaction_id: of that transaction, 16 hex digits.
        unfinished: bytes after it.
        undone: references to objects whose creation was undone.
        problems: what is wrong, one sentence each; empty where the image is sound.
    """

    path: Path
    transactions: int
    records: int
    objects: int
    blobs: int
    bytes: int
    transaction_id: str
    unfinished: int
    undone: int
    seconds: float
    problems: tuple[str, ...]

    def told(self) -> str:
        """Returns one line with counts and rates."""
        seconds = max(self.seconds, 1e-3)
        counts = f"{self.transactions} transactions, {self.objects} objects, {self.blobs} blobs"
        rates = f"{self.bytes / seconds / 1e6:.1f} MB/s, {self.objects / seconds:.0f} objects/s"
        notes = f"; {self.undone} references to objects whose creation was undone" * bool(self.undone)
        notes += f"; {self.unfinished} bytes of an unfinished transaction" * bool(self.unfinished)
        verdict = f"NOT sound: {self.problems[0]}" if self.problems else "sound"
        return f"{self.path}: {verdict} ({counts}, {self.bytes} bytes in {seconds:.1f} s, {rates}{notes})"

    def check(self) -> Report:
        """Returns itself.

        Raises:
            NotVerified: it found problems.
        """
        if self.problems:
            raise NotVerified(
                f"{self.path} does not verify: {self.problems[0]}", problems=list(self.problems)
            )
        return self


def verify(path: Path, blob_dir: Path, tell: Tell = lambda _: None, *, save_index: bool = False) -> Report:
    """Returns what is in an image file, and what is wrong with it.

    Args:
        blob_dir: where its blob files are.
        tell: told how far it is.
        save_index: whether to write the index of a sound file, of which nobody else may know yet.

    Raises:
        OSError: the file can't be opened or read.
    """
    for _ in range(ATTEMPTS):
        file = path.stat().st_ino
        report = _verify(path, blob_dir, tell, save_index)
        if path.stat().st_ino == file:
            break
    return report


def _verify(path: Path, blob_dir: Path, tell: Tell, save_index: bool) -> Report:
    began = time.monotonic()
    tell("reading the transactions")
    found = walk(path)
    undone = 0
    if not found.problems:
        _check_blobs(found, blob_dir)
        undone = _Objects(path, found, tell).check()
    if save_index and not found.problems:
        parts = [(prefix, bucket.toString()) for prefix, bucket in found.index._data.items()]
        write_index(path, found.end, bytes.fromhex(found.last), parts)
    return Report(
        path=path,
        transactions=found.transactions,
        records=found.records,
        objects=len(found.index) - len(found.absent),
        blobs=len(found.blobs),
        bytes=found.end,
        transaction_id=found.last,
        unfinished=found.unfinished,
        undone=undone,
        seconds=time.monotonic() - began,
        problems=tuple(found.problems),
    )


def _check_blobs(found: Walk, blob_dir: Path) -> None:
    helper = FilesystemHelper(str(blob_dir))
    for oid, tid in sorted(found.blobs):
        if not Path(helper.getBlobFilename(oid, tid)).is_file():
            found.complain(f"blob file of object {oid.hex()}, transaction {tid.hex()}, is missing")


class _Beside(FileStorage):  # type: ignore[misc]
    """The file, read-only, by the index of the walk: the one beside it may be anything."""

    def __init__(self, path: Path, found: Walk) -> None:
        self._walked = found
        super().__init__(str(path), read_only=True)

    def _restore_index(self) -> tuple[Any, int, bytes] | None:
        found = self._walked
        return (fsIndex(found.index), found.end, bytes.fromhex(found.last)) if found.transactions else None


class _Objects:
    """Loads each object as the kernel would, and looks whether what it refers to is there."""

    def __init__(self, path: Path, found: Walk, tell: Tell) -> None:
        self._path = path
        self._found = found
        self._tell = tell
        self._undone = 0
        self._blobs = {oid for oid, _ in found.blobs}

    def check(self) -> int:
        """Returns the number of references to objects whose creation was undone."""
        if z64 not in self._found.index:
            self._found.complain("it holds no root object")
            return 0
        defuse()
        storage = database = None
        try:
            self._check_index()
            storage = _Beside(self._path, self._found)
            database = Database(storage)
            self._check_all(database.open(TransactionManager(explicit=True)), storage)
        except Exception as error:  # whatever it is, a kernel would meet it too
            self._found.complain(f"it can't be opened: {_told(error)}")
        finally:
            if (opened := database or storage) is not None:
                opened.close()
        return self._undone

    def _check_index(self) -> None:
        """Compares with the index beside the file where a kernel would trust it, as far as both reach."""
        with self._path.open("rb", buffering=0) as file:
            saved = read_index(self._path, ChainReader(file, os.fstat(file.fileno()).st_size))
        if saved is None:
            return
        mine, theirs, end = self._found.index, saved.entries, self._found.end
        known = ((place, theirs.get(oid, -1)) for oid, place in mine.items() if place < saved.end)
        strange = sum(1 for place, told in known if told != place and told < end)  # behind the end: newer
        strange += sum(1 for oid, place in theirs.items() if place < end and oid not in mine)
        if strange:
            self._found.complain(f"its index is wrong about {strange} objects; delete {self._path}.index")

    def _check_all(self, connection: Any, storage: Any) -> None:
        connection.transaction_manager.begin()
        for number, oid in enumerate(self._found.index):
            if not number % _EVERY:
                self._tell(f"loading object {number} of {len(self._found.index)}")
                connection.cacheGC()
            replaced = storage._index[oid] >= self._found.end  # by a commit since the walk
            if oid not in self._found.absent and not replaced:
                self._check_one(connection, storage, oid)
        self._check_root(connection.root())
        connection.close()

    def _check_one(self, connection: Any, storage: Any, oid: bytes) -> None:
        try:
            if oid in self._blobs:
                allowed.find_class(None, *_BLOB)
            else:
                found = connection.get(oid)
                found._p_activate()
                found._p_deactivate()
            references = referencesf(load_current(storage, oid)[0])
        except Exception as error:  # as above
            self._found.complain(f"object {oid.hex()}: {_told(error)}")
            return
        for reference in references:
            self._check_reference(oid, reference, storage)

    def _check_reference(self, oid: bytes, reference: bytes, storage: Any) -> None:
        if reference in self._found.absent:
            self._undone += 1
        elif reference not in self._found.index and reference not in storage._index:
            self._found.complain(f"object {oid.hex()} refers to {reference.hex()}, which is missing")

    def _check_root(self, root: Any) -> None:
        missing = [name for name in (*allowed.foundations(), "schema") if name not in root]
        if missing:
            self._found.complain(f"it is no living image: its root holds no {', '.join(missing)}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.300}".replace("\n", " ")
