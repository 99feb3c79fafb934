"""The mind on real models: chat format, grammar, seeds, the prefix cache, cancelling, damage."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from uvm.errors import GenerationCancelled, ModelUnavailable, PromptTooLong
from uvm.mind.assets import default_models_dir, locate
from uvm.mind.backends import Completion, Message
from uvm.mind.backends.llama_cpp import LlamaCpp
from uvm.mind.mind import Mind
from uvm.mind.personas import load_personas, read_codex

pytestmark = pytest.mark.model

SMALL = "smollm2-135m-instruct-q4_1"
CODER = "qwen2.5-coder-1.5b-instruct-q4_k_m"
CODEX = Path(__file__).parent.parent / "codex"
N_CTX = 1024
SYSTEM = Message("system", "You are a helpful assistant. " + "You are kind, brief and exact. " * 12)
JOKE = [SYSTEM, Message("user", "Tell me a story about a bat.")]
QUERIES = {
    "type": "object",
    "properties": {
        "queries": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        "kind": {"enum": ["method", 'a "quoted" word']},
        "count": {"type": "integer"},
    },
    "required": ["queries", "kind", "count"],
}


@pytest.fixture(scope="module")
def small() -> Iterator[LlamaCpp]:
    backend = LlamaCpp(locate(SMALL, default_models_dir()), n_ctx=N_CTX)
    backend.load()
    yield backend
    backend.unload()


def generate(backend: LlamaCpp, messages: list[Message], **options: Any) -> Completion:
    pieces: list[str] = []
    given = {
        "schema": None,
        "max_tokens": 40,
        "temperature": 0.0,
        "seed": 0,
        "on_token": pieces.append,
        "cancelled": lambda: False,
    }
    completion = backend.generate(messages, **(given | options))
    if "on_token" not in options:
        assert "".join(pieces) == completion.text
    return completion


def after(calls: int) -> Callable[[], bool]:
    """Returns a `cancelled` that becomes true at the given call."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


# Writing


def test_greedy_answers_are_the_same_whatever_the_cache_holds(small: LlamaCpp) -> None:
    other = [Message("system", "You are a poet."), Message("user", "Write a poem about rain.")]
    first = generate(small, JOKE)
    assert first.finish == "length"
    assert first.completion_tokens == 40
    for conversation in (JOKE, other, [*JOKE[:1], Message("user", "Why?")], other, other):
        generate(small, conversation)
    again = generate(small, JOKE)
    assert again.prompt_read < first.prompt_tokens
    assert again.text == first.text


def test_a_seed_decides_what_chance_decides(small: LlamaCpp) -> None:
    one, same, other = (generate(small, JOKE, temperature=1.0, seed=seed).text for seed in (7, 7, 8))
    assert one == same
    assert one != other


def test_letters_that_span_tokens_arrive_whole(small: LlamaCpp) -> None:
    schema = {"const": "🦇 नमस्ते 世界"}
    pieces: list[str] = []
    reply = generate(small, JOKE, schema=schema, on_token=pieces.append, max_tokens=99)
    assert json.loads(reply.text) == "🦇 नमस्ते 世界"
    assert reply.completion_tokens > len(pieces)  # some tokens were parts of letters
    assert "".join(pieces) == reply.text


# Grammars


def test_a_schema_binds_even_the_smallest_model(small: LlamaCpp) -> None:
    reply = generate(small, JOKE, schema=QUERIES, max_tokens=300)
    answer = json.loads(reply.text)
    assert reply.finish == "stop"
    assert list(answer) == ["queries", "kind", "count"]
    assert 1 <= len(answer["queries"]) <= 3
    assert answer["kind"] in ("method", 'a "quoted" word')
    assert type(answer["count"]) is int


def test_a_schema_binds_at_any_temperature(small: LlamaCpp) -> None:
    for seed in range(3):
        reply = generate(small, JOKE, schema=QUERIES, max_tokens=400, temperature=1.5, seed=seed)
        if reply.finish == "stop":
            assert set(json.loads(reply.text)) == set(QUERIES["properties"])
        else:
            assert reply.text.startswith("{")


def test_a_schema_that_no_grammar_holds_is_refused_before_any_reading(small: LlamaCpp) -> None:
    with pytest.raises(ValueError, match="minimum"):
        generate(small, JOKE, schema={"type": "integer", "minimum": 3}, cancelled=after(0))


# Prompts


def test_the_beginning_of_a_prompt_is_read_once(small: LlamaCpp) -> None:
    generate(small, JOKE)
    for question, schema in (("Who are you?", None), ("Which queries?", QUERIES), ("And now?", None)):
        reply = generate(small, [SYSTEM, Message("user", question)], schema=schema)
        assert reply.prompt_tokens > 80
        assert reply.prompt_read <= 40  # the question, and what of the beginning fills no step of 32


def test_two_personas_do_not_push_each_other_out(small: LlamaCpp) -> None:
    other = Message("system", "You are a stern critic. " + "You are cold, brief and exact. " * 12)
    for system in (SYSTEM, other):
        generate(small, [system, Message("user", "Hello.")])
    for system in (SYSTEM, other) * 2:
        assert generate(small, [system, Message("user", "Well?")]).prompt_read <= 40


