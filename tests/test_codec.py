"""The codec: what goes in comes out, the rest is refused with its place."""

import collections
import datetime as dt
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uvm.codec import MAX_DEPTH, Ref, decode, encode, matches
from uvm.errors import MalformedMessage, ValueNotStorable

zones = st.builds(dt.timezone, st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)))
hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.times(timezones=st.none() | zones)
    | st.datetimes(timezones=st.none() | zones)
    | st.timedeltas()
    | zones
    | st.from_regex(r"[0-9a-f]{16}", fullmatch=True).map(Ref),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=8,
)
plain = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=3)
    ),
    max_leaves=20,
)


def typed(value: Any) -> Any:
    """Returns a value with the types of all its parts, so that equality means the same types too."""
    if isinstance(value, dict):
        return dict, sorted(((typed(key), typed(item)) for key, item in value.items()), key=repr)
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(typed, value), key=repr)
    if isinstance(value, (list, tuple)):
        return type(value), [typed(item) for item in value]
    return type(value), value


@given(plain)
@settings(max_examples=300, deadline=None)
def test_every_plain_value_comes_back_as_it_was(value: Any) -> None:
    assert typed(decode(encode(value))) == typed(value)


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_a_value_or_malformed(data: bytes) -> None:
    try:
        decode(data)
    except MalformedMessage:
        return


@given(plain, st.binary(min_size=1, max_size=8))
@settings(deadline=None)
def test_trailing_bytes_are_refused(value: Any, tail: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(encode(value) + tail)


@given(plain)
@settings(deadline=None)
def test_a_value_cut_short_is_refused(value: Any) -> None:
    with pytest.raises(MalformedMessage):
        decode(encode(value)[:-1])


def test_equal_sets_have_equal_bytes() -> None:
    words = [f"word{n}" for n in range(50)]
    grown = set(words) | {*range(1000)}
    grown -= {*range(1000)}  # the same elements, in another order inside
    assert list(grown) != list(set(words))
    assert encode(grown) == encode(set(words))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "value"),
        ([1, {"a": (2, bytearray())}], "value[1]['a'][1]"),
        (collections.Counter("ab"), "value"),
        ({"when": dt.datetime(2020, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})())}, "value['when']"),
        ([lambda: 0], "value[0]"),
        ({True: type}, "value[True]"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(ValueNotStorable) as refusal:
        encode(value)
    assert refusal.value.details["path"] == place
    assert str(refusal.value).startswith(place)


def test_depth_is_bounded_both_ways() -> None:
    value: Any = 0
    for _ in range(MAX_DEPTH):
        value = [value]
    assert decode(encode(value)) == value
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueNotStorable, match="nested deeper"):
        encode(endless)
    with pytest.raises(MalformedMessage):
        decode(b"\x91" * (MAX_DEPTH + 1) + b"\x01")


@pytest.mark.parametrize(
    "payload",
    [
        ormsgpack.packb(ormsgpack.Ext(99, b"")),
        ormsgpack.packb(ormsgpack.Ext(4, ormsgpack.packb([[1]]))),
        ormsgpack.packb(ormsgpack.Ext(7, ormsgpack.packb([1, 2]))),
        ormsgpack.packb(ormsgpack.Ext(12, b"not a number")),
        ormsgpack.packb(ormsgpack.Ext(13, ormsgpack.packb([1, 0]))),
        ormsgpack.packb(ormsgpack.Ext(14, b"../../etc/passwd")),
        ormsgpack.packb(ormsgpack.Ext(3, ormsgpack.packb([1]) + b"\x01")),
        b"\xc1",
        b"",
        b"\x91" * 100_000,
    ],
)
def test_hostile_payloads_are_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(payload)


@pytest.mark.parametrize(
    ("expected", "got", "equal"),
    [
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        ([1, (2,)], [1, (2,)], True),
        ([1, 2], (1, 2), False),
        (True, 1, False),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (10**400, 1.5, False),
        (Decimal("1.0"), Decimal("1"), True),
        (Fraction(1, 2), 0.5, False),
        (float("nan"), float("nan"), True),
    ],
)
def test_matches(expected: Any, got: Any, equal: bool) -> None:
    assert matches(expected, got) is equal
