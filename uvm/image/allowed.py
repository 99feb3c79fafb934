"""Which classes a record of the image may name: anything else raises instead of being imported.

ZODB imports whatever class a record names, which executes code of the attacker's choice; this list is the
wall. Its names are the disk format: an entry is never renamed.

A record may call what it is given (REDUCE) and set attributes of it (BUILD). So every entry is one of: a
persistent class, whose `__setstate__` refuses to be called on the class itself; a type of C, which can't be
changed; or, for a class written in Python, a stand-in that can't be changed either.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from typing import Any

from BTrees.OOBTree import OOBTree, OOTreeSet

from uvm.errors import ForbiddenClass

_NAMES: dict[str, tuple[str, ...]] = {
    "uvm.image.prototypes": ("UvmObject", "UvmMethod"),
    "uvm.image.grants": ("Grant",),
    "uvm.image.journal": ("MissionRow",),
    "uvm.memory.catalog": ("KnowledgeCatalog", "Chunk"),
    "persistent.mapping": ("PersistentMapping",),
    "BTrees.OOBTree": ("OOBTree", "OOBucket", "OOTreeSet", "OOSet"),
    "BTrees.IOBTree": ("IOBTree", "IOBucket"),
    "BTrees.OIBTree": ("OIBTree", "OIBucket"),
    "builtins": ("set", "frozenset", "complex"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
}


class _Maker:
    """Stands for a class written in Python: makes its instances and has nothing that could be set."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ForbiddenClass(f"a record of the image tries to set {name!r:.60} of a class")


def _fraction(*args: Any) -> Fraction:
    """Returns the fraction of two ints, or of a text without exponent, whose expansion could be endless."""
    if not all(type(arg) is int or (type(arg) is str and set(arg) <= set("-0123456789/")) for arg in args):
        raise ForbiddenClass("a record of the image makes a Fraction of what is none")
    return Fraction(*args)


_MAKERS = {("fractions", "Fraction"): _Maker(_fraction)}
ALLOWED = frozenset((module, name) for module, names in _NAMES.items() for name in names)


def find_class(_connection: Any, module: str, name: str) -> Any:
    """Returns the class that a record names; the `class_factory` of the database.

    Raises:
        ForbiddenClass: it is not on the list.
    """
    if (module, name) not in ALLOWED:
        raise ForbiddenClass(f"a record of the image names {module}.{name:.100}, which is not allowed there")
    return _MAKERS.get((module, name)) or getattr(import_module(module), name)


def foundations() -> dict[str, Any]:
    """Returns what the root of a new image holds."""
    return {"names": OOBTree(), "missions": OOBTree(), "open_missions": OOTreeSet(), "holders": OOTreeSet()}
