"""What one earlier transaction changed, as data: the ground for undoing it. Layer 1.

ZODB's own undo works on records: it refuses as soon as a later transaction wrote the same record, and two
missions that were remembered one after the other share one. Here a transaction is read as what it meant:
slots, names, memories and missions, each with what it was before and after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from BTrees.IOBTree import IOBTree, IOBucket
from BTrees.OIBTree import OIBTree, OIBucket
from BTrees.OOBTree import OOBTree, OOBucket
from persistent import Persistent
from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from ZODB.POSException import POSKeyError, StateLoadError
from ZODB.utils import z64

from uvm import codec
from uvm.errors import BatosError, ImageDamaged, NotUndoable, TransactionNotFound
from uvm.image import values
from uvm.image.prototypes import UvmObject

_PACKED = "p"
MAX_REVISIONS = 100  # of a record, looked through for who changed it last
_TRIES, _PAUSE_S = 50, 0.02  # for a file that is being appended to at this very moment
_NODES = (OOBTree, OOBucket, IOBTree, IOBucket, OIBTree, OIBucket)


@dataclass(frozen=True, slots=True)
class Held:
    """A method, a grant or a remembered text, by its oid: such an object never changes."""

    oid: str


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands for a slot or a name that is not there."""


ABSENT = Absent()


@dataclass(frozen=True, slots=True)
class Change:
    """One value, before the transaction and after it; `ABSENT` where there was none."""

    was: Any
    then: Any


@dataclass(slots=True)
class Changes:
    """What a transaction changed.

    Attributes:
        tid: its id, 16 hex digits.
        created: oids of the objects that it made.
        slots: oid of an object's slots -> slot -> change; of objects that were there before.
        names: name -> change of the oid that it stands for.
        memories: number of a remembered text -> change of its `Held`.
        missions: oid of a mission's row -> change of its plain state.
        foundations: it changed the root, an object's parents, or something else that lasts.
    """

    tid: str
    created: list[str] = field(default_factory=list)
    slots: dict[str, dict[str, Change]] = field(default_factory=dict)
    names: dict[str, Change] = field(default_factory=dict)
    memories: dict[int, Change] = field(default_factory=dict)
    missions: dict[str, Change] = field(default_factory=dict)
    foundations: bool = False


def settled(value: Any) -> Any:
    """Returns a slot's value as it can be kept apart from its transaction: plain, or `Held`."""
    if isinstance(value, Persistent) and not isinstance(value, UvmObject):
        return Held(value._p_oid.hex() if value._p_oid else "")
    return values.to_plain(value)


def same(one: Any, other: Any) -> bool:
    """Returns whether two settled values are the same, types included."""
    if isinstance(one, (Held, Absent)) or isinstance(other, (Held, Absent)):
        return bool(one == other)
    return codec.encode(one) == codec.encode(other)


def begins(db: Any) -> bytes:
    """Returns the id of the earliest transaction whose state is whole; what came before was packed away."""
    last_packed: bytes = z64
    for transaction in _transactions(db):
        tid: bytes = transaction.tid
        if _status(transaction) != _PACKED:
            return tid if last_packed == z64 else last_packed
        last_packed = tid
    return last_packed


def since(db: Any, oid: str, tid: str, slot: str | None = None, limit: int = 5) -> list[dict[str, str]]:
    """Returns the newest transactions after `tid` that wrote a record: `{transaction_id, note, user}`.

    Args:
        slot: only those that changed this slot, where the record holds slots.
    """
    found: list[dict[str, str]] = []
    revisions = db.history(bytes.fromhex(oid), MAX_REVISIONS) or []
    with _Past(db, at=db.lastTransaction()) as past:
        values_then = [past.slot(oid, revision["tid"], slot) if slot else None for revision in revisions]
    for number, revision in enumerate(revisions):
        if len(found) == limit or revision["tid"].hex() <= tid:
            break
        if slot is None or number + 1 == len(revisions) or values_then[number] != values_then[number + 1]:
            told = {"note": revision["description"], "user": revision["user_name"].strip()}
            found.append({"transaction_id": revision["tid"].hex(), **told})
    return found


def read(db: Any, tid: str) -> Changes:
    """Returns what a transaction changed; blocking, and linear in the length of the history.

    Raises:
        TransactionNotFound: there is none of this id, or it lies before the image's history.
        NotUndoable: the storage does not tell its transactions.
        ImageDamaged, ForbiddenClass: a record of it can't be read.
    """
    oids = _records(db, bytes.fromhex(tid))
    with _Past(db, before=bytes.fromhex(tid)) as was, _Past(db, at=bytes.fromhex(tid)) as then:
        try:
            return _read(Changes(tid), oids, was, then)
        except (TypeError, ValueError, LookupError, StateLoadError) as error:  # a forged record
            raise ImageDamaged(
                f"transaction {tid} can't be read ({type(error).__name__}: {error})"
            ) from error


