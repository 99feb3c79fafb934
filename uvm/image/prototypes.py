"""The objects of the living image. The module path of each class here is the disk format: it never changes.

A `UvmObject` has slots and parents and no class of its own making: what it does not hold itself it looks up
through its parents, depth first. Methods are slots whose value is a `UvmMethod`: source with its provenance,
never a function; grants are slots whose value is a `Grant`. Layer 1: knows nothing of kernel, mind or hands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import NoneType
from typing import Any, ClassVar

from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZODB.utils import z64

from uvm.errors import DoesNotUnderstand
from uvm.image.grants import Grant
from uvm.image.shapes import Shape, a, names, tuple_of


class UvmMethod(Persistent):
    """A method as it is stored: its source, what was asked, and the version before it.

    Each version is a record of its own, never changed and never loaded for a call of a later one.

    Attributes:
        selector: the message that it answers.
        parameters: names of the parameters after `self`.
        source: Python source of one function.
        sha256: hex digest of `source`; caches of compiled code use it as their key.
        doc: first paragraph of the docstring.
        provenance: plain dict: who asked, which model, prompt, memories, trials, transaction note.
        trials: plain list of `{args, kwargs, returns | raises, origin}` that this version has passed.
        number: of this version; the oldest is 1.
        previous: the version that it replaced, or None.
        versions: earlier versions as plain dicts, the oldest first, where an older kernel replaced them.
    """

    _shape: ClassVar[Shape]
    number: int = 0  # an older kernel wrote none: it is told by `versions`
    previous: UvmMethod | None = None
    versions: tuple[dict[str, Any], ...] = ()

    def __init__(
        self,
        selector: str,
        parameters: tuple[str, ...],
        source: str,
        doc: str,
        provenance: dict[str, Any],
        trials: list[dict[str, Any]],
    ) -> None:
        self.selector = selector
        self.parameters = parameters
        self.source = source
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self.doc = doc
        self.provenance = provenance
        self.trials = trials
        self.number = 1

    def record(self) -> dict[str, Any]:
        """Returns this version as plain data."""
        return {
            "selector": self.selector,
            "parameters": self.parameters,
            "source": self.source,
            "sha256": self.sha256,
            "doc": self.doc,
            "provenance": self.provenance,
            "trials": self.trials,
        }

    def succeed(self, method: UvmMethod) -> UvmMethod:
        """Returns `method` with this version and its ancestors as its history."""
        method.previous, method.number = self, self.version + 1
        return method

    @property
    def version(self) -> int:
        """The number of this version; the oldest is 1."""
        return self.number or len(self.versions) + 1

    def lineage(self) -> list[dict[str, Any]]:
        """Returns all versions up to this one as plain data, the oldest first, each with its number."""
        found: list[dict[str, Any]] = []
        method: UvmMethod | None = self
        while method is not None:
            told = {**method.record(), "transaction_id": method.transaction_id, "version": method.version}
            found.append(told)
            older = list(enumerate(method.versions, 1))
            found += [
                {"transaction_id": "", **record, "version": number} for number, record in reversed(older)
            ]
            method = method.previous
        return found[::-1]

    @property
    def transaction_id(self) -> str:
        """16-digit hex id of the transaction that installed this version; empty before it has committed."""
        self._p_activate()
        return self._p_serial.hex() if self._p_serial != z64 else ""


UvmMethod._shape = {
    "selector": a(str),
    "parameters": tuple_of(str),
    "source": a(str),
    "sha256": a(str),
    "doc": a(str),
    "provenance": names,
    "trials": a(list),
    "number": a(int),
    "previous": a(UvmMethod, NoneType),
    "versions": tuple_of(dict),
}


class UvmObject(Persistent):
    """A prototype: data slots and methods in `_slots`, everything else by delegation to `parents`.

    Attribute access is slot access. `_slots`, `parents` and `name` are the object itself.
    """

    _own = frozenset({"_slots", "parents", "name"})
    _shape: ClassVar[Shape]

    _slots: PersistentMapping
    parents: tuple[UvmObject, ...]
    name: str | None

    def __init__(
        self,
        name: str | None = None,
        parents: tuple[UvmObject, ...] = (),
        slots: dict[str, Any] | None = None,
    ) -> None:
        self._slots = PersistentMapping(slots or {})
        self.parents = parents
        self.name = name

    def __getattr__(self, name: str) -> Any:
        # Reached only when the instance has no such attribute. Underscore names never delegate: pickle,
        # copy and the interpreter ask for them, and a half-loaded object must not recurse into `_slots`.
        if name.startswith("_") or name in self._own:
            raise AttributeError(name)
        found = self.lookup(name)
        if found is None:
            raise DoesNotUnderstand(
                f"{self.label} does not understand '{name}'", target=self.label, selector=name
            )
        return found[1]

    def __setattr__(self, name: str, value: Any) -> None:
        if self._p_setattr(name, value):
            return
        if name in self._own:
            super().__setattr__(name, value)
        else:
            self._slots[name] = value

    def __delattr__(self, name: str) -> None:
        if self._p_delattr(name):
            return
        try:
            del self._slots[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def oid(self) -> str:
        """16-digit hex oid; empty for an object that no transaction has committed yet."""
        return self._p_oid.hex() if self._p_oid else ""

    @property
    def label(self) -> str:
        """The object's name, or its oid where it has none."""
        return self.name or self.oid or "an object not yet committed"

    def chain(self) -> Iterator[UvmObject]:
        """Yields this object, then its parents depth first, each once; cycles are legal."""
        seen: set[int] = set()
        stack: list[UvmObject] = [self]
        while stack:
            current = stack.pop()
            if id(current) not in seen:
                seen.add(id(current))
                yield current
                stack.extend(reversed(current.parents))

    def lookup(self, name: str) -> tuple[UvmObject, Any] | None:
        """Returns the object of the chain that holds slot `name` and the slot's value, or None."""
        for owner in self.chain():
            if name in owner._slots:
                return owner, owner._slots[name]
        return None

    def methods(self) -> dict[str, UvmMethod]:
        """Returns this object's own methods by selector."""
        return {name: value for name, value in self._slots.items() if isinstance(value, UvmMethod)}

    def grants(self) -> dict[str, Grant]:
        """Returns this object's own grants by the name of their slot."""
        return {name: value for name, value in self._slots.items() if isinstance(value, Grant)}

    def grants_in_reach(self) -> dict[str, tuple[UvmObject, Grant]]:
        """Returns the grants that methods of this object can use, with their holders, by slot."""
        slots = dict.fromkeys(slot for owner in self.chain() for slot in owner.grants())
        found = {slot: self.lookup(slot) for slot in slots}
        return {slot: held for slot, held in found.items() if held and isinstance(held[1], Grant)}

    def data(self) -> dict[str, Any]:
        """Returns this object's own data slots; values are the live ones, not copies."""
        return {name: value for name, value in self._slots.items() if is_data(value)}


def is_data(value: Any) -> bool:
    """Returns whether a slot's value is plain data, which may be read, written and sent."""
    return not isinstance(value, (UvmMethod, Grant))


UvmObject._shape = {
    "_slots": a(PersistentMapping),
    "parents": tuple_of(UvmObject),
    "name": a(str, NoneType),
}
