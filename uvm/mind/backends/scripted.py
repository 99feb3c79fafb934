"""An engine without a model: it answers from a script. For tests and demonstrations.

Imports only the contract of a backend and `errors`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from uvm.errors import GenerationCancelled, ModelUnavailable
from uvm.mind.backends import Completion, Finish, Message, Schema

_POLL_S = 0.002


class Stall:
    """In place of a reply: write nothing until the generation is cancelled."""

    def __repr__(self) -> str:
        return "STALL"


STALL: Final = Stall()
Reply = str | Stall | Callable[[Sequence[Message]], str]


@dataclass(frozen=True, slots=True)
class Line:
    """A reply, and the regular expression that the last message must contain; None fits every message.

    Attributes:
        expand: whether the reply is a template, in which `\\1` stands for the pattern's first group.
        seconds: how long the engine is silent first.
    """

    pattern: str | None
    reply: Reply
    expand: bool = False
    seconds: float = 0.0

    def fits(self, text: str) -> bool:
        """Returns whether this line may answer `text`."""
        return self.pattern is None or re.search(self.pattern, text) is not None

    def answer(self, messages: Sequence[Message]) -> str:
        """Returns the reply to a conversation that this line fits; not of a line that stalls."""
        assert not isinstance(self.reply, Stall)
        text = self.reply if isinstance(self.reply, str) else self.reply(messages)
        found = re.search(self.pattern, messages[-1].content) if self.expand and self.pattern else None
        return text if found is None else found.expand(text)


class Scripted:
    """A backend that replies from a script and remembers what it was asked.

    The first line that fits names the pattern; the lines with this pattern answer one after the other, and
    the last of them again and again: a script is a table of replies, a sequence, or both.

    Args:
        script: lines, or pairs of pattern and reply.

    Attributes:
        prompts: every conversation seen, oldest first.

    Raises:
        ValueError: a pattern that is no regular expression, or an empty reply; the text says which.
    """

    name: ClassVar[str] = "scripted"
    embedded: ClassVar[bool] = True
    memory_mib = 0
    adapter = None

    def __init__(self, script: Iterable[Line | tuple[str | None, Reply]]) -> None:
        self._lines = [line if isinstance(line, Line) else Line(*line) for line in script]
        for index, line in enumerate(self._lines):
            _check(index, line)
        self._used: set[int] = set()
        self.prompts: list[tuple[Message, ...]] = []
        self.loaded = False
        text = [[line.pattern, line.reply if isinstance(line.reply, str) else None] for line in self._lines]
        self.sha256 = hashlib.sha256(json.dumps(text).encode()).hexdigest()

    @classmethod
    def from_file(cls, path: Path) -> Scripted:
        """Returns a backend with the script of a JSON file.

        Args:
            path: a list of `{"pattern": text or null, "reply": text, "expand"?: bool, "seconds"?: number}`;
                `{"stall": true}` stands for `STALL`.

        Raises:
            ValueError: the file is not such a list; the text names it.
        """
        try:
            rows = json.loads(path.read_text("utf-8"))
            return cls(
                Line(
                    row.get("pattern"),
                    STALL if row.get("stall") else row.get("reply"),
                    bool(row.get("expand")),
                    float(row.get("seconds", 0.0)),
                )
                for row in rows
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no script: {error}") from None

    def load(self) -> None:
        self.loaded = True

    def unload(self) -> None:
        self.loaded = False

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
        self.prompts.append(tuple(messages))
        index = self._choose(messages[-1].content)
        line = self._lines[index]
        _be_silent(math.inf if isinstance(line.reply, Stall) else line.seconds, cancelled)
        text = line.answer(messages)
        if not text.strip():
            raise ValueError(f"line {index}: the reply is empty")
        words = _words(text)
        for word in words[:max_tokens]:
            if cancelled():
                raise GenerationCancelled("the generation was cancelled")
            on_token(word)
        read = sum(len(_words(message.content)) for message in messages)
        finish: Finish = "stop" if len(words) <= max_tokens else "length"
        written = words[:max_tokens]
        return Completion("".join(written), read, read, len(written), finish)

    def _choose(self, text: str) -> int:
        """Returns the number of the line that answers `text`."""
        first = next((line for line in self._lines if line.fits(text)), None)
        if first is None:
            raise ModelUnavailable(f"the script has no reply to: {text[:200]}")
        same = [index for index, line in enumerate(self._lines) if line.pattern == first.pattern]
        index = next((index for index in same if index not in self._used), same[-1])
        self._used.add(index)
        return index


def _check(index: int, line: Line) -> None:
    if line.pattern is not None:
        try:
            re.compile(line.pattern)
        except re.error as error:
            raise ValueError(f"line {index}: pattern {line.pattern!r}: {error}") from None
    if not (isinstance(line.reply, Stall) or callable(line.reply) or (line.reply and line.reply.strip())):
        raise ValueError(f"line {index}: the reply is empty")


def _be_silent(seconds: float, cancelled: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if cancelled():
            raise GenerationCancelled("the generation was cancelled")
        time.sleep(_POLL_S)


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*$|\s*\S+|\s+", text)
