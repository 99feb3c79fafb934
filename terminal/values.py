"""Plain values as text: for people as Python writes them, for programs as JSON. Imports the codec only."""

from __future__ import annotations

import base64
import datetime as dt
import math
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from uvm.codec import Ref

JSON_FORMS = """\
Values that JSON lacks are maps with "$type" and "value": tuple, set, frozenset and dict (pairs) as lists,
bytes in base64, complex and timedelta as lists of numbers, float (nan, inf) and all others as text."""


def as_json(value: Any) -> Any:
    """Returns a plain value in JSON's types; what JSON lacks becomes `{"$type": …, "value": …}`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and "$type" not in value:
        return {key: as_json(item) for key, item in value.items()}
    tell = _FORMS.get(type(value), repr)
    return {"$type": type(value).__name__.casefold(), "value": tell(value)}


def _items(value: Any) -> list[Any]:
    return [as_json(item) for item in value]


_FORMS: dict[type, Callable[[Any], Any]] = {
    float: str,
    tuple: _items,
    set: lambda value: _items(sorted(value, key=repr)),
    frozenset: lambda value: _items(sorted(value, key=repr)),
    dict: lambda value: [[as_json(key), as_json(item)] for key, item in value.items()],
    bytes: lambda value: base64.b64encode(value).decode("ascii"),
    complex: lambda value: [value.real, value.imag],
    dt.datetime: dt.datetime.isoformat,
    dt.date: dt.date.isoformat,
    dt.time: dt.time.isoformat,
    dt.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    dt.timezone: str,
    Decimal: str,
    Fraction: str,
    Ref: lambda value: value.oid,
}


def as_text(value: Any) -> str:
    """Returns a value for people: a string as it is, anything else as Python writes it."""
    return printable(value if isinstance(value, str) else repr(value))


def printable(text: str) -> str:
    """Returns a text that can't steer a terminal: control characters but line end and tab are shown."""
    return "".join(c if c in "\n\t" or not _steers(c) else f"\\x{ord(c):02x}" for c in text)


def _steers(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Cs")
        or character in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"
    )
