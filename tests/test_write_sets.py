"""What a hand may refer to and change: its questions and its write set, honest and forged."""

from __future__ import annotations

from typing import Any

import pytest

from uvm.codec import Ref, encode
from uvm.errors import MalformedMessage
from uvm.hands.answers import missed, returned
from uvm.hands.bytecode import Bytecode
from uvm.hands.calls import Call, ObjectView
from uvm.hands.conversation import MAX_VIEW, Conversation
from uvm.hands.frames import LENGTH, unpack


def oid(number: int) -> str:
    return f"{number:016x}"


# 1 is called with a reference to 2. Its parent is 3, whose slot refers to 4; a large slot of 1 refers to 5.
# 4 has the parent 6. Nothing leads to 7.
WORLD = {
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


def test_of_a_name_a_hand_learns_only_whether_it_is_taken() -> None:
    talk = conversation()
    assert [answered(talk, "taken", name) for name in ("it7", "free")] == [True, False]
    assert not talk.shown.reaches(oid(7))


def test_references_lead_to_what_can_be_reached_or_was_made() -> None:
    made = ["new:1", "made", [oid(1)]]
    value = encode([Ref(oid(2)), {Ref(oid(4)): (Ref("new:1"), Ref(oid(3)))}])
    payload = handed_in(result=value, writes={oid(3): [{"x": value}, []]}, created=[made])
    outcome = returned(payload, conversation().shown, 0.0)
    assert encode(outcome.result) == value


@pytest.mark.parametrize("ref", [Ref(oid(5)), Ref(oid(6)), Ref(oid(7)), Ref("new:2")], ids=str)
def test_references_to_anything_else_are_refused(ref: Ref) -> None:
    value = encode([1, {"a": ({ref},)}])
    made = ["new:1", "made", [oid(1)]]
    for payload in (
        handed_in(result=value, created=[made]),
        handed_in(writes={oid(1): [{"x": value}, []]}, created=[made]),
        handed_in(writes={"new:1": [{"x": value}, []]}, created=[made]),
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
