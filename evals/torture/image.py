"""What a torture run came to, as the stopped image holds it: opened as the kernel opens it, after its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.serialize import referencesf
from ZODB.utils import load_current, z64

from evals.torture import script
from evals.torture.books import Book
from evals.torture.wire import FINAL
from uvm.image import history
from uvm.image.image import LivingImage
from uvm.image.loading import Database
from uvm.image.txn import Txn
from uvm.memory.catalog import KnowledgeCatalog
from uvm.outcomes import MISS

Key = tuple[str, str]  # oid of an object, selector


class Findings:
    """What is wrong with a stopped image, question by question.

    Attributes:
        rows: the journal's records.
        failed: why missions failed -> how many; `unreasoned` those that had no right to.
        transactions, records: how many the file holds.
    """

    def __init__(self, home: Path, books: list[Book]) -> None:
        self._file, self._blobs = home / "live_image.fs", home / "live_image.fs.blob"
        self._books = books
        self.rows: list[dict[str, Any]] = []
        self.failed: Counter[str] = Counter()
        self.transactions = self.records = 0
        self.lost: list[str] = []
        self.doubled: list[str] = []
        self.uninvited: list[str] = []
        self.half_installed: list[str] = []
        self.versions: list[str] = []
        self.unreasoned: list[str] = []
        self.open: list[str] = []

    def look(self) -> None:
        """Opens the image as a kernel does, and asks all questions."""
        image = LivingImage(str(self._file), self._blobs)
        image.open()
        try:
            with image.view() as txn:
                self.rows = [row.record() for row in txn.missions.values()]
                self._look_at_missions(txn)
                self._look_at_methods(txn)
                for book in self._books:
                    self._look_at_entries(txn, book)
                    self._look_at_slots(txn, book)
                    self._look_at_objects(txn, book)
        finally:
            image.close()

    def unreadable(self) -> list[str]:
        """Returns the objects of the image that can't be loaded as what they are.

        What nothing refers to any more is no object of the image: a bucket that a tree has let go of, for
        one, is stored empty for the last time, which no bucket in a tree may be.
        """
        storage = FileStorage(str(self._file), blob_dir=str(self._blobs), read_only=True)
        database = Database(storage)
        bad = []
        try:
            for transaction in storage.iterator():
                self.transactions += 1
                self.records += sum(1 for _ in transaction)
            with database.transaction() as connection:
                for oid in _reachable(storage):
                    try:
                        connection.get(oid)._p_activate()
                    except Exception as error:
                        bad.append(f"{oid.hex()}: {type(error).__name__}: {error}")
        finally:
            database.close()
        return bad

    # Missions and methods

    def _look_at_missions(self, txn: Txn) -> None:
        self.open = [f"{mission_id} is listed as open" for mission_id in txn.root["open_missions"]]
        for row in self.rows:
            told = f"{row['mission_id']} ({row['brief']['selector']})"
            if row["state"] not in FINAL or row["finished"] is None:
                self.open.append(f"{told} is {row['state']}")
            if row["state"] in ("failed", "quarantined"):
                reason = _reason(row)
                self.failed[reason] += 1
                if reason == "":
                    self.unreasoned.append(f"{told}: {row.get('error')}")

    def _look_at_methods(self, txn: Txn) -> None:
        """Holds journal, versions and memory against each other; each mission has left one of each."""
        missions: dict[Key, list[str]] = {}
        for row in self.rows:
            if row["state"] == "complete":
                key = (row["target"], row["brief"]["selector"])
                missions.setdefault(key, []).append(row["mission_id"])
        memory = _memory(txn)
        installed: dict[Key, list[str]] = {}
        for target in txn.names.values():
            for selector, method in target.methods().items():
                told = history.versions(method)
                installed[target.oid, selector] = [version["provenance"]["mission_id"] for version in told]
                texts = memory.pop(f"{target.label}.{selector}", [])
                if len(texts) != 1 or method.source not in texts[0]:
                    self.half_installed.append(f"{target.label}.{selector}: {len(texts)} memories of it")
        self.half_installed += [f"{subject} is remembered, but there is no such method" for subject in memory]
        for key in missions.keys() | installed.keys():
            wanted, found = missions.get(key, []), installed.get(key, [])
            if set(wanted) != set(found):
                self.half_installed.append(f"{key}: missions {wanted} are complete, versions are of {found}")
            if len(found) != len(set(found)):
                self.versions.append(f"{key}: {found}")
        missions_of_misses = {row["mission_id"] for row in self.rows if row["origin"] == MISS}
        for target, selector in ((book.pupil, selector) for book in self._books for selector in book.missed):
            found = installed.get((txn.find(target).oid, selector), [])
            if len(learned := missions_of_misses.intersection(found)) > 1:
                self.versions.append(f"{target}.{selector} was missed, and learned by {sorted(learned)}")

    # Objects and slots

    def _look_at_entries(self, txn: Txn, book: Book) -> None:
        slots = txn.find(book.ledger).data()
        entries: list[int] = slots["entries"]
        if missing := sorted(book.acknowledged - set(entries)):
            self.lost.append(f"{book.ledger} lacks {missing}")
        if twice := sorted(number for number, times in Counter(entries).items() if times > 1):
            self.doubled.append(f"{book.ledger} has twice {twice}")
        if strange := sorted(set(entries) - book.entries):
            self.uninvited.append(f"{book.ledger} has {strange}, which nobody sent")
        if slots["count"] != len(entries):
            self.half_installed.append(f"{book.ledger} counts {slots['count']} of {len(entries)} entries")

    def _look_at_slots(self, txn: Txn, book: Book) -> None:
        slots = txn.find(book.store).data()
        for name, slot in book.slots.items():
            if slots.get(name) not in slot.possible:
                self.lost.append(f"{book.store}.{name} is {slots.get(name)}, not of {slot.possible}")
        if strange := slots.keys() - book.slots.keys():
            self.uninvited.append(f"{book.store} has {sorted(strange)}, which nobody set")

    def _look_at_objects(self, txn: Txn, book: Book) -> None:
        for name, oid in book.made.items():
            found = txn.names.get(name)
            if found is None or found.oid != oid:
                self.lost.append(f"{name} ({oid}) is {found and found.oid}")
        for name, found in txn.names.items(min=f"made_{book.name}_", max=f"made_{book.name}_~"):
            if found.data() != {"mark": book.objects.get(name)}:
                self.uninvited.append(f"{name} has {found.data()}")


def _reachable(storage: Any) -> set[bytes]:
    """Returns the oids of all that the root leads to."""
    found: set[bytes] = set()
    left = [z64]
    while left:
        oid = left.pop()
        if oid not in found:
            found.add(oid)
            left += referencesf(load_current(storage, oid)[0])
    return found


def _reason(row: dict[str, Any]) -> str:
    """Returns why a mission failed, if it had the right to."""
    error = row.get("error") or {}
    message = str(error.get("message", ""))
    if row["brief"]["selector"].startswith(script.FAILS):
        return "could not come out right"
    if row["state"] == "quarantined" or "the kernel died" in message:
        return "its kernel died too often"
    if error.get("type") == "HandDied" or "killed by SIGKILL" in message or "makes the hands died" in message:
        return "its hand was killed"
    return ""


def _memory(txn: Txn) -> dict[str, list[str]]:
    """Returns subject -> texts, of the methods that are remembered."""
    found: dict[str, list[str]] = {}
    for catalog in (held for held in txn.names.values() if isinstance(held, KnowledgeCatalog)):
        for chunk in catalog.chunks().values():
            if chunk.kind == "method":
                found.setdefault(str(chunk.subject), []).append(chunk.text)
    return found


def interrupted(states: Iterable[dict[str, Any]]) -> Counter[str]:
    """Returns in which states of the machine missions were when their kernel died.

    Args:
        states: records of the metacognition log, the oldest first.
    """
    under_way: dict[str, str] = {}
    found: Counter[str] = Counter()
    for record in states:
        if record["event"] == "kernel" and record["change"] == "live":
            found.update(under_way.values())
            under_way.clear()
        elif record["event"] == "transition":
            under_way[record["cycle"]] = record["state"]
            if record["state"] in ("COMPLETE", "FAILED"):
                del under_way[record["cycle"]]
    return found
