"""The mind: asks a persona's model and gives back its reply.

Whoever thinks calls `Mind.ask`; backends do the work, in one thread: a second generation at the same time
would slow both down. Imports no engine before it is needed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from uvm.errors import GenerationCancelled, InvalidField, ShuttingDown
from uvm.mind.assets import locate
from uvm.mind.backends import Backend, Completion, Finish, Message, Schema
from uvm.mind.backends.llama_cpp import LlamaCpp
from uvm.mind.backends.scripted import Scripted
from uvm.mind.personas import Persona

OnEvent = Callable[..., Awaitable[None]]
T = TypeVar("T")

_SCRIPTED = "scripted:"
_PATIENCE = 4  # how many later requests may go first because their model is loaded


@dataclass(frozen=True, slots=True)
class Reply:
    """A persona's answer, and how it came about.

    Attributes:
        prompt_read: tokens of the prompt that were read; the others came from the engine's cache.
        seconds: of reading and writing, without the time in the queue and for loading.
        model: name of the model; `model_sha256` is the digest of its file.
        adapter: name of the adapter that was attached to it.
    """

    text: str
    prompt_tokens: int
    prompt_read: int
    completion_tokens: int
    seconds: float
    finish: Finish
    model: str
    model_sha256: str
    adapter: str | None
    persona: str


class _Request:
    """A call of `ask` on its way; `given_up` tells the engine that nobody waits any more."""

    def __init__(self, model: str, generate: Callable[[Backend, Callable[[], bool]], Reply]) -> None:
        self.model = model
        self.generate = generate
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.given_up = threading.Event()
        self.passed_over = 0

    def settle(self, outcome: Reply | BaseException) -> None:
        if self.reply.done():
            return
        if isinstance(outcome, BaseException):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)


class Mind:
    """Personas and the models that speak for them; serves one request at a time.

    A model is loaded when it is first asked and stays until another one needs its memory.

    Args:
        personas: by name.
        models: by the names that the personas give; personas that name the same model share it.
        on_event: awaited with an event's name and fields: `model_loading` (`model`, `bytes`) before a load,
            `model_swapped` (`model`, `bytes`, `seconds`, `unloaded`) after it.
        memory_budget_mib: for all loaded models together; None is no limit. A model that alone is larger is
            loaded alone.
    """

    def __init__(
        self,
        personas: Mapping[str, Persona],
        models: Mapping[str, Backend],
        *,
        on_event: OnEvent | None = None,
        memory_budget_mib: int | None = None,
    ) -> None:
        self.personas = personas
        self._models = models
        self._on_event = on_event
        self._budget_mib = memory_budget_mib
        self._waiting: list[_Request] = []
        self._serving: _Request | None = None
        self._server: asyncio.Task[None] | None = None
        self._loaded: list[str] = []  # the least recently used first
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mind")

    @classmethod
    def of_assets(
        cls,
        personas: Mapping[str, Persona],
        *,
        models_dir: Path,
        context_tokens: int = 4096,
        threads: int | None = None,
        memory_budget_mib: int | None = None,
        on_event: OnEvent | None = None,
    ) -> Mind:
        """Returns a mind whose models are what the personas name.

        A name is one of the catalogue, a path of a GGUF file, or `scripted:` and the path of a script.

        Args:
            models_dir: where assets are kept.
            context_tokens: length of prompt and answer together.
            threads: threads that compute; None is one for each core.

        Raises:
            AssetError: a model is missing or damaged; the text says what to do.
            ValueError: a script is none.
        """

        def backend(name: str) -> Backend:
            if name.startswith(_SCRIPTED):
                return Scripted.from_file(Path(name.removeprefix(_SCRIPTED)))
            return LlamaCpp(locate(name, models_dir), n_ctx=context_tokens, n_threads=threads)

        models = {name: backend(name) for name in {persona.model for persona in personas.values()}}
        return cls(personas, models, on_event=on_event, memory_budget_mib=memory_budget_mib)

    async def ask(
        self,
        persona: str,
        messages: Sequence[Message],
        *,
        schema: Schema | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        on_token: Callable[[str], None] | None = None,
    ) -> Reply:
        """Returns a persona's answer to a conversation; its system prompt goes first.

        Cancelling the calling task stops the generation.

        Args:
            persona: its name.
            messages: the conversation, oldest first.
            schema: JSON schema that the answer will follow.
            max_tokens: the answer is cut there; None is as the persona has it.
            temperature: 0 takes the likeliest token each time; None is as the persona has it.
            seed: the same seed and prompt give the same answer.
            on_token: called on the event loop with each piece of text as it is written.

        Raises:
            InvalidField: there is no such persona.
            ModelUnavailable: its model is missing, damaged, or refused by its engine.
            PromptTooLong: the prompt does not fit the model's context.
            ValueError: the schema asks for what the engine can't guarantee.
            GenerationCancelled: the mind was closed meanwhile.
            ShuttingDown: the mind was closed before.
        """
        if self._closed:
            raise ShuttingDown("the mind is closed")
        who = self.personas.get(persona)
        if who is None:
            raise InvalidField(f"there is no persona {persona!r}", persona=persona)
        conversation = [Message("system", who.system), *messages]
        deliver = _on_loop(on_token)

        def generate(backend: Backend, cancelled: Callable[[], bool]) -> Reply:
            started = time.perf_counter()
            completion = backend.generate(
                conversation,
                schema=schema,
                max_tokens=who.max_tokens if max_tokens is None else max_tokens,
                temperature=who.temperature if temperature is None else temperature,
                seed=seed,
                on_token=deliver,
                cancelled=cancelled,
            )
            return _reply(completion, time.perf_counter() - started, who, backend)

        request = _Request(who.model, generate)
        self._waiting.append(request)
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        try:
            return await request.reply
        finally:
            request.given_up.set()

    def resident(self) -> list[dict[str, Any]]:
        """Returns the loaded models as plain data, the least recently used first."""
        found = [(name, self._models[name]) for name in self._loaded]
        return [
            {
                "model": name,
                "engine": backend.name,
                "memory_mib": backend.memory_mib,
                "sha256": backend.sha256,
                "adapter": backend.adapter,
            }
            for name, backend in found
        ]

    async def close(self) -> None:
        """Stops what is being generated, refuses what waits, and unloads the models."""
        self._closed = True
        for request in [*self._waiting, *([self._serving] if self._serving else [])]:
            request.given_up.set()
            request.settle(GenerationCancelled("the mind was closed"))
        if self._server is not None:
            await self._server
        for name in list(self._loaded):
            await self._unload(name)
        self._thread.shutdown()

    async def _serve(self) -> None:
        """Serves until nobody waits."""
        while request := self._next():
            self._serving = request
            try:
                await self._bring(request.model)
                backend = self._models[request.model]
                outcome = await self._in_thread(request.generate, backend, request.given_up.is_set)
            except Exception as error:
                request.settle(error)
            else:
                request.settle(outcome)
            self._serving = None

    def _next(self) -> _Request | None:
        """Takes the request to serve: the oldest whose model is loaded, unless the oldest waited enough."""
        self._waiting = [request for request in self._waiting if not request.given_up.is_set()]
        if not self._waiting:
            return None
        oldest = self._waiting[0]
        chosen = next((request for request in self._waiting if request.model in self._loaded), oldest)
        if chosen is not oldest:
            if oldest.passed_over >= _PATIENCE:
                chosen = oldest
            else:
                oldest.passed_over += 1
        self._waiting.remove(chosen)
        return chosen

    async def _bring(self, name: str) -> None:
        """Loads a model unless it is loaded, and makes it the most recently used."""
        if name in self._loaded:
            self._loaded.append(self._loaded.pop(self._loaded.index(name)))
            return
        backend = self._models[name]
        size = backend.memory_mib << 20
        await self._tell("model_loading", model=name, bytes=size)
        started = time.perf_counter()
        unloaded = await self._make_room(backend.memory_mib)
        await self._in_thread(backend.load)
        self._loaded.append(name)
        seconds = round(time.perf_counter() - started, 3)
        await self._tell("model_swapped", model=name, bytes=size, seconds=seconds, unloaded=unloaded)

    async def _make_room(self, needed_mib: int) -> list[str]:
        """Unloads the least recently used models until `needed_mib` fits; returns their names."""
        unloaded: list[str] = []
        while self._loaded and self._budget_mib is not None:
            used = sum(self._models[name].memory_mib for name in self._loaded)
            if used + needed_mib <= self._budget_mib:
                break
            unloaded.append(self._loaded[0])
            await self._unload(self._loaded[0])
        return unloaded

    async def _unload(self, name: str) -> None:
        self._loaded.remove(name)
        await self._in_thread(self._models[name].unload)

    async def _tell(self, event: str, **fields: Any) -> None:
        if self._on_event is not None:
            await self._on_event(event, **fields)

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


def _on_loop(on_token: Callable[[str], None] | None) -> Callable[[str], None]:
    """Returns what the mind's thread may call to have `on_token` called on the event loop."""
    if on_token is None:
        return lambda _: None
    loop = asyncio.get_running_loop()

    def deliver(text: str) -> None:
        loop.call_soon_threadsafe(on_token, text)

    return deliver


def _reply(completion: Completion, seconds: float, persona: Persona, backend: Backend) -> Reply:
    return Reply(
        text=completion.text,
        prompt_tokens=completion.prompt_tokens,
        prompt_read=completion.prompt_read,
        completion_tokens=completion.completion_tokens,
        seconds=seconds,
        finish=completion.finish,
        model=persona.model,
        model_sha256=backend.sha256,
        adapter=backend.adapter,
        persona=persona.name,
    )
