"""What `self` is inside a hand: its attributes are the slots and methods of an object of the image.

A proxy holds nothing but its oid and the session that answers for it, and an attribute of it is never one
of Python's own: `self.__dict__` or `self.__class__` are misses. Runs in the child; imports the codec alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from uvm.codec import Ref


class Objects(Protocol):
    """Who answers for proxies: `uvm.hands.session.Session`."""

    def read(self, oid: str, name: str) -> Any: ...
    def write(self, oid: str, name: str, value: Any) -> None: ...
    def delete(self, oid: str, name: str) -> None: ...
    def label(self, oid: str) -> str: ...


class Proxy:
    """An object of the image, as a method sees it; two proxies are equal if they stand for one object."""

    __slots__ = ("_objects", "_oid")

    def __init__(self, objects: Objects, oid: str) -> None:
        object.__setattr__(self, "_objects", objects)
        object.__setattr__(self, "_oid", oid)

    def __getattribute__(self, name: str) -> Any:
        return _objects(self).read(oid_of(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        _objects(self).write(oid_of(self), name, value)

    def __delattr__(self, name: str) -> None:
        _objects(self).delete(oid_of(self), name)

    def __eq__(self, other: object) -> bool:
        return type(other) is Proxy and oid_of(self) == oid_of(other)

    def __hash__(self) -> int:
        return hash(oid_of(self))

    def __repr__(self) -> str:
        return f"<{_objects(self).label(oid_of(self))}>"


# The slots' own readers: `proxy._oid` itself would ask the session for a slot of that name.
oid_of: Callable[[Proxy], str] = Proxy.__dict__["_oid"].__get__
_objects: Callable[[Proxy], Objects] = Proxy.__dict__["_objects"].__get__


def to_refs(value: Any, name: Callable[[str], str] = str) -> Any:
    """Returns `value` with a `Ref` to `name(oid)` in place of each proxy, nested ones included."""
    return _swap(value, Proxy, lambda proxy: Ref(name(oid_of(proxy))))


def to_proxies(value: Any, proxy: Callable[[str], Proxy]) -> Any:
    """Returns `value` with `proxy(oid)` in place of each `Ref`, nested ones included."""
    return _swap(value, Ref, lambda ref: proxy(ref.oid))


def _swap(value: Any, leaf: type, replace: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if kind is leaf:
        return replace(value)
    if kind is dict:
        return {_swap(key, leaf, replace): _swap(item, leaf, replace) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        return kind([_swap(item, leaf, replace) for item in value])
    return value
