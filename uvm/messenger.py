"""Sending a message: look the selector up, answer from a slot, a native or a hand, and take the writes in.

Runs inside a transaction that its caller opened, commits nothing, and trusts nothing that a hand sends back.
Layer 3: used by the PSM for trials and by the kernel for messages.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from uvm import codec
from uvm.broker.broker import Broker, Uses
from uvm.capabilities import KINDS, missing
from uvm.codec import Ref
from uvm.errors import (
    Conflict,
    DoesNotUnderstand,
    GrantMissing,
    HandDied,
    InvalidField,
    MalformedMessage,
    ObjectNotFound,
    WriteSetRefused,
)
from uvm.hands.calls import Call, ObjectView, Outcome, SlotChanges
from uvm.hands.natives import NATIVES, RESERVED
from uvm.hands.pool import HandPool
from uvm.image.grants import Grant
from uvm.image.prototypes import UvmMethod, UvmObject, is_data
from uvm.image.txn import Txn
from uvm.messages import is_public_name


class TxnHost:
    """Answers a hand's questions from one transaction.

    Args:
        uses: carries uses of grants out; None where no grant can be used.

    Attributes:
        seen: oid of each object shown -> its edition at that moment.
    """

    def __init__(self, txn: Txn, uses: Uses | None = None) -> None:
        self.seen: dict[str, Hashable] = {}
        self._txn = txn
        self._uses = uses

    def view(self, oid: str) -> ObjectView | None:
        """Returns the object of this oid as a hand sees it, or None."""
        try:
            found = self._txn.find(oid)
        except ObjectNotFound:
            return None
        self.seen[oid] = self._txn.edition(found)
        return view_of(self._txn, found)

    def taken(self, name: str) -> bool:
        """Returns whether an object has this name."""
        return name in self._txn.names

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Uses a grant, as `uvm.broker.broker.Uses` does."""
        if self._uses is None:
            raise MalformedMessage("a use where there is no broker")
        return await self._uses.use(holder, slot, verb, args, kwargs)


def view_of(txn: Txn, target: UvmObject) -> ObjectView:
    """Returns a snapshot of one object: plain slots, sources of its own methods."""
    return ObjectView(
        oid=target.oid,
        name=target.name,
        parents=tuple(parent.oid for parent in target.parents),
        slots=txn.plain(target.data()),
        methods={selector: method.source for selector, method in target.methods().items()},
        grants={slot: grant.kind for slot, grant in target.grants().items()},
    )


