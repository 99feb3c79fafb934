"""What an engine of the mind is, and what goes in and out of it; one module for each engine.

The mind calls a backend from one thread of its own, one call at a time. Imports nothing of BAT OS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length"]
Schema = Mapping[str, Any]

GET_MODELS = "./puter.sh setup"  # what an error about a model's file tells the user to run


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: the answer, without the model's end marks.
        prompt_tokens: length of the prompt.
        prompt_read: tokens of the prompt that had to be read; the others were still in the engine's cache.
        completion_tokens: tokens written.
        finish: `stop`: the model ended its answer; `length`: it was cut at `max_tokens` or the context's end.
    """

    text: str
    prompt_tokens: int
    prompt_read: int
    completion_tokens: int
    finish: Finish


class Backend(Protocol):
    """An engine with one model. All methods block, and are called from one thread at a time.

    Attributes:
        name: the engine's name.
        embedded: the model lives in this process and counts against its memory budget.
        memory_mib: estimate of what the model needs while it is loaded.
        sha256: hex digest of the model, at the latest once it is loaded.
        adapter: name of the adapter that is attached to the model.
        loaded: the model can generate without a load.
    """

    name: ClassVar[str]
    embedded: ClassVar[bool]

    @property
    def memory_mib(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    @property
    def adapter(self) -> str | None: ...

    @property
    def loaded(self) -> bool: ...

    def load(self) -> None:
        """Brings the model into memory.

        Raises:
            ModelUnavailable: it is missing, damaged, or refused; the text says what to do.
        """

    def unload(self) -> None:
        """Frees the model's memory; does nothing if it is not loaded."""

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
        """Returns the model's answer to a conversation.

        Args:
            messages: the conversation, oldest first.
            schema: JSON schema that the answer must follow.
            max_tokens: the answer is cut there.
            temperature: 0 takes the likeliest token each time.
            seed: the same seed and prompt give the same answer.
            on_token: takes each piece of text as it is written.
            cancelled: asked between steps; once it is true, the call ends soon.

        Raises:
            PromptTooLong: the prompt leaves no room in the context.
            GenerationCancelled: `cancelled` became true.
            ValueError: the schema asks for what the engine can't guarantee.
        """
        ...
