"""The parser: what a user types becomes a command of the wire.

Exact syntax needs no model. A sentence goes to a small local model under a grammar made from what the kernel
really has; its answer is checked against the sentence, and a reading that the sentence does not bear out is
refused and another one asked for. What stays doubtful is asked about, never executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvm.errors import InvalidField
from uvm.mind.backends import Backend
from uvm.parser import verbs
from uvm.parser.context import Context
from uvm.parser.exact import Command, checked, parse_exact
from uvm.parser.forms import Doubt
from uvm.parser.prompt import conversation
from uvm.parser.scene import Scene
from uvm.parser.sentence import Sentence

MAX_CHARACTERS = 100_000
READINGS = 3  # how many answers of the model are weighed before the user is asked
_ANSWER_TOKENS = 192
_NOT_UNDERSTOOD = "I can't make a command of that; say it differently, or see /help"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the parser makes of an input.

    Attributes:
        command: the command as the wire has it, or None where nothing complete was understood.
        question: None where the reading is certain; else what to ask before `command` is executed.
        exact: no model was needed.
    """

    command: Command | None
    question: str | None = None
    exact: bool = False

    def told(self) -> dict[str, Any]:
        """Returns the command; a doubtful reading as `{"command": "clarify", "question", "reading"}`."""
        if self.command is not None and self.question is None:
            return self.command
        return {"command": "clarify", "question": self.question, "reading": self.command}


class Parser:
    """Reads sentences with one model.

    Args:
        open_model: returns the model; called when the first sentence needs it.
    """

    def __init__(self, open_model: Callable[[], Backend]) -> None:
        self._open_model = open_model
        self._model: Backend | None = None

    def read(self, text: str, context: Context, cancelled: Callable[[], bool] = lambda: False) -> Reading:
        """Returns what `text` asks for.

        Args:
            context: what the kernel has now.
            cancelled: asked while the model works; once it is true, the call ends soon.

        Raises:
            InvalidField: empty or too long, or exact syntax with a mistake in it.
            UnknownCommand: a `/command` that does not exist.
            ModelUnavailable: a sentence, and no model to read it.
            GenerationCancelled: `cancelled` became true.
        """
        if len(text) > MAX_CHARACTERS:
            raise InvalidField(
                f"{len(text)} characters; a sentence has at most {MAX_CHARACTERS}", field="text"
            )
        sentence = Sentence(text)
        if not sentence.shown:
            raise InvalidField("there is nothing to read", field="text")
        command = parse_exact(sentence.text, context)
        if command is not None:
            return Reading(command, exact=True)
        return self._weigh(Scene(context, sentence), cancelled)

    def _weigh(self, scene: Scene, cancelled: Callable[[], bool]) -> Reading:
        """Takes the first answer that the sentence bears out."""
        doubts: list[Doubt] = []
        for _ in range(READINGS):
            answer = self._ask(scene, cancelled)
            if answer is None:
                break
            try:
                return Reading(checked(verbs.read(answer, scene)))
            except Doubt as doubt:
                doubts.append(doubt)
                if doubt.certain:
                    break
                scene = scene.without(doubt.refuses, doubt.only)
        chosen = next((doubt for doubt in reversed(doubts) if doubt.certain), doubts[0] if doubts else None)
        return Reading(chosen.command, chosen.question) if chosen else Reading(None, _NOT_UNDERSTOOD)

    def _ask(self, scene: Scene, cancelled: Callable[[], bool]) -> dict[str, Any] | None:
        """Returns the model's answer, or None where it has none left or did not come to an end."""
        schema = verbs.schema_of(scene)
        if schema is None:
            return None
        if self._model is None:
            self._model = self._open_model()
        self._model.load()
        completion = self._model.generate(
            conversation(scene),
            schema=schema,
            max_tokens=_ANSWER_TOKENS,
            temperature=0.0,
            seed=0,
            on_token=lambda text: None,
            cancelled=cancelled,
        )
        if completion.finish != "stop":
            return None
        answer: dict[str, Any] = json.loads(completion.text)
        return answer
