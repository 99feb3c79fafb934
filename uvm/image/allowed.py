"""Which classes a record of the image may name: anything else raises instead of being imported.

ZODB imports whatever class a record names, which executes code of the attacker's choice; this list is the
wall. Its names are the disk format: an entry is never renamed.
"""

from __future__ import annotations

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
    "BTrees.Length": ("Length",),
    "ZODB.blob": ("Blob",),
    "builtins": ("set", "frozenset", "complex"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
}
ALLOWED = frozenset((module, name) for module, names in _NAMES.items() for name in names)


def find_class(_connection: Any, module: str, name: str) -> Any:
    """Returns the class that a record names; the `class_factory` of the database.

    Raises:
        ForbiddenClass: it is not on the list.
    """
    if (module, name) not in ALLOWED:
        raise ForbiddenClass(f"a record of the image names {module}.{name}, which is not allowed there")
    return getattr(import_module(module), name)


def foundations() -> dict[str, Any]:
    """Returns what the root of a new image holds."""
    return {"names": OOBTree(), "missions": OOBTree(), "open_missions": OOTreeSet()}
