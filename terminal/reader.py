"""The client's own model at the parser's service. Nothing is loaded before the first sentence."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from config import Settings
from uvm.mind.assets import locate
from uvm.mind.backends import Backend
from uvm.mind.backends.llama_cpp import LlamaCpp
from uvm.mind.backends.scripted import Scripted
from uvm.parser import Context, Parser, Reading

Say = Callable[[str], None]

_SCRIPTED = "scripted:"


def open_parser(settings: Settings, say: Say = lambda text: None) -> Parser:
    """Returns a parser with the model of `LLAMA_MODEL_PATH`, which may be `scripted:` and a script's path.

    Args:
        say: told when the model is about to be loaded, which takes seconds.
    """

    def open_model() -> Backend:
        name = settings.LLAMA_MODEL_PATH
        if name.startswith(_SCRIPTED):
            return Scripted.from_file(Path(name.removeprefix(_SCRIPTED)))
        path = locate(name, settings.MODELS_DIR)
        say(f"The first sentence takes longer: loading {path.stem}")
        return LlamaCpp(
            path, n_ctx=settings.CONTEXT_TOKENS, n_threads=settings.INFERENCE_THREADS, prompts_kept=1
        )

    return Parser(open_model)


class Reader:
    """Reads texts in a thread, one at a time."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self._parser = open_parser(settings, say)
        self._lock = threading.Lock()

    async def read(self, text: str, context: Context) -> Reading:
        """Returns what `text` means, as `Parser.read` does; being cancelled stops the model."""
        given_up = threading.Event()
        try:
            return await asyncio.to_thread(self._parse, text, context, given_up.is_set)
        finally:
            given_up.set()

    def _parse(self, text: str, context: Context, cancelled: Callable[[], bool]) -> Reading:
        with self._lock:  # a reading that was given up may still be on its way out
            return self._parser.read(text, context, cancelled)