class Messenger:
    """Sends messages to objects, in hands where a method answers.

    Args:
        broker: carries uses of grants out; without it no grant can be used.
    """

    def __init__(self, hands: HandPool, broker: Broker | None = None) -> None:
        self._hands = hands
        self._broker = broker

    async def send(
        self, txn: Txn, target: UvmObject, selector: str, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[Any, Outcome | None]:
        """Returns the answer, and what the hand reported if one was needed; changes are applied to `txn`.

        Raises:
            DoesNotUnderstand: nobody in the chain answers, or a message inside the method was not understood.
            GrantMissing: the method needs what was not granted.
            MethodError: the method failed; `txn` is unchanged.
            InvalidField: arguments for a slot, or a change to the past.
            WriteSetRefused: it changed what a method may not change.
            Conflict: an object that it wrote has changed since the hand saw it.
        """
        found = target.lookup(selector)
        if found is None and selector in NATIVES:
            if selector == "clone":
                _check_present(txn, target, selector)
            return self._native(txn, target, selector, args, kwargs), None
        if found is None and selector in KINDS:
            raise missing(target.label, target.oid, selector)
        if found is None:
            raise DoesNotUnderstand(
                f"{target.label} does not understand '{selector}'",
                target=target.oid,
                selector=selector,
                args=args,
                kwargs=kwargs,
            )
        if not isinstance(found[1], UvmMethod):
            return self._slot(txn, target, selector, found[1], args, kwargs), None
        uses = self._uses(txn, selector)
        outcome = await self._run(txn, target, selector, args, kwargs, uses)
        if outcome.writes or outcome.created:
            _check_present(txn, target, selector)
        result = apply(txn, outcome)
        if uses is not None:
            uses.keep()
        return result, outcome

    async def run(
        self,
        txn: Txn,
        target: UvmObject,
        selector: str,
        args: list[Any],
        kwargs: dict[str, Any],
        overlay: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Returns the outcome of a method, not applied, nor are files that it wrote.

        Args:
            overlay: selector -> source, which shadows what is installed.
        """
        return await self._run(txn, target, selector, args, kwargs, self._uses(txn, selector), overlay)

    async def _run(
        self,
        txn: Txn,
        target: UvmObject,
        selector: str,
        args: list[Any],
        kwargs: dict[str, Any],
        uses: Uses | None,
        overlay: Mapping[str, str] | None = None,
    ) -> Outcome:
        call, host = Call(target=target.oid, selector=selector, args=args, kwargs=kwargs), TxnHost(txn, uses)
        try:
            outcome = await self._hands.run(call, host, overlay=overlay)
        except DoesNotUnderstand as miss:
            _check_miss(txn, miss)
            raise
        except GrantMissing as error:
            holder, grant = txn.find(error.details["target"]), error.details["grant"]
            raise missing(holder.label, holder.oid, grant, **_told_of(error)) from None
        if not (outcome.writes or outcome.created):
            return outcome
        chain = {owner.oid for owner in target.chain()}
        return replace(outcome, seen=host.seen, asked=host.seen.keys() - chain)

    def _uses(self, txn: Txn, selector: str) -> Uses | None:
        return None if self._broker is None else self._broker.open(txn, selector)

    def _slot(
        self, txn: Txn, target: UvmObject, slot: str, value: Any, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(value, Grant):
            raise InvalidField(f"{target.label}.{slot} is a grant, for methods to use", field="selector")
        if args or kwargs:
            raise InvalidField(f"{target.label}.{slot} is a data slot and takes no arguments", field="args")
        return txn.plain(value)

    def _native(
        self, txn: Txn, target: UvmObject, selector: str, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        expected = NATIVES[selector]
        if kwargs or len(args) != len(expected):
            raise InvalidField(f"{selector} takes ({', '.join(expected)})", field="args")
        if selector == "selectors":
            return selectors(target)
        if selector == "understands":
            return args[0] in selectors(target)
        if not is_public_name(args[0]):
            raise InvalidField("clone takes a name, such as second_obj", field="args")
        return Ref(txn.create(args[0], (target,), {}).oid)


def _check_present(txn: Txn, target: UvmObject, selector: str) -> None:
    """Raises InvalidField where a message would change the past."""
    if not txn.writable:
        raise InvalidField(
            f"{target.label}.{selector} changes objects, and the past can't be; send it without as_of",
            field="as_of",
        )


def _check_miss(txn: Txn, miss: DoesNotUnderstand) -> None:
    """Makes sure that a hand did not make a miss up, to have what is there written anew.

    Raises:
        HandDied: it did.
    """
    known = miss.selector in NATIVES or miss.selector in KINDS
    if known or txn.find(miss.target).lookup(miss.selector) is not None:
        raise HandDied(f"a hand missed '{miss.selector}', which is there")


def _told_of(error: GrantMissing) -> dict[str, Any]:
    """Returns what a hand told of a missing grant but its text, which the kernel writes itself."""
    return {name: error.details[name] for name in ("traceback", "selector")}


def selectors(target: UvmObject) -> list[str]:
    """Returns, sorted, what an object understands: its methods through the chain, and the natives."""
    held = {selector for owner in target.chain() for selector in owner.methods()}
    return sorted(held | NATIVES.keys())


def apply(txn: Txn, outcome: Outcome) -> Any:
    """Checks a hand's outcome, applies its write set to `txn`, and returns the result with real oids.

    What the method looked up beyond its delegation chain must still hold when the transaction commits: else
    two messages that each read what the other one writes would both succeed (write skew). Inherited slots
    are left out of that, since a busy prototype would starve whatever delegates to it.

    Raises:
        WriteSetRefused: a method slot, a native, an underscore name, an unknown object or a taken name.
        Conflict: an object to be written is no longer as the hand saw it.
    """
    known, _ = _write(txn, outcome)
    for oid in outcome.asked - outcome.writes.keys():
        txn.rely_on(txn.find(oid))
    return txn.plain(txn.storable(outcome.result, lambda oid: _resolve(txn, known, oid)))


def lost_in_storage(txn: Txn, outcome: Outcome) -> list[str]:
    """Applies a write set at a savepoint, reads it back in its stored form, and rolls back.

    Returns:
        What did not come back as it was written, as object names; empty where persistence is proven.

    Raises:
        WriteSetRefused, Conflict: as `apply`.
    """
    if not outcome.writes and not outcome.created:
        return []
    before = txn.savepoint()
    try:
        _, touched = _write(txn, outcome)
        written = [codec.encode(txn.plain(target.data())) for target in touched]
        txn.savepoint()
        txn.forget_cached()
        stored = [codec.encode(txn.plain(target.data())) for target in touched]
        return [target.label for target, was, now in zip(touched, written, stored, strict=True) if was != now]
    finally:
        before.rollback()


def _write(txn: Txn, outcome: Outcome) -> tuple[dict[str, UvmObject], list[UvmObject]]:
    """Applies a write set; returns the created objects by the hand's names for them, and all written ones."""
    for oid in outcome.writes.keys() - {new.oid for new in outcome.created}:
        target = _resolve(txn, {}, oid)
        if outcome.seen.get(oid) != txn.edition(target):
            raise Conflict(f"{target.label} has changed since the method saw it", target=target.label)
    known = _create(txn, outcome)
    touched = [_resolve(txn, known, oid) for oid in outcome.writes]
    for target, changes in zip(touched, outcome.writes.values(), strict=True):
        _change(txn, known, target, changes)
    return known, touched


def _create(txn: Txn, outcome: Outcome) -> dict[str, UvmObject]:
    """Makes the objects that a method cloned; returns them by the hand's name for them, `new:N`."""
    known: dict[str, UvmObject] = {}
    for new in outcome.created:
        if not is_public_name(new.name) or new.name in txn.names:
            raise WriteSetRefused(f"no new object can be called {new.name!r:.60}", name=new.name)
        parents = tuple(_resolve(txn, known, oid) for oid in new.parents)
        known[new.oid] = txn.create(new.name, parents, {})
    return known


def _resolve(txn: Txn, known: Mapping[str, UvmObject], oid: str) -> UvmObject:
    if oid in known:
        return known[oid]
    try:
        return txn.find(oid)
    except ObjectNotFound:
        raise WriteSetRefused(f"the method refers to an object that is not there: {oid}", oid=oid) from None


def _change(txn: Txn, known: Mapping[str, UvmObject], target: UvmObject, changes: SlotChanges) -> None:
    for slot in (*changes.set, *changes.delete):
        found = target.lookup(slot)
        taken = slot in NATIVES or slot in RESERVED or (found and not is_data(found[1]))
        if taken or not is_public_name(slot):
            raise WriteSetRefused(
                f"a method can't write {target.label}.{slot}: it is no data slot",
                target=target.label,
                slot=slot,
            )
    values = txn.storable(changes.set, lambda oid: _resolve(txn, known, oid))
    txn.edit(target, values, changes.delete)
