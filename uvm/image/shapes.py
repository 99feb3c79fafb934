"""Shapes: what each attribute of a persistent class may hold, as `_shape` of the class. Knows no class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from persistent import Persistent

Holds = Callable[[Any], bool]
Shape = dict[str, Holds]


def a(*kinds: type) -> Holds:
    """Holds an instance of one of these types."""
    return lambda value: isinstance(value, kinds) and stored((value,))


def tuple_of(kind: type) -> Holds:
    """Holds a tuple of instances of this type."""
    return lambda value: (
        type(value) is tuple and all(isinstance(item, kind) for item in value) and stored(value)
    )


def names(value: Any) -> bool:
    """Holds a dict whose keys are strings."""
    return type(value) is dict and all(type(key) is str for key in value)


def stored(values: Iterable[Any]) -> bool:
    """Returns whether each object among `values` has a record of its own, and so a shape that is checked."""
    return all(not isinstance(value, Persistent) or value._p_oid is not None for value in values)


def fits(kind: type, shape: Shape, state: Any) -> bool:
    """Returns whether a state has its class's attributes and no other; one with a default may be missing."""
    if type(state) is not dict or state.keys() - shape.keys():
        return False
    return all(holds(state[name]) if name in state else hasattr(kind, name) for name, holds in shape.items())
