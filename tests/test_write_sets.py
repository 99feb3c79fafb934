"""What a hand may refer to and change: its questions and its write set, honest and forged."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import keyword
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_codec import plain
from uvm import codec
from uvm.codec import Ref, encode
from uvm.errors import MalformedMessage, ObjectNotFound, WriteSetRefused
from uvm.hands.answers import (
    MAX_CREATED,
    MAX_MISSED_CALL,
    MAX_SLOTS,
    MAX_VALUES,
    MAX_WRITE_BYTES,
    MAX_WRITTEN,
    audited,
    checked,
    missed,
    raised,
    returned,
    unstorable,
)
from uvm.hands.bytecode import Bytecode
from uvm.hands.calls import Call, ObjectView
from uvm.hands.conversation import MAX_VIEW, Conversation
from uvm.hands.frames import LENGTH, unpack
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.messenger import TxnHost, apply


def oid(number: int) -> str:
    return f"{number:016x}"


# 1 is called with a reference to 2. Its parent is 3, whose slot refers to 4; a large slot of 1 refers to 5.
# 4 has the parent 6. Nothing leads to 7.
WORLD: dict[int, tuple[list[int], dict[str, Any]]] = {
    1: ([3], {"n": 1, "large": ["x" * MAX_VIEW, {"deep": (Ref(oid(5)),)}]}),
    2: ([], {"items": []}),
    3: ([], {"friend": {Ref(oid(4)): "key"}}),
    4: ([6], {"back": Ref(oid(1))}),
    5: ([], {}),
    6: ([], {}),
    7: ([], {"secret": "open sesame"}),
}


class World:
    """Answers for the objects above."""

    def view(self, found: str) -> ObjectView | None:
        parents, slots = WORLD[int(found, 16)]
        return ObjectView(found, f"it{int(found, 16)}", tuple(map(oid, parents)), slots, {})

    def taken(self, name: str) -> bool:
        return name == "it7"

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        raise AssertionError("nobody here has a grant")


def conversation() -> Conversation:
    talk = Conversation(Call(oid(1), "f", [[Ref(oid(2))]], {}), World(), Bytecode())
    talk.job()
    return talk


def answered(talk: Conversation, kind: str, payload: Any) -> Any:
    frame = talk.answer(kind, payload)
    assert isinstance(frame, bytes)
    return unpack(frame[LENGTH.size :])[1]


def handed_in(**changes: Any) -> dict[str, Any]:
    return {"result": encode(1), "writes": {}, "created": [], "discarded": {}, "printed": "", **changes}


# Reach


def test_the_chain_is_shown_and_arguments_slots_and_parents_can_be_asked_for() -> None:
    talk = conversation()
    assert talk.shown.objects == {oid(1), oid(3)}
    assert answered(talk, "view", oid(2))["name"] == "it2"
    assert answered(talk, "view", oid(4))["parents"] == [oid(6)]
    assert answered(talk, "view", oid(6))["name"] == "it6"


@pytest.mark.parametrize("number", [5, 6, 7])
def test_what_nothing_shown_leads_to_can_not_be_asked_for(number: int) -> None:
    talk = conversation()
    with pytest.raises(MalformedMessage, match="can't reach"):
        talk.answer("view", oid(number))


def test_a_large_slot_leads_on_once_it_was_sent() -> None:
    talk = conversation()
    assert not talk.shown.reaches(oid(5))
    assert len(answered(talk, "slot", [oid(1), "large"])) > MAX_VIEW
    assert answered(talk, "view", oid(5))["name"] == "it5"


def test_arguments_that_refer_to_an_object_not_yet_made_are_the_callers_fault() -> None:
    with pytest.raises(ObjectNotFound, match="new:1"):
        Conversation(Call(oid(1), "f", [], {"x": [Ref("new:1")]}), World(), Bytecode()).job()
    assert Conversation(Call(oid(1), "f", ["new:1"], {}), World(), Bytecode()).job()


def test_of_a_name_a_hand_learns_only_whether_it_is_taken() -> None:
    talk = conversation()
    assert [answered(talk, "taken", name) for name in ("it7", "free")] == [True, False]
    assert not talk.shown.reaches(oid(7))


def test_references_lead_to_what_can_be_reached_or_was_made() -> None:
    new = ["new:1", "made", [oid(1)]]
    value = encode([Ref(oid(2)), {Ref(oid(4)): (Ref("new:1"), Ref(oid(1)))}])
    payload = handed_in(result=value, writes={oid(1): [{"x": value}, []]}, created=[new])
    outcome = returned(payload, conversation().shown, 0.0)
    assert encode(outcome.result) == value


def test_a_parent_is_shown_but_a_method_has_no_hold_of_it() -> None:
    talk = conversation()
    assert oid(3) in talk.shown.objects
    miss = {"message": "m", "target": oid(3), "selector": "g", "parameters": None, "call": None}
    for forged in (
        handed_in(writes={oid(3): [{"x": encode(1)}, []]}),
        handed_in(result=encode(Ref(oid(3)))),
        handed_in(created=[["new:1", "heir", [oid(3)]]]),
    ):
        with pytest.raises(MalformedMessage):
            returned(forged, talk.shown, 0.0)
    with pytest.raises(MalformedMessage):
        missed(miss, talk.shown)
    # What it inherited and changed in place without the marker is told, and nothing comes of it.
    assert returned(handed_in(discarded={oid(3): ["x"]}), talk.shown, 0.0).discarded == {oid(3): ("x",)}


@pytest.mark.parametrize(
    "values",
    [[0] * MAX_VALUES, [None] * MAX_VALUES, [0.5] * MAX_VALUES, [[]] * MAX_VALUES, ["a"] * MAX_VALUES],
    ids=["ints", "nothing", "floats", "lists", "strings"],
)
def test_values_are_counted_before_they_are_read(values: list[Any]) -> None:
    shown = conversation().shown
    with pytest.raises(WriteSetRefused, match="250,000 values"):
        returned(handed_in(result=encode(values)), shown, 0.0)
    half = encode(values[: MAX_VALUES // 2])
    with pytest.raises(WriteSetRefused, match="250,000 values"):
        returned(handed_in(result=half, writes={oid(1): [{"x": half}, []]}), shown, 0.0)
    assert len(returned(handed_in(result=encode(values[:-1])), shown, 0.0).result) == MAX_VALUES - 1


def test_the_arguments_of_a_missed_message_are_bounded() -> None:
    call = encode([["x" * MAX_MISSED_CALL], {}])
    miss = {"message": "m", "target": oid(1), "selector": "g", "parameters": ["x"], "call": call}
    assert missed(miss, conversation().shown).details["args"] is None


@pytest.mark.parametrize("ref", [Ref(oid(5)), Ref(oid(6)), Ref(oid(7)), Ref("new:2")], ids=str)
def test_references_to_anything_else_are_refused(ref: Ref) -> None:
    value = encode([1, {"a": ({ref},)}])
    new = ["new:1", "made", [oid(1)]]
    for payload in (
        handed_in(result=value, created=[new]),
        handed_in(writes={oid(1): [{"x": value}, []]}, created=[new]),
        handed_in(writes={"new:1": [{"x": value}, []]}, created=[new]),
        handed_in(created=[["new:1", "made", [ref.oid]]]),
    ):
        with pytest.raises(MalformedMessage):
            returned(payload, conversation().shown, 0.0)
    miss = {"message": "", "target": oid(1), "selector": "g", "parameters": None}
    with pytest.raises(MalformedMessage, match="can't reach"):
        missed(miss | {"call": encode([[ref], {}])}, conversation().shown)
    assert missed(miss | {"call": encode([[Ref(oid(2))], {}])}, conversation().shown).target == oid(1)


def test_a_reference_in_an_unusual_encoding_is_found() -> None:
    long = b"\xc7\x10\x0e" + oid(7).encode()  # ext8 where the codec itself writes fixext16
    with pytest.raises(MalformedMessage, match="can't reach"):
        returned(handed_in(result=long), conversation().shown, 0.0)


# Bounds


def made(count: int) -> list[list[Any]]:
    return [[f"new:{n}", f"made{n}", [oid(1)]] for n in range(1, count + 1)]


def deep(levels: int) -> bytes:
    return b"\x91" * levels + b"\x01"


ONE = encode(1)
SLOTS = [f"s{n}" for n in range(MAX_SLOTS)]


@pytest.mark.parametrize(
    ("bound", "payload"),
    [
        ("created objects", handed_in(created=made(MAX_CREATED + 1))),
        ("written objects", handed_in(discarded={f"{n}": [] for n in range(MAX_WRITTEN + 1)})),
        ("changed slots", handed_in(writes={oid(1): [{"x": ONE}, SLOTS]})),
        ("changed slots", handed_in(discarded={oid(1): [*SLOTS, "x"]})),
        ("bytes of slots", handed_in(writes={oid(1): [{"x": b"\xc6" + b"x" * MAX_WRITE_BYTES}, []]})),
    ],
)
def test_what_is_over_a_bound_is_refused_by_its_name(bound: str, payload: dict[str, Any]) -> None:
    with pytest.raises(WriteSetRefused, match=bound) as refusal:
        returned(payload, conversation().shown, 0.0)
    assert refusal.value.details["bound"] == bound


def test_what_is_at_its_bounds_passes() -> None:
    large = encode(b"x" * (MAX_WRITE_BYTES - 100))
    writes = {oid(1): [{"x": large}, SLOTS[2:]], "new:1": [{"x": deep(64)}, []]}
    outcome = returned(handed_in(writes=writes, created=made(MAX_CREATED)), conversation().shown, 0.0)
    assert (len(outcome.created), len(outcome.writes[oid(1)].delete)) == (MAX_CREATED, MAX_SLOTS - 2)


@pytest.mark.parametrize(
    "changes",
    [
        [{"_x": ONE}, []],
        [{"two words": ONE}, []],
        [{"class": ONE}, []],
        [{"x" * 101: ONE}, []],
        [{"\uff58": ONE}, []],
        [{1: ONE}, []],
        [{}, ["_x"]],
        [{}, [1]],
        [{}, ["x", "x"]],
        [{"x": ONE}, ["x"]],
        [{"x": 1}, []],
        [{"x": deep(66)}, []],
        [{"x": ONE + ONE}, []],
        [{"x": ONE}],
        {"x": ONE},
    ],
    ids=repr,
)
def test_changes_that_no_honest_hand_sends(changes: Any) -> None:
    with pytest.raises(MalformedMessage):
        returned(handed_in(writes={oid(1): changes}), conversation().shown, 0.0)


@pytest.mark.parametrize(
    ("selector", "parameters"),
    [("_x", None), ("x" * 101, None), ("f", ["_x"]), ("f", ["self"]), ("f", ["a", "a"]), ("f", ["a b"])],
)
def test_misses_that_no_honest_hand_sends(selector: str, parameters: list[str] | None) -> None:
    miss = {"message": "", "target": oid(1), "selector": selector, "parameters": parameters, "call": None}
    with pytest.raises(MalformedMessage):
        missed(miss, conversation().shown)


# Forged at random

NAMES = st.sampled_from(["n", "items", "name", "friend", "young"])
BAD_NAMES = st.sampled_from(["f", "inherited", "clone", "parents", "_slots", "_p_changed", "stranger"])
WORDS = st.from_regex(r"[a-z]{2,8}", fullmatch=True).filter(lambda word: not keyword.iskeyword(word))
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=20)
JUNK = SCALARS | BAD_NAMES | plain


@st.composite
def forged(draw: st.DrawFn, oids: list[str]) -> Any:
    """A payload of a `returned` frame: a valid one at first, then a few parts replaced or removed."""
    it, parent, friend, _ = oids
    names = draw(st.lists(NAMES | WORDS, max_size=3, unique=True))
    new = [f"new:{n}" for n in range(1, len(names) + 1)]
    someone, reachable = st.sampled_from([it, parent, *new]), st.sampled_from([it, parent, friend, *new])
    value = st.recursive(plain | reachable.map(Ref), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    data = value.map(encode)
    changes = st.dictionaries(NAMES | WORDS, data, max_size=3).flatmap(
        lambda written: st.lists(WORDS.filter(lambda word: word not in written), max_size=2, unique=True).map(
            lambda deleted: [written, deleted]
        )
    )
    payload: Any = {
        "result": draw(data),
        "writes": draw(st.dictionaries(someone, changes, max_size=3)),
        "created": [
            [oid, name, [draw(st.sampled_from([it, parent, *new[:n]]))]]
            for n, (oid, name) in enumerate(zip(new, names, strict=True))
        ],
        "discarded": draw(st.dictionaries(someone, st.lists(WORDS, max_size=3), max_size=2)),
        "printed": draw(st.text(max_size=10)),
    }
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        _mutate(draw, payload, oids)
    return payload


def _mutate(draw: Callable[[st.SearchStrategy[Any]], Any], part: Any, oids: list[str]) -> None:
    """Replaces or removes one part, at any depth."""
    junk = JUNK | st.sampled_from([*oids, "new:1", "new:9"]) | st.sampled_from(oids).map(Ref).map(encode)
    while type(part) in (dict, list) and part:
        key = draw(st.sampled_from(list(part) if type(part) is dict else range(len(part))))
        if type(part[key]) not in (dict, list) or draw(st.integers(0, 5)) == 0:
            if draw(st.integers(0, 3)) or type(part) is not dict:
                part[key] = draw(junk)
            else:  # the same under another name
                part[draw(junk.filter(_is_hashable))] = part.pop(key)
            return
        part = part[key]


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class Laboratory:
    """An image with a receiver, its parent, a friend that it refers to, and a stranger out of its reach."""

    def __init__(self) -> None:
        self.image = LivingImage.in_memory()
        self.image.open()
        self.oids: list[str] = asyncio.run(self._plant())

    async def _plant(self) -> list[str]:
        async with self.image.transaction("plant") as txn:
            inherited = UvmMethod("inherited", (), "def inherited(self): pass", "", {}, [])
            method = UvmMethod("f", (), "def f(self): pass", "", {}, [])
            parent = txn.create("parent", (), {"inherited": inherited, "items": [1]})
            friend = txn.create("friend", (parent,), {"n": 1})
            it = txn.create("it", (parent,), {"f": method, "n": 1, "friend": friend})
            return [one.oid for one in (it, parent, friend, txn.create("stranger", (), {"n": 1}))]

    async def hand_in(self, payload: Any) -> None:
        """Lets a call to `it` end with this payload, compares the image, and throws all changes away."""
        async with self.image.transaction("hand in") as txn:
            txn.doom()
            host = TxnHost(txn)
            talk = Conversation(Call(self.oids[0], "f", [], {}), host, Bytecode())
            talk.job()
            before = self._fixed(txn)
            stranger = self._slots(txn, self.oids[3])
            with contextlib.suppress(MalformedMessage, WriteSetRefused):
                outcome = replace(returned(payload, talk.shown, 0.0), seen=host.seen)
                apply(txn, outcome)
                txn.savepoint()  # every value is one that the image can store
                codec.encode(outcome.result)
            txn.forget_cached()
            assert self._fixed(txn) == before
            assert self._slots(txn, self.oids[3]) == stranger
            friend = self._slots(txn, self.oids[2])
            assert friend == {"n": 1}  # reachable, but never shown
            for name, created in txn.names.items():
                assert created.oid in self.oids or not created.methods()
                assert name == created.name
                assert {parent.oid for parent in created.parents}.isdisjoint(self.oids[2:])

    def _fixed(self, txn: Txn) -> dict[str, Any]:
        """Returns what no write set may change: names, parents, methods."""
        found = {one: txn.find(one) for one in self.oids}
        return {
            one: (it.name, [p.oid for p in it.parents], {n: m.source for n, m in it.methods().items()})
            for one, it in found.items()
        }

    def _slots(self, txn: Txn, one: str) -> dict[str, Any]:
        return dict(txn.plain(txn.find(one).data()))


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    laboratory = Laboratory()
    yield laboratory
    laboratory.image.close()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_forged_write_set_changes_what_it_may_not(laboratory: Laboratory, data: st.DataObject) -> None:
    asyncio.run(laboratory.hand_in(data.draw(forged(laboratory.oids))))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_forged_question_raises_anything_untyped(data: st.DataObject) -> None:
    talk = conversation()
    oids = st.sampled_from([oid(n) for n in range(1, 8)])
    payload = data.draw(JUNK | oids | st.lists(oids | st.text(max_size=3), max_size=3))
    for kind in ("view", "slot", "taken", "else"):
        with contextlib.suppress(MalformedMessage):
            talk.answer(kind, payload)
    assert talk.shown.objects <= {oid(n) for n in (1, 2, 3, 4)}


RAISED: dict[str, Any] = {"message": "m", "exception": "E", "traceback": ["line"], "selector": "f"}
SHOWN = conversation().shown
HONEST: dict[str, tuple[Any, dict[str, Any]]] = {
    "raised": (lambda payload: raised(payload, SHOWN), RAISED),
    "unstorable": (unstorable, {"message": "m", "path": "the result", "type": "map"}),
    "audited": (audited, {"source": "", "findings": [["r", 1, "m", False]], "parameters": ["x"], "doc": ""}),
    "missed": (
        lambda payload: missed(payload, SHOWN),
        {"message": "m", "target": oid(1), "selector": "g", "parameters": ["x"], "call": encode([[1], {}])},
    ),
    "checked": (checked, {"memory": True, "files": False}),
}


@pytest.mark.parametrize("kind", HONEST)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_forged_ending_raises_anything_untyped(kind: str, data: st.DataObject) -> None:
    read, honest = HONEST[kind]
    read(honest)
    payload = copy.deepcopy(honest)
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(data.draw, payload, [oid(n) for n in range(1, 8)])
    for forged_payload in (payload, data.draw(JUNK)):
        with contextlib.suppress(MalformedMessage):
            read(forged_payload)
