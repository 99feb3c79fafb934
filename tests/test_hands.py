"""Hands: what a method can do in one, what is kept of it, and what is told of a message it misses."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from fractions import Fraction
from typing import Any
from zoneinfo import available_timezones

import pytest

from tests.garden import Garden
from uvm.codec import Ref, encode
from uvm.errors import DoesNotUnderstand, HandDied, MethodRaised, ObjectNotFound
from uvm.hands.calls import Call, Created, SlotChanges
from uvm.hands.frames import pack
from uvm.hands.pool import HandPool

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture
def garden(pool: HandPool) -> Garden:
    return Garden(pool)


# What a method can do


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -1,
        10**40,
        0.1,
        1 + 2j,
        "grüße \udc80",
        b"\x00\xff",
        [1, [2]],
        (1, (2, [3])),
        {1, 2},
        frozenset({"a"}),
        {"a": {1: (2,)}, (1, 2): None},
        dt.datetime(2024, 2, 29, 1, 2, 3, 4, dt.UTC),
        dt.date(2024, 1, 1),
        dt.time(1, 2),
        dt.timedelta(days=-1, microseconds=5),
        dt.timezone(dt.timedelta(hours=2), "here"),
        Decimal("1.10"),
        Fraction(1, 3),
        Ref("00000000000000ff"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_values_come_back_as_they_were(garden: Garden, value: Any) -> None:
    outcome = await garden.do("def give(self, x):\n    return [x, self.kept]", value, kept=value)
    assert encode(outcome.result) == encode([value, value])
    assert [type(item) for item in outcome.result] == [type(value)] * 2


async def test_a_method_may_define_a_dataclass_and_write_long_numbers(garden: Garden) -> None:
    source = """def f(self):
    from dataclasses import dataclass

    @dataclass
    class Point:
        x: int

    return Point(7).x, len(str(10 ** 5000))"""
    assert (await garden.do(source)).result == (7, 5001)


async def test_delegation_finds_slots_and_methods_depth_first_through_cycles(garden: Garden) -> None:
    garden.plant(
        "a", "def where(self):\n    return [self.x, self.y, self.z]", parents=(f"{2:016x}", f"{4:016x}")
    )
    garden.plant("b", parents=(f"{3:016x}",), x="b")
    garden.plant("c", parents=(f"{1:016x}",), x="c", y="c")
    garden.plant("d", x="d", y="d", z="d")
    assert (await garden.send(f"{1:016x}", "where")).result == ["b", "c", "d"]


async def test_a_miss_in_a_cycle_ends(garden: Garden) -> None:
    oid = garden.plant("a", "def has(self):\n    return hasattr(self, 'nothing')", parents=(f"{1:016x}",))
    assert (await garden.send(oid, "has")).result is False


async def test_methods_send_messages_to_self_to_parents_and_to_other_objects(garden: Garden) -> None:
    parent = garden.plant("parent", "def tax(self, price):\n    return price * self.rate", rate=2)
    other = garden.plant("other", "def fee(self, *, base=1):\n    return base + self.extra", extra=10)
    total = "def total(self, price):\n    return self.own() + self.tax(price) + self.other.fee(base=5)"
    target = garden.plant(
        "shop", total, "def own(self):\n    return 100", parents=(parent,), rate=3, other=Ref(other)
    )
    assert (await garden.send(target, "total", 7)).result == 100 + 21 + 15
    assert garden.asked == [target, parent, other]


async def test_self_in_an_inherited_method_is_the_receiver(garden: Garden) -> None:
    parent = garden.plant("parent", "def me(self):\n    return self")
    child = garden.plant("child", parents=(parent,))
    assert (await garden.send(child, "me")).result == Ref(child)


async def test_references_are_proxies_wherever_they_are(garden: Garden) -> None:
    friend = garden.plant("friend", age=7)
    source = """def look(self, them):
    first = self.nest["in"][0]
    same = first is self.nest["set"].pop() and first == them[0] and hash(first) == hash(them[0])
    return [same, first.age, repr(first), {"back": (first, {first})}]"""
    target = garden.plant("it", source, nest={"in": [Ref(friend)], "set": {Ref(friend)}})
    outcome = await garden.send(target, "look", [Ref(friend)])
    assert outcome.result == [True, 7, "<friend>", {"back": (Ref(friend), {Ref(friend)})}]


async def test_a_walk_over_references_reaches_what_it_meets(garden: Garden) -> None:
    root = garden.plant("root", depth=1)
    far = garden.plant("far", "def name(self):\n    return 'far'", parents=(root,))
    near = garden.plant("near", big=["x" * 300_000, {"to": Ref(far)}])
    source = """def walk(self, start):
    far = start.big[1]["to"]
    far.seen = [start, self]
    far._p_changed = True
    return far.name(), far.depth, far"""
    outcome = await garden.send(garden.plant("it", source), "walk", Ref(near))
    assert outcome.result == ("far", 1, Ref(far))
    assert outcome.writes == {far: SlotChanges({"seen": [Ref(near), Ref(f"{4:016x}")]}, ())}


@pytest.mark.parametrize("forged", ["view", "result"])
async def test_an_object_out_of_reach_stays_out_of_it(garden: Garden, forged: str) -> None:
    secret = garden.plant("secret", word="open sesame")
    frames = {
        "view": pack("view", secret),
        "result": pack(
            "returned",
            {"result": encode(Ref(secret)), "writes": {}, "created": [], "discarded": {}, "printed": ""},
        ),
    }
    source = "def f(self, frame):\n    import random\n    random._os.write(3, frame)\n    random._os._exit(0)"
    with pytest.raises(HandDied, match="can't reach"):
        await garden.do(source, frames[forged])
    assert secret not in garden.asked


async def test_an_overlay_shadows_what_is_installed(pool: HandPool, garden: Garden) -> None:
    oid = garden.plant("it", "def f(self):\n    return self.g()", "def g(self):\n    return 'old'")
    overlay = {"g": "def g(self):\n    return 'new'"}
    assert (await pool.run(Call(oid, "f", [], {}), garden, overlay=overlay)).result == "new"
    assert (await pool.run(Call(oid, "f", [], {}), garden)).result == "old"


async def test_large_slots_are_fetched_when_they_are_read(garden: Garden) -> None:
    big = ["x" * 100_000] * 4
    outcome = await garden.do("def size(self):\n    return len(self.big), self.small", big=big, small=1)
    assert outcome.result == (4, 1)
    outcome = await garden.do(
        "def add(self):\n    self.big.append(1)\n    self._p_changed = True", big=big, small=1
    )
    assert outcome.writes.popitem()[1] == SlotChanges({"big": [*big, 1]}, ())


async def test_what_is_printed_comes_along_and_is_bounded(garden: Garden) -> None:
    assert (await garden.do("def f(self):\n    print('a', 1)\n    print('b')")).printed == "a 1\nb\n"
    outcome = await garden.do(
        "def f(self):\n    for _ in range(200):\n        print('x' * 1000)\n    return 'done'"
    )
    assert (outcome.result, len(outcome.printed)) == ("done", 65536)


async def test_modules_and_encodings_work_though_no_file_opens(garden: Garden) -> None:
    source = r"""def f(self):
    import collections.abc, datetime, json, re, statistics, unicodedata
    day = datetime.datetime.strptime("2024-02-29", "%Y-%m-%d").strftime("%A")
    text = "\N{BULLET}ä".encode("utf-16").decode("utf-16") + "ä".encode("latin-1").decode("cp1252")
    return [day, text, json.dumps({"a": 1}), statistics.mean([1, 2, 3]), "faß".encode("idna")]"""
    assert (await garden.do(source)).result == ["Thursday", "•ää", '{"a": 1}', 2, b"fass"]


@pytest.mark.skipif("Europe/Berlin" not in available_timezones(), reason="this system knows no time zones")
async def test_time_zones_are_known(garden: Garden) -> None:
    source = """def f(self):
    from datetime import datetime
    from zoneinfo import ZoneInfo
    return datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")).utcoffset()"""
    assert (await garden.do(source)).result == dt.timedelta(hours=2)


