"""What bounds the cost of reading bytes that a stranger wrote; the same holds for writing.

Three things cost more than their bytes are worth: sets and dicts of keys whose hashes were chosen to be
equal, numbers whose arithmetic is more than linear, and a million empty containers in a megabyte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from datetime import date
from decimal import Decimal
from typing import Any

CROWDED = "too many of its keys have the same hash"
EXCESSIVE = "a number too large to compute with"

MAX_OBJECTS = 1_000_000  # strings, containers and extensions in one value
MAX_FRACTION_BITS = 1 << 15  # of numerator and denominator: reading one computes their common divisor
MAX_EXPONENT = 1_000_100  # of a Decimal: what Python's own default context can compute

_FEW = 64  # keys that may all have one hash
_MOST_EQUAL = 32  # pairs of keys of one hash, for each key; the first 3,900 powers of two stay below
_PRIME = (1 << 61) - 1  # an int below it is its own hash
# The hashes of the first three differ from run to run, and no more than 34 floats share one.
_SPREAD = frozenset({str, bytes, date, float, type(None), bool})


def crowded(keys: Collection[Any]) -> bool:
    """Returns whether so many keys share a hash that a set or dict of them is slow to make."""
    if len(keys) <= _FEW or (kinds := set(map(type, keys))) <= _SPREAD:
        return False
    if kinds == {int} and min(keys) > -_PRIME and max(keys) < _PRIME:
        return False
    if len(set(map(hash, keys))) == len(keys):
        return False
    pairs = sum(count * (count - 1) // 2 for count in Counter(map(hash, keys)).values())
    return pairs > _MOST_EQUAL * len(keys)


def excessive(number: Decimal) -> bool:
    """Returns whether a Decimal has an exponent that no int could follow."""
    return number.is_finite() and abs(number.adjusted()) > MAX_EXPONENT


def large(numerator: int, denominator: int) -> bool:
    """Returns whether the parts of a Fraction are too large."""
    return max(numerator.bit_length(), denominator.bit_length()) > MAX_FRACTION_BITS


# Number of objects. Nearly all data is below the bound by its length or by its count of bytes that could
# begin an object; only the rest is walked through, and then numbers are passed over by the run.
_BEGINNINGS = frozenset(range(0x80, 0xC0)) | frozenset(range(0xC4, 0xCA)) | frozenset(range(0xD4, 0xE0))
_OTHERS = bytes(byte for byte in range(256) if byte not in _BEGINNINGS)
_NUMBER = (
    rb"(?:[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]|[\xcc\xd0].|[\xcd\xd1]..|[\xca\xce\xd2].{4}|[\xcb\xcf\xd3].{8})"
)
_NUMBERS = re.compile(_NUMBER + b"++", re.DOTALL)
_EACH_NUMBER = re.compile(_NUMBER, re.DOTALL)
_WINDOW = 1 << 16  # bytes of numbers that are counted at once
# First byte -> bytes of the length that follows it.
_TEXTS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD4: 0, 0xD5: 0, 0xD6: 0, 0xD7: 0, 0xD8: 0}


def crammed(data: bytes, nesting: Collection[int]) -> bool:
    """Returns whether MessagePack data holds more than `MAX_OBJECTS` objects.

    Args:
        nesting: codes of the extensions whose payload is MessagePack again, in which objects count too.
    """
    if len(data) <= MAX_OBJECTS or len(data.translate(None, _OTHERS)) <= MAX_OBJECTS:
        return False
    count = place = 0
    while place < len(data) and count <= MAX_OBJECTS:
        numbers = _NUMBERS.match(data, place)
        if numbers:
            place = numbers.end()
        else:
            place += _length(data[place : place + 6].ljust(6, b"\0"), nesting)
            count += 1
    return count > MAX_OBJECTS


def numerous(data: bytes, most: int, nesting: Collection[int]) -> bool:
    """Returns whether MessagePack data holds more than `most` values, numbers included.

    Args:
        nesting: as for `crammed`.
    """
    count = place = 0
    while len(data) - place > most - count and count <= most:  # no value is shorter than a byte
        numbers = _NUMBERS.match(data, place, place + _WINDOW)
        if numbers:
            count += _EACH_NUMBER.subn(b"", numbers[0])[1]
            place = numbers.end()
        else:
            place += _length(data[place : place + 6].ljust(6, b"\0"), nesting)
            count += 1
    return count > most


def _length(head: bytes, nesting: Collection[int]) -> int:
    """Returns the bytes from the beginning of one object to the next, which may be inside of it."""
    first = head[0]
    if first in _TEXTS:
        width = _TEXTS[first]
        return 1 + width + int.from_bytes(head[1 : 1 + width], "big")
    if first in _EXTENSIONS:
        width = _EXTENSIONS[first]
        inside = int.from_bytes(head[1 : 1 + width], "big") if width else 1 << (first - 0xD4)
        return 2 + width + (0 if head[1 + width] in nesting else inside)
    if 0xA0 <= first < 0xC0:
        return 1 + first - 0xA0
    return 1 + _CONTAINERS.get(first, 0)