class _Past:
    """A connection to an earlier state, with a transaction of its own."""

    def __init__(self, db: Any, **moment: bytes) -> None:
        self._manager = TransactionManager(explicit=True)
        self._connection = db.open(self._manager, **moment)

    def __enter__(self) -> _Past:
        self._manager.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.abort()
        self._connection.close()

    def get(self, oid: bytes) -> Any:
        """Returns the object of this oid, or None where there was none."""
        try:
            return self._connection.get(oid)
        except POSKeyError:
            return None

    def slot(self, oid: str, tid: bytes, slot: str) -> Any:
        """Returns what a slot held in one revision, to compare; what can't be read is like nothing else."""
        try:
            data = self._connection.db().storage.loadSerial(bytes.fromhex(oid), tid)
            held = self._connection._reader.getState(data)["data"]
            value = settled(held[slot]) if slot in held else ABSENT
            return value if isinstance(value, (Held, Absent)) else codec.encode(value)
        except (POSKeyError, StateLoadError, BatosError, TypeError, LookupError):
            return object()

    def items(self, node: Any) -> Iterator[tuple[Any, Any]]:
        """Yields the keys and values that a node of a tree holds itself.

        It is read from the record: a bucket that was emptied when its tree gave it up is none that C code
        would take.
        """
        if node is None:
            return
        state = self._connection._reader.getState(self._connection._storage.load(node._p_oid)[0])
        if isinstance(node, (OOBTree, IOBTree, OIBTree)):
            state = state[0][0] if state is not None and len(state) == 1 else ((),)
        flat = state[0]
        yield from zip(flat[::2], flat[1::2], strict=True)


def _read(changes: Changes, oids: list[bytes], was: _Past, then: _Past) -> Changes:
    trees: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})  # (kind, key) -> settled value: before, after
    for oid in oids:
        before, after = was.get(oid), then.get(oid)
        kept = before if after is None else after
        if isinstance(kept, _NODES):
            for seen, past, node in zip(trees, (was, then), (before, after), strict=True):
                seen.update(_named(kept, past.items(node)))
        elif oid == z64:
            changes.foundations = True
        elif isinstance(kept, UvmObject):
            if before is None:
                changes.created.append(oid.hex())
            changes.foundations |= before is not None and not _only_touched(before, after)
        elif isinstance(kept, PersistentMapping):
            if before is not None:  # else it belongs to an object that was made
                found = _differences(_slots(before), _slots(after))
                changes.slots |= {oid.hex(): found} if found else {}
        elif kept is not None and hasattr(kept, "mission_id"):
            changes.missions[oid.hex()] = Change(_state(before), _state(after))
    _tell_trees(changes, _differences(*trees))
    return changes


def _only_touched(before: UvmObject, after: UvmObject | None) -> bool:
    return after is not None and [parent._p_oid for parent in before.parents] == [
        parent._p_oid for parent in after.parents
    ]


def _named(node: Any, items: Iterator[tuple[Any, Any]]) -> dict[tuple[str, Any], Any]:
    """Returns what a node holds, by which of the image's trees it must belong to: their values differ."""
    if isinstance(node, (IOBTree, IOBucket)):
        return {("memory", key): settled(value) for key, value in items}
    if isinstance(node, (OIBTree, OIBucket)):  # where each text is: the texts themselves say it too
        return {}
    return {
        ("name" if isinstance(value, UvmObject) else "mission", key): value._p_oid.hex()
        for key, value in items
        if isinstance(value, Persistent)
    }


def _tell_trees(changes: Changes, found: dict[tuple[str, Any], Change]) -> None:
    for (kind, key), change in found.items():
        if kind == "name":
            changes.names[key] = change
        elif kind == "memory":
            changes.memories[key] = change


def _slots(mapping: PersistentMapping | None) -> dict[str, Any]:
    return {} if mapping is None else {name: settled(value) for name, value in mapping.items()}


def _state(row: Any) -> dict[str, Any]:
    return {} if row is None else dict(row.record())


def _differences(was: dict[Any, Any], then: dict[Any, Any]) -> dict[Any, Change]:
    changed = {key: Change(was.get(key, ABSENT), then.get(key, ABSENT)) for key in was | then}
    return {key: change for key, change in changed.items() if not same(change.was, change.then)}


def _records(db: Any, tid: bytes) -> list[bytes]:
    """Returns the oids that a transaction wrote."""
    for transaction in _transactions(db, tid):
        if _status(transaction) == _PACKED:
            told = f"transaction {tid.hex()} lies before the image's history, which was packed"
            raise TransactionNotFound(told, transaction_id=tid.hex())
        return [record.oid for record in transaction]
    first = begins(db).hex()
    told = f"no transaction {tid.hex()} in the image; the history begins with {first}"
    raise TransactionNotFound(told, transaction_id=tid.hex(), begins=first)


def _status(transaction: Any) -> str:
    status = getattr(transaction, "status", " ")
    return status.decode("latin-1") if isinstance(status, bytes) else str(status)


def _transactions(db: Any, tid: bytes | None = None) -> Iterator[Any]:
    """Yields transactions from the storage, the oldest first: all, or the one of this id."""
    listed = getattr(db.storage, "iterator", None)
    if listed is None:
        raise NotUndoable("this image's storage does not tell its transactions")
    for left in range(_TRIES - 1, -1, -1):
        try:
            found = listed(tid, tid)
            break
        except ValueError:  # ZODB's word for a transaction that is half written
            if not left:
                raise
            time.sleep(_PAUSE_S)
    try:
        yield from found
    finally:
        close = getattr(found, "close", None)
        if close is not None:
            close()
