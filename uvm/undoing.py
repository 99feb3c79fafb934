"""Undoing one transaction: everything that it meant is put back, where nothing later builds on it. Layer 3.

Undone are slots, names and memories; what the journal says stays, because an acknowledged mission is never
lost: a mission whose method was undone is complete, and `undone` says by which transaction's undoing. An
undoing is a transaction like any other and can be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from uvm.codec import Ref
from uvm.errors import BatosError, NotUndoable, ObjectNotFound, SlotProtected
from uvm.granting import check_is_grant
from uvm.image import history, journal
from uvm.image.changes import ABSENT, Absent, Change, Changes, Held, same, settled
from uvm.image.grants import Grant
from uvm.image.image import LivingImage, blocking
from uvm.image.prototypes import UvmMethod, UvmObject
from uvm.image.txn import Txn
from uvm.memory.catalog import KnowledgeCatalog
from uvm.objects import check_is_data

_NEAR = 64  # oids before that of an object's slots, among which its own mostly is: both are new at once
_BREATH = 200  # objects between two looks at the memory


@dataclass(frozen=True, slots=True)
class _Clash:
    """What stands in the way: a record, and the slot in it, that something later has changed."""

    what: str
    oid: str
    slot: str | None = None


class Undoing:
    """Undoes transactions of one image.

    Args:
        catalog: name of the object that holds the memory.
        lasting: names of the objects without which the image is none.
    """

    def __init__(self, image: LivingImage, catalog: str, lasting: frozenset[str]) -> None:
        self._image = image
        self._catalog = catalog
        self._lasting = lasting

    async def undo(self, tid: str, user: str) -> str:
        """Undoes a transaction and returns the id of the transaction that did it.

        Raises:
            TransactionNotFound: there is none of this id, or its history is packed.
            NotUndoable: later transactions build on it, or it must not be undone; the text says which.
        """
        changes = await self._image.changes(tid)
        self._check(changes)
        done: list[Txn] = []

        async def unit(txn: Txn) -> None:
            clashes = await blocking(lambda: _clashes(txn, self._memory(txn), changes))
            if clashes:
                await self._refuse(txn, changes, clashes[0])
            await blocking(lambda: _check_places(txn, changes))
            await blocking(lambda: self._apply(txn, changes))
            done.append(txn)

        await self._image.attempt(f"undo {tid}", unit, user=user)
        return done[-1].tid

    def _check(self, changes: Changes) -> None:
        tid = changes.tid
        lasting = sorted(self._lasting & changes.names.keys())
        if changes.foundations or lasting:
            what = f"made {lasting[0]}" if lasting else "changed what the image rests on"
            raise NotUndoable(f"transaction {tid} {what}, which can't be undone", transaction_id=tid)
        if not (changes.slots or changes.names or changes.memories):
            what = "changed nothing" if not changes.missions else "only keeps the journal, which lasts"
            raise NotUndoable(f"transaction {tid} {what}", transaction_id=tid)

    async def _refuse(self, txn: Txn, changes: Changes, clash: _Clash) -> None:
        tid = changes.tid
        if _is_undone(txn, self._memory(txn), changes):
            raise NotUndoable(f"transaction {tid} is undone already", transaction_id=tid)
        later = await self._image.changed_since(tid, clash.oid, clash.slot)
        by = ", ".join(f"{one['transaction_id']} ({one['note']})" for one in later) or "another one"
        raise NotUndoable(
            f"transaction {tid} can't be undone: {clash.what} was changed later, by {by}; undo that first",
            transaction_id=tid,
            later=later,
        )

    def _apply(self, txn: Txn, changes: Changes) -> None:
        for oid, slots in changes.slots.items():
            mapping = txn.stored(oid)
            for slot, change in slots.items():
                if change.was == ABSENT:
                    del mapping[slot]
                else:
                    mapping[slot] = _value(txn, changes, change.was)
        for name, change in changes.names.items():
            if change.was == ABSENT:
                del txn.names[name]
            else:
                txn.names[name] = _value(txn, changes, Ref(change.was))
        for oid in changes.created:
            txn.rely_on(txn.find(oid))
        self._apply_memories(txn, changes)
        for oid, change in changes.missions.items():
            _mark(txn.stored(oid), change, changes.tid)

    def _apply_memories(self, txn: Txn, changes: Changes) -> None:
        """Puts texts back; one that was replaced since then stays: it says what is true now."""
        catalog = self._memory(txn)
        for key, change in _memories(txn, changes).items():
            if _chunk(catalog, key) == change.then:
                catalog.put(key, None if change.was == ABSENT else _value(txn, changes, change.was))

    def _memory(self, txn: Txn) -> KnowledgeCatalog:
        catalog = txn.find(self._catalog)
        assert isinstance(catalog, KnowledgeCatalog), "the awakening makes the catalog of this class"
        return catalog


def _memories(txn: Txn, changes: Changes) -> dict[str, Change]:
    """Returns what was remembered and forgotten: key of a chunk -> change of its `Held`."""
    found: dict[str, Change] = {}
    for side in ("was", "then"):
        for change in changes.memories.values():
            chunk = getattr(change, side)
            if chunk != ABSENT:
                key = _value(txn, changes, chunk).key
                found[key] = replace(found.get(key, Change(ABSENT, ABSENT)), **{side: chunk})
    return found


def _chunk(catalog: KnowledgeCatalog, key: str) -> Held | Absent:
    """Returns what the catalog remembers under a key."""
    chunk = catalog.known(key)
    return ABSENT if chunk is None else Held(chunk._p_oid.hex() if chunk._p_oid else "")


def _clashes(txn: Txn, catalog: KnowledgeCatalog, changes: Changes) -> list[_Clash]:
    """Returns what is no longer as the transaction left it."""
    found = []
    for oid, slots in changes.slots.items():
        now = txn.stored(oid)
        for slot, change in slots.items():
            if not same(settled(now[slot]) if slot in now else ABSENT, change.then):
                found.append(_Clash(f"slot {slot!r}", oid, slot))
    for name, change in changes.names.items():
        held = txn.names.get(name)
        if (ABSENT if held is None else held.oid) != change.then:
            oid = change.then if held is None else held.oid
            found.append(_Clash(f"the object {name!r}", oid))
    for oid in changes.created:
        made = txn.find(oid)
        for record in (made, made._slots):
            record._p_activate()
            if record._p_serial.hex() != changes.tid:
                found.append(_Clash(f"the object {made.label}", record._p_oid.hex()))
    if not (changes.slots or changes.names):  # beside them, a memory that has changed since simply stays
        for key, change in _memories(txn, changes).items():
            if _chunk(catalog, key) != change.then:
                found.append(_Clash("the memory", catalog._p_oid.hex()))
    return found


def _check_places(txn: Txn, changes: Changes) -> None:
    """Checks that what comes back hides no more than a slot that is written today may.

    Raises:
        NotUndoable: a method, a grant or data has taken its place; the text says which.
    """
    for oid, slots in changes.slots.items():
        back = {slot: change.was for slot, change in slots.items() if change.was != ABSENT}
        if not back:
            continue
        owner = _owner(txn, oid)
        if owner is None:
            reason = "the object that it changed has lost its name since; undo that first"
            raise _not_undoable(changes, reason)
        for slot, was in back.items():
            try:
                _check_place(owner, slot, _value(txn, changes, was))
            except SlotProtected as error:
                what, _, _ = error.message.partition(";")
                reason = (
                    f"slot {slot!r} of {owner.label} can't come back where {what}; undo or remove that first"
                )
                raise _not_undoable(changes, reason) from error


def _check_place(owner: UvmObject, slot: str, value: Any) -> None:
    if isinstance(value, UvmMethod):
        history.check_place(owner, slot)
    elif isinstance(value, Grant):
        check_is_grant(slot, owner)
    else:
        check_is_data(slot, (owner,))


def _not_undoable(changes: Changes, reason: str) -> NotUndoable:
    told = f"transaction {changes.tid} can't be undone: {reason}"
    return NotUndoable(told, transaction_id=changes.tid)


def _owner(txn: Txn, oid: str) -> UvmObject | None:
    """Returns the object whose slots have this oid; None where it has neither name nor methods."""
    wanted = bytes.fromhex(oid)
    return next((found for found in _candidates(txn, oid) if found._slots._p_oid == wanted), None)


def _candidates(txn: Txn, oid: str) -> Iterator[UvmObject]:
    """Yields the objects of the image, first those that were made at about the time of a record."""
    number = int(oid, 16)
    yield from _found(txn, (f"{near:016x}" for near in range(number - 1, max(number - _NEAR, 0), -1)))
    yield from _found(txn, txn.names)
    yield from _found(txn, txn.root["holders"])


def _found(txn: Txn, targets: Iterable[str]) -> Iterator[UvmObject]:
    for number, target in enumerate(targets, 1):
        with suppress(BatosError):  # one that can't be read is not the one that is looked for
            yield txn.find(target)
        if number % _BREATH == 0:
            txn.trim_cache()


def _is_undone(txn: Txn, catalog: KnowledgeCatalog, changes: Changes) -> bool:
    """Returns whether everything is as it was before the transaction."""
    slots = (
        same(settled(now[slot]) if slot in now else ABSENT, change.was)
        for oid, changed in changes.slots.items()
        for now in [txn.stored(oid)]
        for slot, change in changed.items()
    )
    names = (
        (ABSENT if (held := txn.names.get(name)) is None else held.oid) == change.was
        for name, change in changes.names.items()
    )
    memories = (
        not (changes.slots or changes.names) and _chunk(catalog, key) != change.was
        for key, change in _memories(txn, changes).items()
    )
    return all(slots) and all(names) and not any(memories)


def _mark(row: journal.MissionRow, change: Change, tid: str) -> None:
    """Lets a mission's row say that what it brought was undone, or no longer is; the rest of it stays."""
    was, then = change.was.get("undone"), change.then.get("undone")
    outcome = {name: value for name, value in row.outcome.items() if name != "undone"}
    if then is None and change.then.get("state") == journal.COMPLETE != change.was.get("state"):
        row.outcome = {**outcome, "transaction_id": tid, "undone": tid}  # the row's own last change is this
    elif then != was:
        row.outcome = outcome if was is None else {**outcome, "undone": was}


def _value(txn: Txn, changes: Changes, value: Any) -> Any:
    """Returns a settled value as a slot keeps it."""
    try:
        if isinstance(value, Held):
            return txn.stored(value.oid)
        return txn.storable(value)
    except ObjectNotFound as error:
        raise _not_undoable(changes, "what it replaced is gone, its history is packed") from error
