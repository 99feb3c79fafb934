"""The other places where ZODB reads pickles: `class_factory` is asked in none of them.

Stock ZODB imports and calls whatever these name: when a conflict is resolved (an `undo` reads records that
no connection ever loaded), when transactions are listed for an `undo`, and when the index beside an image
file is read at opening. Here each gets the allow-list, or plain data only. The undo log of RelStorage is read
by a loader of its own, which is not among them.
"""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from typing import Any

from ZODB import _compat
from ZODB.ConflictResolution import BadClassName

from uvm.errors import ForbiddenClass
from uvm.image import allowed


def _find_for_conflict(module: str, name: str) -> Any:
    try:
        return allowed.find_class(None, module, name)
    except ForbiddenClass as error:
        raise BadClassName(str(error)) from None  # ends as a conflict


class _PlainUnpickler(_compat.Unpickler):
    """Reads plain data; no class, no function, no extension code."""

    def find_class(self, modulename: str, name: str) -> Any:
        raise ForbiddenClass(f"plain data names {modulename}.{name:.100}")


def _plain_extension(data: bytes) -> dict[str, Any]:
    """Returns what a transaction carries beside its note; ZODB takes it for a dict unseen."""
    extension = _PlainUnpickler(BytesIO(data)).load()
    return extension if type(extension) is dict else {}


_REPLACED = {
    ("ZODB.ConflictResolution", "find_global"): _find_for_conflict,
    ("ZODB.FileStorage.FileStorage", "loads"): _plain_extension,
    ("ZODB.Connection", "loads"): _plain_extension,
    ("ZODB.fsIndex", "Unpickler"): _PlainUnpickler,
    ("ZODB.utils", "Unpickler"): _PlainUnpickler,
}


def defuse() -> None:
    """Replaces them in ZODB's own modules, since storages of every kind take them from there.

    Raises:
        AttributeError: this ZODB has no such place: it is not the one that was looked into.
    """
    for (module_name, name), replacement in _REPLACED.items():
        module = import_module(module_name)
        getattr(module, name)
        setattr(module, name, replacement)
