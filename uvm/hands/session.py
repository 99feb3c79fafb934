"""The objects of one run: what a method reads, writes and makes, until the hand hands in its write set.

Reading looks in the object and then through its parents, depth first, each once. A slot is decoded when it
is first read and keeps its identity from then on, so that `self.items.append(x)` is seen. Nothing leaves the
hand but what `writes` returns: the real changes of objects that said `_p_changed = True`. Runs in the child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

from uvm import codec
from uvm.capabilities import KINDS, missing
from uvm.errors import DoesNotUnderstand, ValueNotStorable
from uvm.hands.facades import Facade
from uvm.hands.methods import compiled
from uvm.hands.natives import NATIVES, RESERVED, filename, is_public
from uvm.hands.proxy import Proxy, to_proxies, to_refs

Ask = Callable[[str, Any], Any]  # kind and payload of a question to the pool -> the answer's payload


@dataclass(slots=True)
class Thing:
    """One object as this run sees it.

    Attributes:
        code: bytecode of methods that were compiled before, by selector.
        grants: kinds of its own grants, by slot.
        stored: encoded values as the image has them; None for a large one not asked for yet.
        values: what was read or assigned in this run.
        kept: whether the method said `_p_changed = True`.
    """

    oid: str
    name: str | None
    parents: tuple[str, ...]
    methods: dict[str, str]
    code: dict[str, bytes]
    stored: dict[str, bytes | None]
    grants: dict[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    kept: bool = False

    def has(self, slot: str) -> bool:
        """Returns whether the object itself holds data slot `slot` now."""
        return slot in self.values or (slot in self.stored and slot not in self.deleted)


def _thing(oid: str, view: dict[str, Any]) -> Thing:
    stored = view["slots"] | dict.fromkeys(view["large"])
    grants = view.get("grants", {})
    return Thing(oid, view["name"], tuple(view["parents"]), view["methods"], view["code"], stored, grants)


class Session:
    """Answers for every proxy of one run.

    Args:
        ask: puts a question to the pool.
        views: oid -> view of the target and its delegation chain.
        target: oid of the receiver of the call.
        overlay: selector -> source; shadows what `views` says of the target.
    """

    def __init__(self, ask: Ask, views: dict[str, Any], target: str, overlay: Mapping[str, str]) -> None:
        self._ask = ask
        self._things = {oid: _thing(oid, view) for oid, view in views.items()}
        for selector in overlay:
            self._things[target].code.pop(selector, None)
        self._things[target].methods.update(overlay)
        self._proxies: dict[str, Proxy] = {}
        self._created: dict[str, Thing] = {}  # by name
        self._natives: dict[str, Callable[..., Any]]
        self._natives = {"clone": self._clone, "selectors": self._selectors, "understands": self._understands}

    def proxy(self, oid: str) -> Proxy:
        """Returns the one proxy of this run for object `oid`."""
        found = self._proxies.get(oid)
        if found is None:
            found = self._proxies[oid] = Proxy(self, oid)
        return found

    def label(self, oid: str) -> str:
        """Returns the object's name, or its oid where it has none."""
        return self._thing(oid).name or oid

    def origin(self, oid: str) -> str:
        """Returns `oid`, or for an object made in this run the stored one that it descends from."""
        while oid.startswith("new:"):
            [oid] = self._thing(oid).parents
        return oid

    def read(self, oid: str, name: str) -> Any:
        """Returns a slot's value, a bound method, a grant or a bound native.

        Raises:
            AttributeError: an underscore name.
            GrantMissing: the name of a kind of grants, and nobody in the delegation chain has it.
            DoesNotUnderstand: nobody in the delegation chain has it.
        """
        thing = self._things.get(oid)
        if thing is not None and name in thing.values and name not in thing.methods:
            return thing.values[name]
        if name.startswith("_"):
            raise AttributeError(f"'{name}' is out of reach: a method uses no names with an underscore")
        owner = self._owner(oid, name)
        if owner is not None:
            return self._held(owner, name, oid)
        if name in NATIVES:
            return partial(self._natives[name], oid)
        if name in KINDS:
            raise missing(self.label(oid), self.origin(oid), name)
        if not is_public(name):
            raise AttributeError(f"'{name:.40}' can't be a slot's or a method's name")
        raise DoesNotUnderstand(
            f"{self.label(oid)} does not understand '{name}'", target=self.origin(oid), selector=name
        )

    def write(self, oid: str, name: str, value: Any) -> None:
        """Assigns a data slot of the object itself; `_p_changed = True` keeps its changes.

        Raises:
            AttributeError: the name belongs to a method, a grant or a native, or can't be a slot's.
        """
        thing = self._thing(oid)
        if name == "_p_changed" and value is True:
            thing.kept = True
            return
        if not thing.has(name):
            self._check_free(oid, name)
        thing.values[name] = value
        thing.deleted.discard(name)

    def delete(self, oid: str, name: str) -> None:
        """Deletes a data slot of the object itself.

        Raises:
            AttributeError: it has no such slot.
        """
        thing = self._thing(oid)
        if not thing.has(name):
            raise AttributeError(f"{self.label(oid)} has no slot '{name}' of its own to delete")
        thing.values.pop(name, None)
        thing.deleted.add(name)

    def encoded(self, value: Any, what: str) -> bytes:
        """Returns the bytes of a plain value in which proxies stand for references.

        Args:
            what: what the value is, for the error's text: "the result", "counter_obj.items".

        Raises:
            ValueNotStorable: some part is not plain data.
        """
        try:
            return codec.encode(value)
        except ValueNotStorable as error:
            if error.details["type"] != Proxy.__name__:
                raise _not_plain(what, error) from None
        try:
            return codec.encode(to_refs(value))
        except ValueNotStorable as error:
            raise _not_plain(what, error) from None

    def writes(self) -> dict[str, list[Any]]:
        """Returns oid -> [{slot: encoded value}, [deleted slot]] of what is to be kept.

        Raises:
            ValueNotStorable: a slot to be kept is no plain data.
        """
        kept = ((thing.oid, self._changes(thing)) for thing in self._things.values() if thing.kept)
        return {oid: changes for oid, changes in kept if any(changes)}

    def created(self) -> list[list[Any]]:
        """Returns [oid, name, parents] of each object made by `clone`, in the order of their making."""
        return [[thing.oid, thing.name, list(thing.parents)] for thing in self._created.values()]

    def discarded(self) -> dict[str, list[str]]:
        """Returns oid -> slots that were changed on objects that never said `_p_changed = True`."""
        lost = ((thing.oid, self._lost(thing)) for thing in self._things.values() if not thing.kept)
        return {oid: slots for oid, slots in lost if slots}

    def _thing(self, oid: str) -> Thing:
        found = self._things.get(oid)
        if found is None:
            view = self._ask("view", oid)
            if view is None:
                raise ReferenceError(f"object {oid} is no longer in the image")
            found = self._things[oid] = _thing(oid, view)
        return found

    def _chain(self, oid: str) -> Iterator[Thing]:
        seen: set[str] = set()
        stack = [oid]
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                thing = self._thing(current)
                yield thing
                stack.extend(reversed(thing.parents))

    def _owner(self, oid: str, name: str) -> Thing | None:
        for thing in self._chain(oid):
            if name in thing.methods or name in thing.grants or thing.has(name):
                return thing
        return None

    def _held(self, owner: Thing, name: str, receiver: str) -> Any:
        if name in owner.methods:
            return self._method(owner, name, receiver)
        if name in owner.grants:
            return Facade(owner.grants[name], f"self.{name}", partial(self._use, owner.oid, name))
        return self._value(owner, name)

    def _use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        answer: dict[str, Any] = self._ask("use", [holder, slot, verb, args, kwargs])
        return answer

    def _method(self, owner: Thing, selector: str, receiver: str) -> MethodType:
        file = filename(owner.name or owner.oid, selector)
        function = compiled(owner.methods[selector], selector, file, owner.code.get(selector))
        return MethodType(function, self.proxy(receiver))

    def _value(self, thing: Thing, slot: str) -> Any:
        if slot not in thing.values:
            data = thing.stored[slot]
            if data is None:
                data = thing.stored[slot] = self._ask("slot", [thing.oid, slot])
            thing.values[slot] = to_proxies(codec.decode(data), self.proxy)
        return thing.values[slot]

    def _check_free(self, oid: str, name: str) -> None:
        """Raises AttributeError unless `name` can become a data slot of the object."""
        if not is_public(name):
            raise AttributeError(
                f"'{name:.40}' can't be a slot; the one underscore line is `_p_changed = True`"
            )
        owner = self._owner(oid, name)
        if owner is not None and name in owner.methods:
            raise AttributeError(f"'{name}' is a method of {self.label(owner.oid)}: choose another slot name")
        if owner is not None and name in owner.grants:
            raise AttributeError(f"'{name}' is a grant of {self.label(owner.oid)}: choose another slot name")
        if name in RESERVED:
            raise AttributeError(f"'{name}' can't be changed by a method: choose another slot name")
        if owner is None and name in NATIVES:
            raise AttributeError(f"every object understands '{name}' by nature: choose another slot name")

    def _changes(self, thing: Thing) -> list[Any]:
        label = self.label(thing.oid)
        now = {slot: self.encoded(value, f"{label}.{slot}") for slot, value in thing.values.items()}
        changed = {slot: data for slot, data in now.items() if data != thing.stored.get(slot)}
        return [changed, sorted(thing.deleted & thing.stored.keys())]

    def _lost(self, thing: Thing) -> list[str]:
        lost = {slot for slot, value in thing.values.items() if self._differs(thing, slot, value)}
        return sorted(lost | thing.deleted & thing.stored.keys())

    def _differs(self, thing: Thing, slot: str, value: Any) -> bool:
        try:
            return self.encoded(value, slot) != thing.stored.get(slot)
        except ValueNotStorable:
            return True

    def _clone(self, oid: str, name: str) -> Proxy:
        if not is_public(name) or codec.is_oid(name):
            raise ValueError(
                f"an object's name is an identifier without leading underscore, not {name!r:.40}"
            )
        if name in self._created or self._ask("taken", name):
            raise ValueError(f"another object has the name '{name}'")
        thing = Thing(f"new:{len(self._created) + 1}", name, (oid,), {}, {}, {}, {}, kept=True)
        self._created[name] = self._things[thing.oid] = thing
        return self.proxy(thing.oid)

    def _selectors(self, oid: str) -> list[str]:
        held = {selector for thing in self._chain(oid) for selector in thing.methods}
        return sorted(held | NATIVES.keys())

    def _understands(self, oid: str, selector: str) -> bool:
        return selector in self._selectors(oid)


def _not_plain(what: str, error: ValueNotStorable) -> ValueNotStorable:
    path = what + error.details["path"].removeprefix("value")
    reason = error.message.removeprefix(error.details["path"])
    return ValueNotStorable(path + reason, path=path, type=error.details["type"])
