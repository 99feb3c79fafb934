"""The forms of answers: pieces of their JSON schema, and what a reading comes to that does not hold.

Below the verbs, which are made of these. Imports nothing that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from uvm.parser.arguments import LONGEST
from uvm.parser.exact import Command
from uvm.parser.scene import Scene

Schema = dict[str, Any]
Answer = dict[str, Any]

NAME = "[A-Za-z][A-Za-z0-9_]*"
TEXT: Schema = {"$ref": "#/$defs/text"}
VALUE: Schema = {"$ref": "#/$defs/value"}
SCALAR: list[Schema] = [{"type": "number"}, TEXT, {"type": "boolean"}]
DEFINITIONS: Schema = {
    "text": {"type": "string", "maxLength": LONGEST},
    "value": {"anyOf": [*SCALAR, {"type": "array", "items": {"anyOf": SCALAR}}]},
}


class Doubt(Exception):
    """A reading that the sentence does not bear out.

    Args:
        question: what to ask the user, if it comes to that.
        command: what was understood, where it is complete.
        certain: asking is right; no other reading is likelier.
        refuses: what not to try again: a verb, or `call` and a method's name; by default the answer's verb.
        only: only another answer with this verb can be right.
    """

    def __init__(
        self,
        question: str,
        command: Command | None = None,
        *,
        certain: bool = False,
        refuses: str = "",
        only: str | None = None,
    ) -> None:
        super().__init__(question)
        self.question = question
        self.command = command
        self.certain = certain
        self.refuses = refuses
        self.only = only


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: the forms it offers in a scene, and the command that an answer means."""

    offer: Callable[[Scene], list[Schema]]
    read: Callable[[Answer, Scene], Command]


def form(optional: dict[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """Returns the schema of an object with these properties, in this order, the optional ones last."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def one_of(names: Iterable[str]) -> Schema:
    """Returns the schema of one of these names."""
    return {"enum": list(names)}
