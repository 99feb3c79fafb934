"""Uses of grants below the kernel: what a hand may ask, what a method learns, how a use is given up."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker import HOLDER, Refused, World, asked
from uvm import prompts
from uvm.capabilities import KINDS
from uvm.codec import Ref
from uvm.errors import GrantMissing, InvalidField, MalformedMessage, MethodRaised, SlotProtected
from uvm.grant_options import NoOptions
from uvm.hands import answers
from uvm.hands.bytecode import Bytecode
from uvm.hands.calls import Call, ObjectView
from uvm.hands.conversation import MAX_QUESTIONS, Conversation
from uvm.hands.frames import LENGTH, unpack
from uvm.hands.shown import Shown
from uvm.image import history
from uvm.image.prototypes import UvmMethod
from uvm.messages import COMMANDS, MissionBrief
from uvm.mind.backends.scripted import STALL, Scripted
from uvm.parser import parse_exact

OID, OTHER = f"{1:016x}", f"{2:016x}"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start()
    yield world
    await world.close()


# What a hand may ask


class Host:
    """Two objects, of which one is reachable; each holds a grant."""

    def __init__(self) -> None:
        self.uses: list[list[Any]] = []

    def view(self, oid: str) -> ObjectView | None:
        return ObjectView(oid, None, (), {"secret": 1}, {}, {"files": "files"})

    def taken(self, name: str) -> bool:
        return False

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        self.uses.append([holder, slot, verb, args, kwargs])
        return {"ok": "done"}


@pytest.fixture
def talk() -> tuple[Conversation, Host]:
    host = Host()
    talk = Conversation(Call(OID, "f", [], {}), host, Bytecode())
    talk.job()
    return talk, host


async def test_a_use_of_a_grant_that_was_shown_is_carried_out(talk: tuple[Conversation, Host]) -> None:
    conversation, host = talk
    use = [OID, "files", "read_text", ["a", Ref(OID)], {"k": 1}]
    reply = conversation.answer("use", use)
    assert reply is not None
    assert not isinstance(reply, bytes)
    assert unpack((await reply)[LENGTH.size :]) == ("use", {"ok": "done"})
    assert host.uses == [use]


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        {},
        "use",
        [OID, "files", "read_text", []],
        [OID, "files", "read_text", [], {}, 1],
        [OID, "files", "read_text", (), {}],
        [OID, "files", b"read_text", [], {}],
        [OID, "files", "read_text", [], {1: 2}],
        [OTHER, "files", "read_text", [], {}],
        ["new:1", "files", "read_text", [], {}],
        [OID, "files", "chmod", [], {}],
        [OID, "files", "get", [], {}],
        [OID, "secret", "read_text", [], {}],
        [OID, "http", "get", [], {}],
        [Ref(OID), "files", "read_text", [], {}],
    ],
)
def test_other_uses_end_the_call(talk: tuple[Conversation, Host], payload: Any) -> None:
    conversation, host = talk
    with pytest.raises(MalformedMessage):
        conversation.answer("use", payload)
    assert host.uses == []


async def test_uses_are_counted_with_the_questions(talk: tuple[Conversation, Host]) -> None:
    conversation, _ = talk
    use = [OID, "files", "exists", ["a"], {}]
    for _ in range(MAX_QUESTIONS):
        reply = conversation.answer("use", use)
        assert reply is not None
        assert not isinstance(reply, bytes)
        await reply
    with pytest.raises(MalformedMessage, match="questions"):
        conversation.answer("use", use)


@pytest.mark.parametrize(
    "grant", [[], [OID], ["x", "files"], [OID, "rockets"], [OID, 1], "files", {}, 0, ["f" * 16, "files"]]
)
def test_a_forged_report_of_a_missing_grant_ends_the_call(grant: Any) -> None:
    told = {"message": "m", "exception": "E", "traceback": [], "selector": "f"}
    shown = Shown(OID)
    shown.add(OID, (), [])
    assert isinstance(answers.raised(dict(told), shown), MethodRaised)
    assert isinstance(answers.raised({**told, "grant": [OID, "files"]}, shown), GrantMissing)
    with pytest.raises(MalformedMessage):
        answers.raised({**told, "grant": grant}, shown)


# The kinds that need no folder and no host


async def test_a_persona_answers_within_bounds(world: World) -> None:
    await world.grant(NoOptions(kind="ask"))
    assert await world.once("ask", "ask", "How is the weather?") == "Sunny."
    assert await world.once("ask", "ask", "Why?", persona="ROBIN", max_tokens=5) == "I can't say."
    assert [message.role for message in asked(world)] == ["system", "user"]
    for args in ((), ("",), ("x" * 20_000,), ("Why?", "NOBODY"), ("Why?", None, 0), ("Why?", None, 10**6)):
        with pytest.raises(Refused, match=r"ValueError|TypeError"):
            await world.once("ask", "ask", *args)
    assert "weather" not in str(world.events)
    assert "Sunny" not in str(world.events)


async def test_a_call_that_is_given_up_gives_up_its_use(world: World) -> None:
    await world.grant(NoOptions(kind="ask"))
    world.mind._models = {"writer": Scripted([(None, STALL)])}
    call = asyncio.create_task(world.once("ask", "ask", "How long?"))
    while world.mind._serving is None:  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.01)
    serving = world.mind._serving
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert serving.given_up.is_set()
    [told] = [event for event in world.events if event["event"] == "capability"]
    assert told["outcome"] == "CancelledError"


async def test_the_memory_is_searched_in_the_calls_own_view(world: World) -> None:
    await world.grant(NoOptions(kind="recall"))
    assert await world.once("recall", "recall", "bees") == []
    vectors = await world.memory.embed(["Bees like lavender."])
    async with world.image.transaction("remember") as txn:
        catalog = txn.find("knowledge_catalog_obj")
        world.memory.add(catalog, "Bees like lavender.", vectors[0], kind="document")
        [hit] = await world.call(txn).use("recall", "recall", "lavender", k=3)
    assert hit["text"] == "Bees like lavender."
    for args in (("",), ("x", 0), ("x", 1000), ("x", True), ("x", "1")):
        with pytest.raises(Refused, match=r"ValueError|TypeError"):
            await world.once("recall", "recall", *args)


# Slots, prompts, words


async def test_a_method_never_hides_a_grant(world: World) -> None:
    await world.grant(NoOptions(kind="clock"))
    method = UvmMethod("clock", (), "def clock(self):\n    return 1", "", {}, [])
    async with world.image.transaction("t") as txn:
        child = txn.create("child_obj", (txn.find(HOLDER),), {})
        for target in (txn.find(HOLDER), child):
            with pytest.raises(SlotProtected, match="is a grant"):
                history.install(txn, target, method)


async def test_prompts_tell_the_grants_in_reach_and_are_unchanged_without(world: World) -> None:
    brief = MissionBrief(selector="f", description="Do it.")
    async with world.image.transaction("t") as txn:
        target = txn.find(HOLDER)
        target.count = 3
        [before] = prompts.synthesis(brief, target, [], "Rules.", None)
    expected = (
        f"Rules.\n\nThe object {HOLDER}. Its slots: self.count = 3\n\n{prompts.mission_text(brief, target)}"
    )
    assert before.content.startswith(expected)
    await world.grant_files(write=False)
    await world.grant(NoOptions(kind="ask"))
    async with world.image.transaction("t") as txn:
        child = txn.create("child_obj", (txn.find(HOLDER),), {})
        [after] = prompts.synthesis(brief, child, [], "Rules.", None)
    lines = after.content.splitlines()
    assert sum("self.files.read_text(path)" in line for line in lines) == 1
    assert sum("self.ask(question, persona=None, max_tokens=256)" in line for line in lines) == 1
    assert "write_text" not in after.content
    assert "knowledge" not in after.content


def test_the_wire_knows_the_kinds_of_the_table() -> None:
    assert set(COMMANDS["grant"].model_fields["kind"].annotation.__args__) == KINDS.keys()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("/grant a_obj files /tmp", {"kind": "files", "options": {"path": "/tmp", "write": False}}),
        ("/grant a_obj files '/a b' write", {"kind": "files", "options": {"path": "/a b", "write": True}}),
        ("/grant a_obj.inbox files /tmp", {"kind": "files", "slot": "inbox"}),
        ("/grant a_obj http a.com [::1]:8", {"kind": "http", "options": {"hosts": ["a.com", "[::1]:8"]}}),
        ("/grant a_obj clock", {"kind": "clock", "options": {}}),
        ("/revoke a_obj.files", {"command": "revoke", "slot": "files"}),
        ("/grants a_obj", {"command": "grants"}),
    ],
)
def test_grants_are_said_exactly(text: str, fields: dict[str, Any]) -> None:
    command = parse_exact(text)
    assert command is not None
    assert command["target_oid"] == "a_obj"
    assert {**command, **fields} == command


@pytest.mark.parametrize(
    "text",
    [
        "/grant",
        "/grant a_obj",
        "/grant a_obj rockets",
        "/grant a_obj files",
        "/grant a_obj files /tmp read",
        "/grant a_obj files '/tmp",
        "/grant a_obj http",
        "/grant a_obj http http://a.com",
        "/grant a_obj clock now",
        "/grant a_obj._x clock",
        "/revoke a_obj",
    ],
)
def test_grants_said_wrongly_are_explained(text: str) -> None:
    with pytest.raises(InvalidField, match=r"; say /(grant|revoke) OBJECT"):
        parse_exact(text)
