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

from evals.fuzzing.frames import deep_in_extensions
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


# What costs more than its bytes are worth


def nested(payload: bytes, code: int = 4) -> bytes:
    """Returns an extension around MessagePack data: a set by default."""
    return b"\xc9" + len(payload).to_bytes(4, "big") + bytes([code]) + payload


def items(count: int, payload: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + payload


COLLIDING = [n * (2**61 - 1) for n in range(2000)]  # all of them have the hash 0
PAIRS = [(n, 0) for n in COLLIDING]  # and so do these among each other


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (nested(items(len(COLLIDING), b"".join(map(encode, COLLIDING)))), "same hash"),
        (nested(items(len(COLLIDING), b"".join(map(encode, COLLIDING))), 5), "same hash"),
        (nested(items(len(PAIRS), b"".join(map(encode, PAIRS)))), "same hash"),
        (
            nested(items(len(COLLIDING), b"".join(b"\x92" + encode(n) + b"\xc0" for n in COLLIDING)), 6),
            "hash",
        ),
        (ormsgpack.packb(ormsgpack.Ext(13, b"\x92" + encode(1 << 40_000) + b"\x03")), "too large"),
        (ormsgpack.packb(ormsgpack.Ext(12, b"1E+999999999")), "too large"),
        (ormsgpack.packb(ormsgpack.Ext(12, b"1e-999999999")), "too large"),
        (items(2_000_000, b"\x90" * 2_000_000), "1,000,000 parts"),
        (items(2_000_000, b"\x80" * 2_000_000), "1,000,000 parts"),
        (items(2_000_000, b"\xa1\x80" * 2_000_000), "1,000,000 parts"),
        (nested(items(2_000_000, b"\x90" * 2_000_000), 3), "1,000,000 parts"),
        (items(1_500_000, b"\xd4\x04\x90" * 1_500_000), "1,000,000 parts"),
        (items(2**32 - 1, b""), "end of file"),
        (deep_in_extensions(60, 900), "nested deeper"),
        (deep_in_extensions(5000, 1), "nested deeper"),
        (deep_in_extensions(5000, 0), "without items"),
        (deep_in_extensions(60, 2), "nested deeper"),
    ],
)
def test_what_would_cost_too_much_is_malformed(payload: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        decode(payload)


@pytest.mark.parametrize("number", [1, 3.5])
def test_a_date_in_an_extension_that_holds_none_is_malformed(number: float) -> None:
    for code in (2, 7, 8, 9, 10, 11, 13):
        payload = ormsgpack.packb(ormsgpack.Ext(code, encode([dt.date(2024, 1, 1), number])))
        with pytest.raises(MalformedMessage):
            decode(payload)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (set(COLLIDING), "same hash"),
        (frozenset(PAIRS), "same hash"),
        (dict.fromkeys(COLLIDING), "same hash"),
        (Fraction(1 << 40_000, 3), "too large"),
        (Decimal("1E+999999999"), "too large"),
        ([[] for _ in range(1_100_000)], "parts"),
    ],
    ids=range(6),
)
def test_what_could_not_be_read_again_is_not_written(value: Any, reason: str) -> None:
    with pytest.raises(ValueNotStorable, match=reason):
        encode([value])


@pytest.mark.parametrize(
    "value",
    [
        {f"word{n}" for n in range(100_000)},
        set(range(-50_000, 50_000)),
        {n * 1000003 for n in range(100_000)} | {2**62, 2**63, -(2**70)},
        {n / 7 for n in range(100_000)},
        {2.0**n for n in range(-1074, 1024)},
        {2**n for n in range(3000)},
        {(n, -n, str(n)) for n in range(30_000)},
        {n: {"n": [n]} for n in range(30_000)},
        {Fraction(n, 7) for n in range(1000)} | {Decimal(n) / 7 for n in range(1, 1000)},
        {dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=n) for n in range(10_000)},
        [Decimal("1E+999999"), Decimal("-Infinity"), Decimal("1E-1000000"), 7**100_000],
        list(range(1_200_000)),
        ["слово " * 20] * 20_000,
        [b"\x90" * 1_500_000, b"\xa0" * 1_500_000, "\u0410" * 1_000_000],
        [[n, {"a": ()}, "я"] for n in range(150_000)],
    ],
    ids=range(15),
)
def test_large_honest_values_pass(value: Any) -> None:
    assert decode(encode(value)) == value


@given(plain)
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_value_are_always_the_same(value: Any) -> None:
    assert encode(decode(encode(value))) == encode(value)


@given(plain, st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_are_a_value_or_malformed(value: Any, data: st.DataObject) -> None:
    damaged = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = decode(bytes(damaged))
    except MalformedMessage:
        return
    encode(read)


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
