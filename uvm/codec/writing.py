"""Plain values to MessagePack. What is written here can be read again: both sides have the same bounds."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ormsgpack
from ormsgpack import Ext

from uvm.codec.bounds import CROWDED, EXCESSIVE, MAX_OBJECTS, crammed, crowded, excessive, large
from uvm.codec.kinds import (
    BIG_INT,
    COMPLEX,
    DATE,
    DATETIME,
    DECIMAL,
    DICT,
    FRACTION,
    FROZENSET,
    MAX_DEPTH,
    NESTING,
    REF,
    SET,
    SURROGATES,
    TIME,
    TIMEDELTA,
    TIMEZONE,
    TUPLE,
    Ref,
)
from uvm.errors import ValueNotStorable

_OPTIONS = ormsgpack.OPT_PASSTHROUGH_TUPLE | ormsgpack.OPT_PASSTHROUGH_DATETIME


def encode(value: Any) -> bytes:
    """Returns the MessagePack form of a plain value.

    Raises:
        ValueNotStorable: some part is not plain, lies deeper than `MAX_DEPTH`, or is more than `decode`
            would read; `path` says which.
    """
    try:
        data: bytes = ormsgpack.packb(_flat(value, 0), option=_OPTIONS)
        if crammed(data, NESTING):
            raise _NotPlain(f"more than {MAX_OBJECTS:,} parts", type(value).__name__)
        return data
    except _NotPlain as error:
        path = "value" + "".join(reversed(error.path))
        raise ValueNotStorable(f"{path}: {error.reason}", path=path, type=error.kind) from None


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
    return Ext(BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _flat_str(value: str, depth: int) -> Any:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, as os.fsdecode makes them
        return Ext(SURROGATES, value.encode("utf-8", "surrogatepass"))
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
    if crowded(value):
        raise _NotPlain(CROWDED, type(value).__name__)
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
    if crowded(value):
        raise _NotPlain(CROWDED, "dict")
    return _ext(DICT, [list(pair) for pair in pairs])


def _flat_timezone(value: dt.timezone, depth: int = 0) -> Ext:
    offset = value.utcoffset(None)
    name = value.tzname(None)
    named = name != dt.timezone(offset).tzname(None)
    return _ext(TIMEZONE, [offset.days, offset.seconds, offset.microseconds, name if named else None])


def _zone(zone: dt.tzinfo | None) -> Any:
    if zone is None:
        return None
    if type(zone) is not dt.timezone:
        raise _NotPlain("a datetime with a named zone (use a fixed offset, or UTC)", type(zone).__name__)
    return _flat_timezone(zone)


def _flat_datetime(value: dt.datetime, depth: int) -> Ext:
    parts = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return _ext(DATETIME, [*parts, value.fold, _zone(value.tzinfo)])


def _flat_time(value: dt.time, depth: int) -> Ext:
    parts = [value.hour, value.minute, value.second, value.microsecond]
    return _ext(TIME, [*parts, value.fold, _zone(value.tzinfo)])


def _flat_decimal(value: Decimal, depth: int) -> Ext:
    text = str(value)
    if "E" in text and excessive(value):
        raise _NotPlain(EXCESSIVE, "Decimal")
    return Ext(DECIMAL, text.encode())


def _flat_fraction(value: Fraction, depth: int) -> Ext:
    numerator, denominator = value.numerator, value.denominator
    if large(numerator, denominator):
        raise _NotPlain(EXCESSIVE, "Fraction")
    return _ext(FRACTION, [_flat_int(numerator, depth), _flat_int(denominator, depth)])


_FLATTEN: dict[type, Callable[[Any, int], Any]] = {
    type(None): _same,
    bool: _same,
    float: _same,
    bytes: _same,
    int: _flat_int,
    str: _flat_str,
    list: _flat_items,
    dict: _flat_dict,
    complex: lambda value, depth: _ext(COMPLEX, [value.real, value.imag]),
    tuple: lambda value, depth: _ext(TUPLE, _flat_items(value, depth)),
    set: lambda value, depth: _ext(SET, _flat_set(value, depth)),
    frozenset: lambda value, depth: _ext(FROZENSET, _flat_set(value, depth)),
    dt.datetime: _flat_datetime,
    dt.date: lambda value, depth: _ext(DATE, [value.year, value.month, value.day]),
    dt.time: _flat_time,
    dt.timedelta: lambda value, depth: _ext(TIMEDELTA, [value.days, value.seconds, value.microseconds]),
    dt.timezone: _flat_timezone,
    Decimal: _flat_decimal,
    Fraction: _flat_fraction,
    Ref: lambda value, depth: Ext(REF, value.oid.encode()),
}
