"""Walks over plain values: what they refer to, whether two of them are equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from uvm.codec.kinds import Ref

_CONTAINERS = frozenset({list, tuple, set, frozenset})


def references(value: Any) -> Iterator[str]:
    """Yields the oid of each `Ref` in a plain value, keys included."""
    stack = [value]
    while stack:
        part = stack.pop()
        kind = type(part)
        if kind is Ref:
            yield part.oid
        elif kind is dict:
            stack.extend(part)
            stack.extend(part.values())
        elif kind in _CONTAINERS:
            stack.extend(part)


def matches(expected: Any, got: Any) -> bool:
    """Returns whether two plain values are equal: types of containers count, floats within 1e-9."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return expected is got
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        if isinstance(expected, float) or isinstance(got, float):
            return _close(expected, got)
        return expected == got
    if type(expected) is not type(got):
        return False
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(got) and all(map(matches, expected, got))
    if isinstance(expected, dict):
        return expected.keys() == got.keys() and all(matches(expected[key], got[key]) for key in expected)
    return bool(expected == got)


def _close(one: float, other: float) -> bool:
    try:
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9) or (one != one and other != other)
    except OverflowError:  # an int too large for a float
        return one == other
