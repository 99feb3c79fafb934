"""The vocabulary between the kernel and its hands: what is called, what a hand may see, what comes back.

Plain values throughout, as `uvm.codec` has them; a reference is a `Ref`. Kernel's side; imports nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ObjectView:
    """A snapshot of one object, as a hand sees it.

    Attributes:
        parents: oids, in the order of delegation.
        slots: the object's own data slots, by name.
        methods: sources of the object's own methods, by selector.
        grants: kinds of the object's own grants, by slot.
    """

    oid: str
    name: str | None
    parents: tuple[str, ...]
    slots: Mapping[str, Any]
    methods: Mapping[str, str]
    grants: Mapping[str, str] = field(default_factory=dict)


class Host(Protocol):
    """Answers a hand's questions from the transaction that the call runs in."""

    def view(self, oid: str) -> ObjectView | None:
        """Returns the object of this oid, or None where there is none."""

    def taken(self, name: str) -> bool:
        """Returns whether an object has this name; a hand learns no more of it."""

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Uses the grant that object `holder` keeps in `slot`; returns `{ok}` or `{error: {type, message}}`.

        Raises:
            MalformedMessage: a use that an honest hand does not ask for.
        """


@dataclass(frozen=True, slots=True)
class Call:
    """A message to an object: `target` is its oid."""

    target: str
    selector: str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SlotChanges:
    """What a call changed on one object: slots with their new values, and slots deleted."""

    set: dict[str, Any]
    delete: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Created:
    """An object that a call made by `self.clone(name)`; `oid` is `new:1`, `new:2` … within the call."""

    oid: str
    name: str
    parents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call. Nothing of it has been applied to anything.

    Attributes:
        writes: oid, or `new:N` of a created object, to the changes that are to be kept.
        created: in the order of their making; a later one may name an earlier one as its parent.
        discarded: oid to slots that were changed on an object that never said `_p_changed = True`; the first
            twenty objects, and of each the first twenty.
        printed: what the method printed, cut at 65,536 characters.
        seconds: wall clock of the call in its hand.
        seen: oid to the edition of the object that the hand was shown, as the host of the call noted it.
        asked: the oids among them that the hand asked for, beyond the receiver and its delegation chain.
    """

    result: Any
    writes: dict[str, SlotChanges]
    created: tuple[Created, ...]
    discarded: dict[str, tuple[str, ...]]
    printed: str
    seconds: float
    seen: Mapping[str, Hashable] = field(default_factory=dict)
    asked: Set[str] = frozenset()