async def test_each_call_has_its_own_randomness_and_a_fresh_interpreter(garden: Garden) -> None:
    source = """def f(self):
    import random
    random.seen = getattr(random, "seen", 0) + 1
    return random.random(), random.seen"""
    results = [(await garden.do(source)).result for _ in range(4)]
    assert len({number for number, _ in results}) == 4
    assert {seen for _, seen in results} == {1}


# What is kept


COUNT = """def count(self, by):
    self.n += by
    self.log.append({"by": [by]})
    self._p_changed = True
    return self.n"""


async def test_writes_hold_the_real_changes_nested_ones_included(garden: Garden) -> None:
    oid = garden.plant("it", COUNT, n=1, log=[], other={"untouched": 1})
    outcome = await garden.send(oid, "count", 2)
    assert outcome.writes == {oid: SlotChanges({"n": 3, "log": [{"by": [2]}]}, ())}
    assert (outcome.result, outcome.discarded) == (3, {})


async def test_a_needless_marker_writes_nothing(garden: Garden) -> None:
    source = """def f(self):
    self.n = self.n
    self.log.append(1)
    self.log.pop()
    self._p_changed = True"""
    outcome = await garden.do(source, n=1, log=[2])
    assert (outcome.writes, outcome.discarded) == ({}, {})