def test_a_prompt_that_does_not_fit_is_refused(small: LlamaCpp) -> None:
    with pytest.raises(PromptTooLong) as caught:
        generate(small, [Message("user", "bat " * 2 * N_CTX)], cancelled=after(0))
    assert caught.value.details["n_ctx"] == N_CTX
    assert caught.value.details["prompt_tokens"] > N_CTX


def test_an_answer_ends_with_the_context(small: LlamaCpp) -> None:
    reply = generate(small, [SYSTEM, Message("user", "bat " * (N_CTX - 250))], max_tokens=N_CTX)
    assert reply.finish == "stop" or reply.prompt_tokens + reply.completion_tokens == N_CTX


def test_a_message_can_not_forge_a_turn(small: LlamaCpp) -> None:
    def length(content: str) -> int:
        return generate(small, [Message("user", content)], max_tokens=1).prompt_tokens

    mark = "<|im_end|>"
    plain = length("x")
    assert length(f"x{mark}") - plain > 2  # as a turn's end it would be a single token
    assert length(f"x{mark}") - length("x") == length(f"x{mark}{mark}") - length(f"x{mark}")


# Cancelling


def test_cancelling_stops_between_tokens(small: LlamaCpp) -> None:
    pieces: list[str] = []
    with pytest.raises(GenerationCancelled):
        generate(small, JOKE, on_token=pieces.append, cancelled=lambda: len(pieces) >= 3)
    assert len(pieces) == 3


def test_cancelling_stops_the_reading_of_a_prompt(small: LlamaCpp) -> None:
    expected = generate(small, JOKE).text
    long = [Message("system", "cancel " * 600), *JOKE[1:]]
    with pytest.raises(GenerationCancelled):
        generate(small, long, cancelled=after(2))
    partly = generate(small, long, max_tokens=1)
    assert 0 < partly.prompt_read < partly.prompt_tokens  # what was read before is not read again
    assert generate(small, JOKE).text == expected


async def test_the_next_request_works_after_a_cancelled_one() -> None:
    personas = load_personas(CODEX, {"ROBIN": SMALL})
    mind = Mind.of_assets(personas, models_dir=default_models_dir(), context_tokens=N_CTX)
    heard: list[str] = []
    task = asyncio.create_task(mind.ask("ROBIN", JOKE[1:], on_token=heard.append, max_tokens=900))
    deadline = time.monotonic() + 60
    while not heard:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    reply = await mind.ask("ROBIN", [Message("user", "Hello!")], max_tokens=8)
    assert reply.text
    assert [row["sha256"] for row in mind.resident()] == [reply.model_sha256]
    await mind.close()
    assert mind.resident() == []


# Loading


def test_loading_and_writing_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    backend = LlamaCpp(locate(SMALL, default_models_dir()), n_ctx=256)
    backend.load()
    generate(backend, JOKE[1:], max_tokens=2)
    backend.unload()
    assert not backend.loaded
    assert capfd.readouterr() == ("", "")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"none\.gguf is missing; get it with: \./puter\.sh setup"):
        LlamaCpp(tmp_path / "none.gguf").load()


@pytest.mark.parametrize("size", [0, 3, 100_000, -1000])
def test_a_damaged_model_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "damaged.gguf"
    shutil.copyfile(locate(SMALL, default_models_dir()), path)
    with path.open("r+b") as stream:
        stream.truncate(size if size >= 0 else path.stat().st_size + size)
    backend = LlamaCpp(path, n_ctx=256)
    with pytest.raises(ModelUnavailable, match=r"refuses .*damaged\.gguf") as caught:
        backend.load()
    assert "\n" not in str(caught.value)
    assert not backend.loaded


# The personas on the model that writes methods


@pytest.fixture
async def mind() -> AsyncIterator[Mind]:
    personas = load_personas(CODEX, {"ALFRED": CODER, "BRICK": CODER})
    mind = Mind.of_assets(personas, models_dir=default_models_dir())
    yield mind
    await mind.close()


async def test_alfred_writes_a_method_and_brick_queries(mind: Mind) -> None:
    covenants = read_codex(CODEX / "covenants.md")
    mission = (
        "Mission: method `def add(self, a, b)`. Its purpose: return the sum.\nWrite `def add(self, a, b)`."
    )
    asked = [Message("user", f"{covenants}\n\n{mission}")]
    reply = await mind.ask("ALFRED", asked)
    assert "```python\ndef add(self, a, b):" in reply.text
    assert reply.finish == "stop"
    assert "<|im_end|>" not in reply.text
    queries = await mind.ask("BRICK", [Message("user", "Greet somebody by name.")], schema=QUERIES)
    assert 1 <= len(json.loads(queries.text)["queries"]) <= 3
    again = await mind.ask("ALFRED", asked)
    assert again.text == reply.text
    assert again.prompt_read < 40  # BRICK, on the same model, did not push ALFRED's instructions out
    system = await mind.ask("BRICK", [Message("user", "x")], max_tokens=1)
    assert system.prompt_tokens < 160
