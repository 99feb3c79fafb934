"""Shapes: what each attribute of a persistent class may hold, as `_shape` of the class. Knows no class.

Runs at each load of a record, so it is written to be quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from persistent import Persistent

Holds = Callable[[Any], bool]
Shape = dict[str, Holds]
_TEXT = {str}


def a(*kinds: type) -> Holds:
    """Holds an instance of one of these types."""
    if any(issubclass(kind, Persistent) for kind in kinds):
        return lambda value: isinstance(value, kinds) and stored((value,))
    return lambda value: isinstance(value, kinds)


def tuple_of(kind: type) -> Holds:
    """Holds a tuple of instances of this type."""

    def every(values: Iterable[Any]) -> bool:
        return all(isinstance(value, kind) for value in values) and stored(values)

    return lambda value: type(value) is tuple and (not value or every(value))


def names(value: Any) -> bool:
    """Holds a dict whose keys are strings."""
    return type(value) is dict and set(map(type, value)) <= _TEXT


def stored(values: Iterable[Any]) -> bool:
    """Returns whether each object among `values` has a record of its own, and so a shape that is checked."""
    for value in values:  # noqa: SIM110 (a generator costs as much as all the rest)
        if isinstance(value, Persistent) and value._p_oid is None:
            return False
    return True


def fits(kind: type, shape: Shape, state: Any) -> bool:
    """Returns whether a state has its class's attributes and no other; one with a default may be missing."""
    if type(state) is not dict:
        return False
    if state.keys() != shape.keys():
        missing = shape.keys() - state.keys()
        if state.keys() - shape.keys() or not all(hasattr(kind, name) for name in missing):
            return False
    for name, value in state.items():  # noqa: SIM110
        if not shape[name](value):
            return False
    return True
