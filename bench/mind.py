"""`python -m bench mind`: tokens a second through `Mind.ask` beside bare llama.cpp.

Both run the same file with as many threads, read the same prompt and write as many tokens, in turns, so that
what the machine does meanwhile falls on both. Bare is the tightest loop that the library allows, in a
process of its own with the library's own settings: `llama_decode` and the greedy sampler, nothing else.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from bench.figures import Figure, beside
from uvm.mind.assets import default_models_dir, locate
from uvm.mind.backends import Message
from uvm.mind.backends.llama_cpp import LlamaCpp, available_cores
from uvm.mind.mind import Mind
from uvm.mind.personas import Persona

MODEL = "qwen2.5-coder-1.5b-instruct-q4_k_m"
ROUNDS = 6
TOKENS = 64  # written in each round
CONTEXT = 2048
SYSTEM = "You are a patient teacher of programming. You explain everything step by step, with an example."
QUESTION = (
    "Explain in great detail how a hash table works, what can go wrong with it, and how that is mended."
)
REPEATED = 8  # how often the prompt says so, to give the engine something to read


@dataclass(frozen=True, slots=True)
class Pass:
    """A prompt read and an answer written, each in tokens a second."""

    read: float
    written: float


async def run() -> list[Figure]:
    """Measures and returns the figures.

    Raises:
        AssetError: the model is missing.
    """
    path = await asyncio.to_thread(locate, MODEL, default_models_dir())
    await asyncio.to_thread(_into_page_cache, path)
    ours = _Ours(path)
    loop = asyncio.get_running_loop()
    mine: list[Pass] = []
    raws: list[Pass] = []
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        raw_load_s = await loop.run_in_executor(other, _load_bare, path)
        await ours.load()
        for number in range(ROUNDS):
            question = "\n".join([f"Question {number}.", *[QUESTION] * REPEATED])
            if number % 2:
                mine.append(await ours.turn(question))
            raws.append(await loop.run_in_executor(other, _turn_bare, path, question))
            if not number % 2:
                mine.append(await ours.turn(question))
    await ours.close()
    written, raw_written = (median(each.written for each in passes) for passes in (mine, raws))
    read, raw_read = (median(each.read for each in passes) for passes in (mine, raws))
    return [
        beside("tokens written", written, "1/s", raw_written),
        beside("prompt tokens read", read, "1/s", raw_read),
        beside("model loaded", ours.load_s, "s", raw_load_s),
    ]


def _into_page_cache(path: Path) -> None:
    with path.open("rb") as stream:
        hashlib.file_digest(stream, "sha1")


class _Ours:
    """The mind as the kernel uses it."""

    def __init__(self, path: Path) -> None:
        backend = LlamaCpp(path, n_ctx=CONTEXT)
        self._mind = Mind({"P": Persona("P", SYSTEM, MODEL)}, {MODEL: backend}, on_event=self._note)
        self.load_s = 0.0

    async def _note(self, _event: str, **fields: Any) -> None:
        self.load_s = fields.get("seconds", self.load_s)

    async def load(self) -> None:
        await self._mind.ask("P", [Message("user", "Hi")], max_tokens=1)

    async def turn(self, question: str) -> Pass:
        heard: list[float] = []
        started = time.perf_counter()
        reply = await self._mind.ask(
            "P",
            [Message("user", question)],
            max_tokens=TOKENS,
            on_token=lambda _: heard.append(time.perf_counter()),
        )
        ended = time.perf_counter()
        return Pass(
            read=reply.prompt_read / (heard[0] - started),
            written=(reply.completion_tokens - 1) / (ended - heard[0]),
        )

    async def close(self) -> None:
        await self._mind.close()


@cache
def _bare(path: Path) -> _Bare:
    return _Bare(path)


def _load_bare(path: Path) -> float:
    return _bare(path).load_s


def _turn_bare(path: Path, question: str) -> Pass:
    return _bare(path).turn(question)


class _Bare:
    """llama.cpp and nothing else."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import llama_cpp as lib

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
        self._lib = lib
        started = time.perf_counter()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = CONTEXT
        params.n_threads = params.n_threads_batch = available_cores()
        self._ctx = lib.llama_init_from_model(self._model, params)
        self.load_s = time.perf_counter() - started
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self._chain, lib.llama_sampler_init_greedy())

    def turn(self, question: str) -> Pass:
        lib, ctx, chain = self._lib, self._ctx, self._chain
        tokens, count = self._tokens(question)
        lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
        started = time.perf_counter()
        lib.llama_decode(ctx, lib.llama_batch_get_one(tokens, count))
        token = (lib.llama_token * 1)(lib.llama_sampler_sample(chain, ctx, -1))
        first = time.perf_counter()
        batch = lib.llama_batch_get_one(token, 1)
        for _ in range(TOKENS - 1):
            lib.llama_decode(ctx, batch)
            token[0] = lib.llama_sampler_sample(chain, ctx, -1)
        return Pass(read=count / (first - started), written=(TOKENS - 1) / (time.perf_counter() - first))

    def _tokens(self, question: str) -> tuple[Any, int]:
        """Returns the tokens of the prompt in the model's chat format, and their number."""
        lib = self._lib
        template = lib.llama_model_chat_template(self._model, None)
        turns = (lib.llama_chat_message * 2)((b"system", SYSTEM.encode()), (b"user", question.encode()))
        text = ctypes.create_string_buffer(16384)
        size = lib.llama_chat_apply_template(template, turns, 2, True, text, len(text))
        tokens = (lib.llama_token * CONTEXT)()
        count = lib.llama_tokenize(self._vocab, text.raw[:size], size, tokens, CONTEXT, False, True)
        return tokens, count
