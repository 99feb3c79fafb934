"""The embedded engine: a GGUF model in this process, through llama.cpp.

`llama_engine` does the work, on the library's low-level interface. Importing this module imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from uvm.errors import ModelUnavailable, PromptTooLong
from uvm.mind.assets import sha256_of
from uvm.mind.backends import GET_MODELS, Completion, Message, Schema
from uvm.mind.backends.grammar import grammar_of

if TYPE_CHECKING:
    from uvm.mind.backends.llama_engine import Engine

_KV_BYTES_PER_TOKEN = 64 * 1024  # generous for models up to 7B


class LlamaCpp:
    """A GGUF model that llama.cpp runs.

    Args:
        path: the model's file; it is memory-mapped.
        n_ctx: tokens of prompt and answer together.
        n_threads: threads that compute; None takes every core that this process may use.
        prompts_kept: how many prompts' beginnings stay in memory, so that personas which share the model do
            not make it read their instructions anew; each takes a context's memory.
        n_gpu_layers: layers put on a GPU, where there is one; -1 is all.
    """

    name: ClassVar[str] = "llama_cpp"
    embedded: ClassVar[bool] = True
    adapter = None

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        prompts_kept: int = 2,
        n_gpu_layers: int = -1,
    ) -> None:
        self.path = path
        self.n_ctx = n_ctx
        self.n_threads = n_threads or available_cores()
        self.prompts_kept = prompts_kept
        self.n_gpu_layers = n_gpu_layers
        self.sha256 = ""
        self._engine: Engine | None = None

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    @property
    def memory_mib(self) -> int:
        size = self.path.stat().st_size if self.path.exists() else 0
        return (size + self.n_ctx * self.prompts_kept * _KV_BYTES_PER_TOKEN) >> 20

    def load(self) -> None:
        if self._engine is None:
            if not self.path.is_file():
                raise ModelUnavailable(
                    f"{self.path} is missing; get it with: {GET_MODELS}", path=str(self.path)
                )
            from uvm.mind.backends.llama_engine import Engine

            self.sha256 = sha256_of(self.path)
            self._engine = Engine(
                self.path,
                n_ctx=self.n_ctx,
                n_threads=self.n_threads,
                prompts_kept=self.prompts_kept,
                n_gpu_layers=self.n_gpu_layers,
            )

    def unload(self) -> None:
        if self._engine is not None:
            self._engine.free()
            self._engine = None

    def generate(
        self,
        messages: Sequence[Message],
        *,
        schema: Schema | None,
        max_tokens: int,
        temperature: float,
        seed: int,
        on_token: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Completion:
        if self._engine is None:
            raise ModelUnavailable(f"{self.path.name} is not loaded", path=str(self.path))
        engine = self._engine
        prompt = engine.tokens_of(messages)
        room = self.n_ctx - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context {self.n_ctx}",
                prompt_tokens=len(prompt),
                n_ctx=self.n_ctx,
            )
        grammar = None if schema is None else grammar_of(schema)
        with engine.sampler(temperature=temperature, seed=seed, grammar=grammar) as sampler:
            read = engine.read(prompt, cancelled)
            text, written, finish = engine.write(sampler, min(max_tokens, room), on_token, cancelled)
        return Completion(text, len(prompt), read, written, finish)


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
