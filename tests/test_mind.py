"""The mind with scripted engines: who speaks, in what order, what is loaded, and how a generation ends."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from uvm.errors import ConfigError, GenerationCancelled, InvalidField, ModelUnavailable, ShuttingDown
from uvm.guardian import PersistenceGuardian
from uvm.mind.backends import Backend, Completion, Message
from uvm.mind.backends.grammar import grammar_of
from uvm.mind.backends.scripted import STALL, Scripted
from uvm.mind.mind import Mind
from uvm.mind.personas import Persona, load_personas, read_codex

CODEX = Path(__file__).parent.parent / "codex"
HELLO = [Message("user", "hello there")]


def mind_of(*backends: Backend, **options: Any) -> Mind:
    """Returns a mind with one persona for each backend: P0 on model m0, P1 on m1, …"""
    personas = {f"P{n}": Persona(f"P{n}", f"You are P{n}.", f"m{n}") for n in range(len(backends))}
    return Mind(personas, {f"m{n}": backend for n, backend in enumerate(backends)}, **options)


async def until(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        await asyncio.sleep(0.001)


class Gated(Scripted):
    """A scripted engine of a given size that notes its work and waits for its gate before it answers."""

    notes: ClassVar[list[str]] = []

    def __init__(self, name: str, memory_mib: int = 0) -> None:
        super().__init__([(None, self._answer)])
        self.label = name
        self.memory_mib = memory_mib
        self.gate = threading.Event()
        self.gate.set()

    def load(self) -> None:
        super().load()
        self.notes.append(f"+{self.label}")

    def unload(self) -> None:
        super().unload()
        self.notes.append(f"-{self.label}")

    def _answer(self, messages: Any) -> str:
        assert self.gate.wait(5)
        assert self.loaded
        self.notes.append(f"{self.label}:{messages[-1].content}")
        return f"{self.label} heard {messages[-1].content}"


@pytest.fixture
def notes() -> list[str]:
    Gated.notes = []
    return Gated.notes


def say(text: str) -> list[Message]:
    return [Message("user", text)]


# Asking


async def test_a_reply_says_how_it_came_about() -> None:
    backend = Scripted([(None, "hello to you")])
    mind = mind_of(backend)
    pieces: list[str] = []
    reply = await mind.ask("P0", HELLO, on_token=pieces.append)
    assert reply.text == "".join(pieces) == "hello to you"
    assert (reply.persona, reply.model, reply.model_sha256) == ("P0", "m0", backend.sha256)
    assert (reply.finish, reply.completion_tokens, reply.prompt_tokens) == ("stop", 3, 5)
    assert reply.adapter is None
    assert reply.seconds >= 0
    assert backend.prompts == [(Message("system", "You are P0."), *HELLO)]
    await mind.close()


async def test_tokens_arrive_on_the_event_loop() -> None:
    mind = mind_of(Scripted([(None, "a b c")]))
    threads: set[int] = set()
    await mind.ask("P0", HELLO, on_token=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}
    await mind.close()


async def test_an_answer_is_cut_at_max_tokens() -> None:
    mind = mind_of(Scripted([(None, "one two three")]))
    reply = await mind.ask("P0", HELLO, max_tokens=2)
    assert (reply.text, reply.finish, reply.completion_tokens) == ("one two", "length", 2)
    await mind.close()


async def test_an_unknown_persona_is_refused() -> None:
    mind = mind_of(Scripted([(None, "x")]))
    with pytest.raises(InvalidField, match="JOKER"):
        await mind.ask("JOKER", HELLO)
    await mind.close()


async def test_a_failing_engine_fails_its_request_only() -> None:
    def broken(_: Any) -> str:
        raise RuntimeError("out of ideas")

    mind = mind_of(Scripted([("break", broken), (None, "fine")]))
    broken_ask, fine = await asyncio.gather(
        mind.ask("P0", say("break")), mind.ask("P0", HELLO), return_exceptions=True
    )
    assert isinstance(broken_ask, RuntimeError)
    assert not isinstance(fine, BaseException)
    assert fine.text == "fine"
    await mind.close()


# One at a time, model by model


async def test_personas_share_a_model(notes: list[str]) -> None:
    personas = {name: Persona(name, f"You are {name}.", "m") for name in ("ALFRED", "BRICK")}
    backend = Gated("a")
    mind = Mind(personas, {"m": backend})
    await asyncio.gather(*(mind.ask(name, say(name)) for name in personas))
    assert notes == ["+a", "a:ALFRED", "a:BRICK"]
    assert [prompt[0].content for prompt in backend.prompts] == ["You are ALFRED.", "You are BRICK."]
    await mind.close()


async def test_requests_for_a_loaded_model_go_first_but_not_for_ever(notes: list[str]) -> None:
    a, b = Gated("a", 60), Gated("b", 60)
    mind = mind_of(a, b, memory_budget_mib=100)
    a.gate.clear()
    asks = [asyncio.create_task(mind.ask("P0", say("first")))]
    await until(lambda: bool(a.prompts))
    asks.append(asyncio.create_task(mind.ask("P1", say("other"))))
    asks += [asyncio.create_task(mind.ask("P0", say(f"later {n}"))) for n in range(6)]
    await asyncio.sleep(0)
    a.gate.set()
    await asyncio.gather(*asks)
    order = [note for note in notes if ":" in note]
    assert order[0] == "a:first"
    assert order.index("b:other") == 5  # four later ones went before it
    assert [note for note in notes if ":" not in note] == ["+a", "-a", "+b", "-b", "+a"]
    await mind.close()


async def test_the_least_recently_used_model_makes_room(notes: list[str]) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    async def on_event(event: str, **fields: Any) -> None:
        events.append((event, fields))

    mind = mind_of(
        *(Gated(name, 40) for name in "abc"), Gated("d", 500), memory_budget_mib=100, on_event=on_event
    )
    for persona in ("P0", "P1", "P0", "P2"):
        await mind.ask(persona, HELLO)
    assert [row["model"] for row in mind.resident()] == ["m0", "m2"]
    await mind.ask("P3", HELLO)  # larger than the budget: alone
    assert [row["model"] for row in mind.resident()] == ["m3"]
    swaps = [fields for event, fields in events if event == "model_swapped"]
    assert [event for event, _ in events] == ["model_loading", "model_swapped"] * 4
    assert [(swap["model"], swap["unloaded"]) for swap in swaps] == [
        ("m0", []),
        ("m1", []),
        ("m2", ["m1"]),
        ("m3", ["m0", "m2"]),
    ]
    assert swaps[0]["bytes"] == 40 << 20
    assert all(swap["seconds"] >= 0 for swap in swaps)
    await mind.close()
    assert notes[-1] == "-d"
    assert mind.resident() == []


async def test_a_model_that_does_not_load_is_tried_again(notes: list[str]) -> None:
    class Late(Gated):
        there = False

        def load(self) -> None:
            if not self.there:
                raise ModelUnavailable("it is missing; get it")
            super().load()

    late = Late("late")
    mind = mind_of(late)
    with pytest.raises(ModelUnavailable, match="get it"):
        await mind.ask("P0", HELLO)
    assert mind.resident() == []
    late.there = True
    assert (await mind.ask("P0", HELLO)).text == "late heard hello there"
    await mind.close()


# Cancelling and closing


async def test_cancelling_the_task_stops_the_generation() -> None:
    backend = Scripted([("stall", STALL), (None, "next")])
    mind = mind_of(backend)
    task = asyncio.create_task(mind.ask("P0", say("stall")))
    await until(lambda: bool(backend.prompts))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await asyncio.wait_for(mind.ask("P0", HELLO), 5)).text == "next"
    await mind.close()


async def test_a_request_cancelled_in_the_queue_is_never_generated() -> None:
    backend = Scripted([("stall", STALL), (None, "never")])
    mind = mind_of(backend)
    running = asyncio.create_task(mind.ask("P0", say("stall")))
    await until(lambda: bool(backend.prompts))
    waiting = asyncio.create_task(mind.ask("P0", say("too late")))
    await asyncio.sleep(0)
    waiting.cancel()
    running.cancel()
    await asyncio.gather(waiting, running, return_exceptions=True)
    await mind.close()
    assert [prompt[-1].content for prompt in backend.prompts] == ["stall"]


async def test_closing_ends_what_runs_and_what_waits() -> None:
    backend = Scripted([(None, STALL)])
    mind = mind_of(backend)
    asks = [asyncio.create_task(mind.ask("P0", HELLO)) for _ in range(2)]
    await until(lambda: bool(backend.prompts))
    await asyncio.wait_for(mind.close(), 5)
    for task in asks:
        with pytest.raises(GenerationCancelled):
            await task
    assert len(backend.prompts) == 1
    assert not backend.loaded
    with pytest.raises(ShuttingDown):
        await mind.ask("P0", HELLO)


# Scripts


def recite(backend: Scripted, *questions: str, cancelled: bool = False) -> list[str]:
    def answer(question: str) -> Completion:
        return backend.generate(
            say(question),
            schema=None,
            max_tokens=99,
            temperature=0,
            seed=0,
            on_token=lambda _: None,
            cancelled=lambda: cancelled,
        )

    return [answer(question).text for question in questions]


def test_a_script_is_table_and_sequence() -> None:
    backend = Scripted([("write", "bad"), ("write", "good"), (None, lambda heard: heard[-1].content.upper())])
    assert recite(backend, "write", "what?", "write it", "what?", "write") == [
        "bad",
        "WHAT?",
        "good",
        "WHAT?",
        "good",
    ]


def test_a_reply_keeps_its_space() -> None:
    text = "  a\n\n  b \t c\n"
    assert recite(Scripted([(None, text)]), "?") == [text]


def test_what_no_line_fits_is_an_error() -> None:
    with pytest.raises(ModelUnavailable, match="no reply to: riddle"):
        recite(Scripted([("fact", "yes")]), "riddle")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [((None, " \n"), "line 0: the reply is empty"), (("(", "x"), "line 0: pattern")],
)
def test_a_bad_line_is_refused(line: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Scripted([line])


def test_a_script_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text(json.dumps([{"pattern": "hi", "reply": "hello"}, {"stall": True}]), "utf-8")
    assert recite(Scripted.from_file(path), "hi") == ["hello"]


def test_a_reply_of_a_file_may_be_a_template(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    line = {"pattern": r"add (\d+)", "reply": r"x + \1", "expand": True}
    path.write_text(json.dumps([line, {"reply": r"x + \1"}]), "utf-8")
    assert recite(Scripted.from_file(path), "add 7", "add 12", "else") == ["x + 7", "x + 12", r"x + \1"]


def test_a_reply_of_a_file_that_takes_its_time_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text(json.dumps([{"reply": "at last", "seconds": 600}]), "utf-8")
    with pytest.raises(GenerationCancelled):
        recite(Scripted.from_file(path), "hello", cancelled=True)


@pytest.mark.parametrize("text", ["", "7", '["x"]', '[{"pattern": "a"}]', '[{"pattern": 1, "reply": "x"}]'])
def test_a_file_that_is_no_script_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "script.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=str(path)):
        Scripted.from_file(path)


async def test_personas_may_name_a_script(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text('[{"reply": "by heart"}]', "utf-8")
    mind = Mind.of_assets(load_personas(CODEX, {"ROBIN": f"scripted:{path}"}), models_dir=tmp_path)
    assert (await mind.ask("ROBIN", HELLO)).text == "by heart"
    await mind.close()


# The codex


def test_every_persona_has_a_codex() -> None:
    models = dict.fromkeys(("ALFRED", "BRICK", "ROBIN", "BABS"), "m")
    for name, persona in load_personas(CODEX, models).items():
        assert persona.system.startswith(f"You are {name}")
        assert len(persona.system.split()) <= 100  # a model on a CPU reads it word by word


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_bad_codex_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "alfred.md").write_bytes(content)
    with pytest.raises(ConfigError, match=r"alfred\.md"):
        load_personas(tmp_path, {"ALFRED": "m"})


def test_the_examples_of_the_covenants_keep_them() -> None:
    blocks = read_codex(CODEX / "covenants.md").split("```python\n")[1:3]
    for block, call in zip(blocks, ("area(radius)", "visit(guest)"), strict=True):
        selector, _, parameter = call.rstrip(")").partition("(")
        audit = PersistenceGuardian().audit_code(block.partition("```")[0], selector, (parameter,))
        assert not audit.findings


# Grammars: what the library refuses and lets pass is its own affair; these are ours


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 1},
        {"type": "string", "format": "email"},
        {"type": "string", "pattern": "^a+$", "maxLength": 3},
        {"type": "array", "minItems": 1},
        {"type": "thing"},
        {"$ref": "#/$defs/missing"},
        {"properties": {"a": {"not": {"type": "null"}}}},
        {"anyOf": [{"type": "string"}, 7]},
    ],
)
def test_a_schema_that_no_grammar_holds_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"schema|grammar"):
        grammar_of(schema)


def test_literals_of_a_grammar_are_written_as_json() -> None:
    grammar = grammar_of({"enum": ['say "é"', "back\\slash"]})
    assert r'"\"say \\\"é\\\"\""' in grammar
    assert r'"\"back\\\\slash\""' in grammar


def test_strings_of_a_grammar_have_no_raw_line_ends() -> None:
    assert r"\x00-\x1F" in grammar_of({"type": "string", "title": "a title says nothing"})
