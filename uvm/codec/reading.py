"""MessagePack to plain values. Whoever wrote the bytes may be hostile, so what they may cost is bounded.

Extensions that hold further values are unpacked one level after the other, so that depth is known before the
next level is read: nested calls of the unpacker would exhaust the stack.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ormsgpack

from uvm.codec.bounds import CROWDED, EXCESSIVE, MAX_OBJECTS, crammed, crowded, excessive, large, numerous
from uvm.codec.kinds import (
    BIG_INT,
    COMPLEX,
    DATE,
    DATETIME,
    DECIMAL,
    DICT,
    FRACTION,
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
    is_oid,
)
from uvm.errors import MalformedMessage

_REFUSALS = (ValueError, TypeError, RecursionError, OverflowError, ArithmeticError)
_SENTINEL = os.urandom(16)
_TAIL = b"\xc4\x10" + _SENTINEL


def decode(data: bytes) -> Any:
    """Returns the plain value that `encode` wrote; accepts exactly one value and nothing after it.

    Raises:
        MalformedMessage: not MessagePack, trailing bytes, an unknown extension, too deep, or a value that
            would cost more to read than its bytes are worth (`uvm.codec.bounds`).
    """
    try:
        if crammed(data, NESTING):
            raise ValueError(f"more than {MAX_OBJECTS:,} parts")
        return _built(_unpacked(data, _from_ext), 0)
    except _REFUSALS as error:
        raise MalformedMessage(f"not a plain value: {error}") from None


def exceeds(data: bytes, most: int) -> bool:
    """Returns whether encoded data holds more than `most` values, found out without reading it."""
    return numerous(data, most, NESTING)


@dataclass(slots=True)
class _Pending:
    """An extension that holds further values. They are read later, when it is known how deep they lie."""

    code: int
    payload: bytes


@dataclass(slots=True)
class _Broken:
    """An extension without a value."""

    reason: str


def _from_ext(code: int, payload: bytes) -> Any:
    """Returns the value of one extension, or why there is none, since ormsgpack drops what a hook raises."""
    if code in NESTING:
        return _Pending(code, payload)
    build = _BUILD.get(code)
    if build is None:
        return _Broken(f"unknown extension {code}")
    try:
        return build(payload)
    except _REFUSALS as error:
        return _Broken(str(error))


def _only(expected: int) -> Callable[[int, bytes], Any]:
    """Returns the hook for an extension in whose payload one other kind may be."""

    def hook(code: int, payload: bytes) -> Any:
        if code != expected:
            raise ValueError(f"extension {code} inside of another one")
        return _BUILD[code](payload)

    return hook


def _unpacked(data: bytes, hook: Callable[[int, bytes], Any] | None = None) -> Any:
    # ormsgpack ignores what follows the first value. Inside a pair whose second half is a secret, anything
    # but exactly one value moves the secret and shows.
    value, tail = ormsgpack.unpackb(b"\x92" + data + _TAIL, ext_hook=hook)
    if type(tail) is not bytes or tail != _SENTINEL:
        raise ValueError("bytes follow the end of the value")
    return value


def _built(value: Any, depth: int) -> Any:
    """Returns what was unpacked, with the values of its pending extensions."""
    kind = type(value)
    if kind not in _DEEP:
        return value
    if kind is _Pending:
        return _build_nested(value, depth)
    if kind is _Broken:
        raise ValueError(value.reason)
    if depth == MAX_DEPTH and value:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if kind is list:
        return _build_items(value, depth)
    for key, item in value.items():
        if type(item) in _DEEP:
            value[key] = _built(item, depth + 1)
    return value


def _build_items(items: list[Any], depth: int) -> list[Any]:
    for index, item in enumerate(items):
        if type(item) in _DEEP:
            items[index] = _built(item, depth + 1)
    return items


def _build_nested(pending: _Pending, depth: int) -> Any:
    items = _unpacked(pending.payload, _from_ext)
    pending.payload = b""  # or each level of nesting would hold a copy of all those below it
    if type(items) is not list:
        raise ValueError("an extension without items")
    if depth == MAX_DEPTH and items:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if pending.code == DICT:
        keys = _build_items([key for key, _ in items], depth)
        return dict(zip(_spread(keys), _build_items([item for _, item in items], depth), strict=True))
    built = _build_items(items, depth)
    if pending.code == TUPLE:
        return tuple(built)
    return set(_spread(built)) if pending.code == SET else frozenset(_spread(built))


def _spread(keys: list[Any]) -> list[Any]:
    if crowded(keys):
        raise ValueError(CROWDED)
    return keys


def _build_timezone(payload: bytes) -> dt.timezone:
    days, seconds, microseconds, name = _unpacked(payload)
    offset = dt.timedelta(days, seconds, microseconds)
    return dt.timezone(offset) if name is None else dt.timezone(offset, name)


def _build_datetime(payload: bytes) -> dt.datetime:
    year, month, day, hour, minute, second, microsecond, fold, zone = _unpacked(payload, _only(TIMEZONE))
    return dt.datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)


def _build_time(payload: bytes) -> dt.time:
    hour, minute, second, microsecond, fold, zone = _unpacked(payload, _only(TIMEZONE))
    return dt.time(hour, minute, second, microsecond, zone, fold=fold)


def _build_decimal(payload: bytes) -> Decimal:
    text = payload.decode("ascii")
    number = Decimal(text)
    if "E" in text.upper() and excessive(number):
        raise ValueError(EXCESSIVE)
    return number


def _build_fraction(payload: bytes) -> Fraction:
    numerator, denominator = _unpacked(payload, _only(BIG_INT))
    if large(numerator, denominator):
        raise ValueError(EXCESSIVE)
    return Fraction(numerator, denominator)


def _build_ref(payload: bytes) -> Ref:
    oid = payload.decode("ascii")
    if not is_oid(oid) and not (oid.startswith("new:") and oid[4:].isdecimal()):
        raise ValueError("a reference must name a 16-digit hex oid")
    return Ref(oid)


_BUILD: dict[int, Callable[[bytes], Any]] = {
    BIG_INT: lambda payload: int.from_bytes(payload, "big", signed=True),
    COMPLEX: lambda payload: complex(*_unpacked(payload)),
    DATETIME: _build_datetime,
    DATE: lambda payload: dt.date(*_unpacked(payload)),
    TIME: _build_time,
    TIMEDELTA: lambda payload: dt.timedelta(*_unpacked(payload)),
    TIMEZONE: _build_timezone,
    DECIMAL: _build_decimal,
    FRACTION: _build_fraction,
    REF: _build_ref,
    SURROGATES: lambda payload: payload.decode("utf-8", "surrogatepass"),
}


_DEEP = frozenset({list, dict, _Pending, _Broken})