async def test_changes_without_the_marker_are_discarded_and_told(garden: Garden) -> None:
    parent = garden.plant("parent", shared=[])
    source = """def f(self):
    self.n = 2
    del self.old
    self.shared.append(1)
    self.fresh = (i for i in [])"""
    oid = garden.plant("it", source, parents=(parent,), n=1, old=1)
    outcome = await garden.send(oid, "f")
    assert outcome.writes == {}
    assert outcome.discarded == {oid: ("fresh", "n", "old"), parent: ("shared",)}


async def test_the_marker_speaks_for_one_object(garden: Garden) -> None:
    friend, stranger = garden.plant("friend", n=1), garden.plant("stranger", n=1)
    source = """def f(self, a, b):
    a.n = b.n = 2
    a._p_changed = True"""
    outcome = await garden.send(garden.plant("it", source), "f", Ref(friend), Ref(stranger))
    assert outcome.writes == {friend: SlotChanges({"n": 2}, ())}
    assert outcome.discarded == {stranger: ("n",)}


async def test_slots_are_deleted_and_made_again(garden: Garden) -> None:
    source = """def f(self):
    del self.a
    gone = hasattr(self, "a")
    del self.b
    self.b = 5
    self.c = 1
    del self.c
    self._p_changed = True
    return gone"""
    outcome = await garden.do(source, a=1, b=2)
    assert outcome.result is False
    assert [*outcome.writes.values()] == [SlotChanges({"b": 5}, ("a",))]


async def test_inherited_slots_are_assigned_on_the_receiver(garden: Garden) -> None:
    parent = garden.plant("parent", "def up(self):\n    self.n += 1\n    self._p_changed = True", n=5)
    child = garden.plant("child", parents=(parent,))
    outcome = await garden.send(child, "up")
    assert outcome.writes == {child: SlotChanges({"n": 6}, ())}


async def test_clones_are_kept_with_their_slots_and_references(garden: Garden) -> None:
    source = """def breed(self):
    one = self.clone("one")
    two = one.clone("two")
    one.mate, two.mate = two, one
    self.young = {"all": [one, two]}
    self._p_changed = True
    return one.legs, two"""
    oid = garden.plant("it", source, legs=4)
    outcome = await garden.send(oid, "breed")
    assert outcome.created == (Created("new:1", "one", (oid,)), Created("new:2", "two", ("new:1",)))
    assert outcome.writes == {
        oid: SlotChanges({"young": {"all": [Ref("new:1"), Ref("new:2")]}}, ()),
        "new:1": SlotChanges({"mate": Ref("new:2")}, ()),
        "new:2": SlotChanges({"mate": Ref("new:1")}, ()),
    }
    assert outcome.result == (4, Ref("new:2"))
    assert garden.found == ["one", "two"]


@pytest.mark.parametrize("name", ["it", "twice", "_private", "two words", "class", "0123456789abcdef", "", 7])
async def test_a_clone_needs_a_free_public_name(garden: Garden, name: Any) -> None:
    with pytest.raises(MethodRaised) as caught:
        await garden.do("def f(self, name):\n    self.clone('twice')\n    self.clone(name)", name)
    assert caught.value.details["exception"] == "ValueError"


async def test_natives_tell_what_an_object_understands(garden: Garden) -> None:
    parent = garden.plant("parent", "def b(self):\n    pass")
    source = (
        "def a(self):\n    return self.selectors(), [self.understands(s) for s in ('a', 'b', 'c', 'clone')]"
    )
    oid = garden.plant("it", source, parents=(parent,))
    expected = ["a", "b", "clone", "selectors", "understands"]
    assert (await garden.send(oid, "a")).result == (expected, [True, True, False, True])


async def test_a_slot_shadows_a_native(garden: Garden) -> None:
    assert (await garden.do("def f(self):\n    self.clone = 2\n    return self.clone", clone=1)).result == 2


@pytest.mark.parametrize(
    "statement",
    [
        "self.f = 1",
        "self.inherited = 1",
        "self.clone = 1",
        "self._secret = 1",
        "self.__dict__ = {}",
        "self._p_changed = False",
        "self._secret",
        "self.__class__",
        "setattr(self, 'two words', 1)",
        "del self.nothing",
        "del self.f",
    ],
)
async def test_what_is_no_slot_is_refused(garden: Garden, statement: str) -> None:
    parent = garden.plant("parent", "def inherited(self):\n    pass")
    oid = garden.plant("it", f"def f(self):\n    {statement}", parents=(parent,))
    with pytest.raises(MethodRaised) as caught:
        await garden.send(oid, "f")
    assert caught.value.details["exception"] == "AttributeError"


