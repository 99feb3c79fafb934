"""Slot values between their two forms: as the image keeps them, and plain, as the codec carries them.

The only difference is a reference: the image keeps the object itself, the codec a `Ref` to it. Both
directions copy containers, so that nobody outside a transaction holds a piece of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uvm.codec import Ref
from uvm.image.prototypes import UvmObject


def to_plain(value: Any) -> Any:
    """Returns a copy of `value` with a `Ref` for each object of the image."""
    return _map(value, UvmObject, lambda found: Ref(found.oid))


def from_plain(value: Any, find: Callable[[str], UvmObject]) -> Any:
    """Returns a copy of `value` with the object for each `Ref`.

    Raises:
        ObjectNotFound: a `Ref` to an object that is not there.
    """
    return _map(value, Ref, lambda ref: find(ref.oid))


def _map(value: Any, leaf: type, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, leaf):
        return replace(value)
    if isinstance(value, dict):
        return {_map(key, leaf, replace): _map(item, leaf, replace) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_map(item, leaf, replace) for item in value)
    return value
