"""Plain values to MessagePack and back, without loss: for the wire, for hands, for the checks of the image.

A *plain value* is None, bool, int of any size, float, complex, str, bytes, list, tuple, set, frozenset,
dict, date, time, datetime (naive or with a fixed offset), timedelta, timezone, Decimal, Fraction, or a
`Ref` to an object of the image. Types are exact: a subclass (a `Counter`, a named tuple) is refused, since
it could not come back as what it was. What MessagePack lacks travels as an extension; `docs/PROTOCOL.md`
lists the codes. Runs inside hands too, so it needs nothing but `ormsgpack` and `uvm.errors`.
"""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ormsgpack
from ormsgpack import Ext

from uvm.errors import MalformedMessage, ValueNotStorable

MAX_DEPTH = 64

_BIG_INT, _COMPLEX, _TUPLE, _SET, _FROZENSET, _DICT = 1, 2, 3, 4, 5, 6
_DATETIME, _DATE, _TIME, _TIMEDELTA, _TIMEZONE = 7, 8, 9, 10, 11
_DECIMAL, _FRACTION, REF, _SURROGATES = 12, 13, 14, 15

_CONTAINERS = frozenset({list, tuple, set, frozenset})
_OPTIONS = ormsgpack.OPT_PASSTHROUGH_TUPLE | ormsgpack.OPT_PASSTHROUGH_DATETIME
_SENTINEL = os.urandom(16)
_TAIL = b"\xc4\x10" + _SENTINEL


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to an object of the image: its 16-digit hex oid, or `new:N` for one not yet committed."""

    oid: str


def encode(value: Any) -> bytes:
    """Returns the MessagePack form of a plain value.

    Raises:
        ValueNotStorable: some part is not plain, or lies deeper than `MAX_DEPTH`; `path` says which.
    """
    try:
        return ormsgpack.packb(_flat(value, 0), option=_OPTIONS)
    except _NotPlain as error:
        path = "value" + "".join(reversed(error.path))
        raise ValueNotStorable(f"{path}: {error.reason}", path=path, type=error.kind) from None


def decode(data: bytes) -> Any:
    """Returns the plain value that `encode` wrote; accepts exactly one value and nothing after it.

    Raises:
        MalformedMessage: not MessagePack, trailing bytes, an unknown extension, or too deep.
    """
    try:
        # ormsgpack ignores what follows the first value. Inside a pair whose second half is a secret,
        # anything but exactly one value moves the secret and shows.
        value, tail = ormsgpack.unpackb(b"\x92" + data + _TAIL, ext_hook=_from_ext)
    except (ValueError, TypeError, RecursionError, OverflowError, ArithmeticError) as error:
        raise MalformedMessage(f"not a plain value: {error.__cause__ or error}") from None
    if type(tail) is not bytes or tail != _SENTINEL:
        raise MalformedMessage("bytes follow the end of the value")
    _check_depth(value, 0)
    return value


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


class _NotPlain(Exception):
    def __init__(self, reason: str, kind: str) -> None:
        self.reason, self.kind = reason, kind
        self.path: list[str] = []


def _flat(value: Any, depth: int) -> Any:
    """Returns `value` as a tree of what MessagePack has, with `Ext` for the rest."""
    flatten = _FLATTEN.get(type(value))
    if flatten is None:
        name = type(value).__name__
        raise _NotPlain(f"a {name} is not plain data (use a list, dict, str, number …)", name)
    if depth > MAX_DEPTH:
        raise _NotPlain(f"nested deeper than {MAX_DEPTH} levels", type(value).__name__)
    return flatten(value, depth)


def _ext(code: int, value: Any) -> Ext:
    return Ext(code, ormsgpack.packb(value, option=_OPTIONS))


def _same(value: Any, depth: int) -> Any:
    return value


def _flat_int(value: int, depth: int) -> Any:
    if -(2**63) <= value < 2**64:
        return value
    return Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _flat_str(value: str, depth: int) -> Any:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, as os.fsdecode makes them
        return Ext(_SURROGATES, value.encode("utf-8", "surrogatepass"))
    return value


def _flat_items(values: Any, depth: int) -> list[Any]:
    flat = []
    for index, item in enumerate(values):
        try:
            flat.append(_flat(item, depth + 1))
        except _NotPlain as error:
            error.path.append(f"[{index}]")
            raise
    return flat


def _flat_set(value: Any, depth: int) -> list[Any]:
    packed = sorted(ormsgpack.packb(item, option=_OPTIONS) for item in _flat_items(value, depth))
    return [ormsgpack.Fragment(item) for item in packed]  # sorted: equal sets have equal bytes


def _flat_dict(value: dict[Any, Any], depth: int) -> Any:
    pairs = []
    for key, item in value.items():
        try:
            pairs.append((_flat(key, depth + 1), _flat(item, depth + 1)))
        except _NotPlain as error:
            error.path.append(f"[{key!r:.40}]")
            raise
    if all(type(key) is str for key, _ in pairs):
        return dict(pairs)
    return _ext(_DICT, [list(pair) for pair in pairs])


def _flat_timezone(value: dt.timezone, depth: int = 0) -> Ext:
    offset = value.utcoffset(None)
    name = value.tzname(None)
    named = name != dt.timezone(offset).tzname(None)
    return _ext(_TIMEZONE, [offset.days, offset.seconds, offset.microseconds, name if named else None])


def _zone(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is not dt.timezone:
        raise _NotPlain("a datetime with a named zone (use a fixed offset, or UTC)", type(zone).__name__)
    return _flat_timezone(zone)


def _flat_datetime(value: dt.datetime, depth: int) -> Ext:
    parts = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return _ext(_DATETIME, [*parts, value.fold, _zone(value.tzinfo)])


def _flat_time(value: dt.time, depth: int) -> Ext:
    parts = [value.hour, value.minute, value.second, value.microsecond]
    return _ext(_TIME, [*parts, value.fold, _zone(value.tzinfo)])


_FLATTEN: dict[type, Callable[[Any, int], Any]] = {
    type(None): _same,
    bool: _same,
    float: _same,
    bytes: _same,
    int: _flat_int,
    str: _flat_str,
    list: _flat_items,
    dict: _flat_dict,
    complex: lambda value, depth: _ext(_COMPLEX, [value.real, value.imag]),
    tuple: lambda value, depth: _ext(_TUPLE, _flat_items(value, depth)),
    set: lambda value, depth: _ext(_SET, _flat_set(value, depth)),
    frozenset: lambda value, depth: _ext(_FROZENSET, _flat_set(value, depth)),
    dt.datetime: _flat_datetime,
    dt.date: lambda value, depth: _ext(_DATE, [value.year, value.month, value.day]),
    dt.time: _flat_time,
    dt.timedelta: lambda value, depth: _ext(_TIMEDELTA, [value.days, value.seconds, value.microseconds]),
    dt.timezone: _flat_timezone,
    Decimal: lambda value, depth: Ext(_DECIMAL, str(value).encode()),
    Fraction: lambda value, depth: _ext(
        _FRACTION, [_flat_int(value.numerator, depth), _flat_int(value.denominator, depth)]
    ),
    Ref: lambda value, depth: Ext(REF, value.oid.encode()),
}


def _from_ext(code: int, payload: bytes) -> Any:
    """Returns the value of one extension; ormsgpack turns what it raises into a ValueError."""
    build = _BUILD.get(code)
    if build is None:
        raise ValueError(f"unknown extension {code}")
    return build(payload)


def _inner(payload: bytes) -> Any:
    value, tail = ormsgpack.unpackb(b"\x92" + payload + _TAIL, ext_hook=_from_ext)
    if tail != _SENTINEL:
        raise ValueError("bytes follow the end of an extension")
    return value


def _build_timezone(payload: bytes) -> dt.timezone:
    days, seconds, microseconds, name = _inner(payload)
    offset = dt.timedelta(days, seconds, microseconds)
    return dt.timezone(offset) if name is None else dt.timezone(offset, name)


def _build_datetime(payload: bytes) -> dt.datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = _inner(payload)
    return dt.datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)


def _build_time(payload: bytes) -> dt.time:
    hour, minute, second, microsecond, fold, zone = _inner(payload)
    return dt.time(hour, minute, second, microsecond, zone, fold=fold)


def _build_ref(payload: bytes) -> Ref:
    oid = payload.decode("ascii")
    if not is_oid(oid) and not (oid.startswith("new:") and oid[4:].isdecimal()):
        raise ValueError("a reference must name a 16-digit hex oid")
    return Ref(oid)


def is_oid(text: str) -> bool:
    """Returns whether `text` has the form of an object's oid: 16 lower-case hexadecimal digits."""
    return len(text) == 16 and set(text) <= set("0123456789abcdef")


_BUILD: dict[int, Callable[[bytes], Any]] = {
    _BIG_INT: lambda payload: int.from_bytes(payload, "big", signed=True),
    _COMPLEX: lambda payload: complex(*_inner(payload)),
    _TUPLE: lambda payload: tuple(_inner(payload)),
    _SET: lambda payload: set(_inner(payload)),
    _FROZENSET: lambda payload: frozenset(_inner(payload)),
    _DICT: lambda payload: dict(_inner(payload)),
    _DATETIME: _build_datetime,
    _DATE: lambda payload: dt.date(*_inner(payload)),
    _TIME: _build_time,
    _TIMEDELTA: lambda payload: dt.timedelta(*_inner(payload)),
    _TIMEZONE: _build_timezone,
    _DECIMAL: lambda payload: Decimal(payload.decode("ascii")),
    _FRACTION: lambda payload: Fraction(*_inner(payload)),
    REF: _build_ref,
    _SURROGATES: lambda payload: payload.decode("utf-8", "surrogatepass"),
}


def _check_depth(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise MalformedMessage(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                _check_depth(key, depth + 1)
            _check_depth(item, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _check_depth(item, depth + 1)