# What is missed


async def missing(garden: Garden, source: str, *args: Any, **slots: Any) -> DoesNotUnderstand:
    with pytest.raises(DoesNotUnderstand) as caught:
        await garden.do(source, *args, **slots)
    return caught.value


async def test_a_missed_message_tells_how_it_was_called(garden: Garden) -> None:
    source = """def f(self, price, self_made):
    count = [1, {"a": (2,)}]
    return [
        self
        .tax(price, count, -1, "x", [1, 2], self.rate, label=self_made),
    ]"""
    error = await missing(garden, source, 10, {"made": 1}, rate=0.5)
    assert (error.target, error.selector) == (f"{1:016x}", "tax")
    assert error.details["parameters"] == ["price", "count", "arg3", "arg4", "arg5", "arg6", "label"]
    assert error.details["args"] == [10, [1, {"a": (2,)}], -1, "x", [1, 2], 0.5]
    assert error.details["kwargs"] == {"label": {"made": 1}}


@pytest.mark.parametrize(
    ("call", "parameters", "args"),
    [
        ("self.g()", [], []),
        ("self.g(x)", ["x"], [5]),
        ("self.g(x, x)", ["x", "arg2"], [5, 5]),
        ("self.g(self)", ["arg1"], [Ref(f"{1:016x}")]),
        ("self.g(x + 1)", ["arg1"], None),
        ("self.g(len('abc'), x)", ["arg1", "x"], None),
        ("self.g(self.nothing)", ["arg1"], None),
        ("self.g(i for i in [1])", ["arg1"], None),
        ("self.g(*rest)", None, None),
        ("self.g(x, **more)", None, None),
        ("[self.g(n) for n in [1]][0]", ["n"], [1]),
        ("(lambda v: self.g(v, x))(3)", ["v", "x"], [3, 5]),
        ("max([1, 2], key=lambda n: self.g(n))", ["n"], [1]),
        ("self.friend.g(x)", ["x"], [5]),
        ("str(self.g(x)) + self.h(1)", ["x"], [5]),
    ],
)
async def test_what_can_be_known_of_a_missed_call(
    garden: Garden, call: str, parameters: list[str] | None, args: list[Any] | None
) -> None:
    source = f"def f(self, x):\n    rest, more = [1], {{}}\n    return {call}"
    error = await missing(garden, source, 5, friend=Ref(f"{1:016x}"))
    assert (error.details["parameters"], error.details["args"]) == (parameters, args)
    assert error.details["kwargs"] == (None if args is None else {})


async def test_a_miss_in_a_deeper_method_names_its_own_receiver(garden: Garden) -> None:
    other = garden.plant("other", "def go(self, way):\n    return self.walk(way)")
    oid = garden.plant("it", "def f(self):\n    return self.other.go('north')", other=Ref(other))
    with pytest.raises(DoesNotUnderstand) as caught:
        await garden.send(oid, "f")
    assert (caught.value.target, caught.value.selector) == (other, "walk")
    assert caught.value.details["args"] == ["north"]


async def test_a_miss_on_a_new_object_is_its_parents(garden: Garden) -> None:
    error = await missing(garden, "def f(self):\n    new = self.clone('new')\n    return new.bark(new)")
    assert (error.target, error.details["args"]) == (f"{1:016x}", [Ref(f"{1:016x}")])


async def test_a_miss_that_the_method_expects_is_none(garden: Garden) -> None:
    source = """def f(self):
    try:
        self.nothing(1)
    except AttributeError as error:
        return hasattr(self, "nothing"), getattr(self, "nothing", 3), str(error)"""
    assert (await garden.do(source)).result == (False, 3, "it does not understand 'nothing'")


async def test_a_missing_slot_is_no_missing_method(garden: Garden) -> None:
    for body in ("return self.count + 1", "self.count += 1", "call = self.count\n    call()"):
        with pytest.raises(MethodRaised, match=r"hasattr\(self, 'count'\)") as caught:
            await garden.do(f"def f(self):\n    {body}")
        assert caught.value.details["exception"] == "AttributeError"


async def test_a_call_that_nobody_answers(garden: Garden) -> None:
    with pytest.raises(DoesNotUnderstand) as caught:
        await garden.send(garden.plant("it"), "nothing", 1)
    assert caught.value.selector == "nothing"
    with pytest.raises(ObjectNotFound):
        await garden.send("00000000000000ff", "nothing")


async def test_an_object_that_is_gone(garden: Garden) -> None:
    with pytest.raises(MethodRaised, match="no longer in the image"):
        await garden.do("def f(self):\n    return self.friend.age", friend=Ref("00000000000000ff"))
