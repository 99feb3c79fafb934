"""What reading and writing share: the extension codes, which are the wire format, and references."""

from __future__ import annotations

from dataclasses import dataclass

MAX_DEPTH = 64

BIG_INT, COMPLEX, TUPLE, SET, FROZENSET, DICT = 1, 2, 3, 4, 5, 6
DATETIME, DATE, TIME, TIMEDELTA, TIMEZONE = 7, 8, 9, 10, 11
DECIMAL, FRACTION, REF, SURROGATES = 12, 13, 14, 15

NESTING = frozenset({TUPLE, SET, FROZENSET, DICT})  # extensions that hold further values


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to an object of the image: its 16-digit hex oid, or `new:N` for one not yet committed."""

    oid: str


def is_oid(text: str) -> bool:
    """Returns whether `text` has the form of an object's oid: 16 lower-case hexadecimal digits."""
    return len(text) == 16 and set(text) <= set("0123456789abcdef")
