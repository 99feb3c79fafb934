"""What the personas are asked, as pure functions of mission, object and memories. Layer 3, no I/O.

The constant part comes first (the persona's system prompt, then the covenants), so that the engine's prefix
cache serves it; what differs from mission to mission comes last.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from uvm.capabilities import KINDS
from uvm.guardian import Finding
from uvm.image.prototypes import UvmObject
from uvm.memory.catalog import Hit
from uvm.messages import Example, MissionBrief
from uvm.mind.backends import Message

MAX_SHOWN = 24  # slots, selectors or examples that a prompt shows
MAX_VALUE = 120  # characters of a value in a prompt
MAX_MEMORY = 2400  # characters of retrieved context in a prompt

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def decomposition(
    brief: MissionBrief, target: UvmObject, propose: int
) -> tuple[list[Message], dict[str, Any]]:
    """Returns the question to BRICK and the JSON schema of its answer.

    Args:
        propose: how many arguments of a sample call to ask for; 0 asks for none.
    """
    properties: dict[str, Any] = {
        "queries": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3}
    }
    wish = 'Answer in JSON: {"queries": [one to three short search queries for the memory of methods]'
    if propose:
        scalar = {"type": ["string", "number", "boolean"]}
        values = {"anyOf": [scalar, {"type": "array", "items": scalar, "maxItems": 5}]}
        properties["sample_args"] = {
            "type": "array",
            "items": values,
            "minItems": propose,
            "maxItems": propose,
        }
        wish += ', "sample_args": [one realistic value for each parameter]'
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    question = f"{mission_text(brief, target)}\n\n{wish}}}."
    return [Message("user", question)], schema


def synthesis(
    brief: MissionBrief, target: UvmObject, memories: Sequence[Hit], covenants: str, previous: str | None
) -> list[Message]:
    """Returns the request for a method; `previous` is the source that a revision replaces."""
    parts = [covenants.strip(), _object_text(target, brief.selector)]
    if memories:
        parts.append("From memory, verified methods that may help:\n" + _memory_text(memories))
    if previous is not None:
        parts.append(f"The method as it is now, to be replaced:\n```python\n{previous.strip()}\n```")
    parts.append(mission_text(brief, target))
    parts.append(f"Write `{signature(brief)}`.")
    return [Message("user", "\n\n".join(parts))]


def study(brief: MissionBrief, memories: Sequence[Hit]) -> list[Message]:
    """Returns the request for a study in prose, for missions of type `task`."""
    parts = [f"Task: {brief.description or brief.selector.replace('_', ' ')}"]
    if memories:
        parts.append("From memory:\n" + _memory_text(memories))
    parts.append("Answer in a few sentences.")
    return [Message("user", "\n\n".join(parts))]


def repair(findings: Sequence[Finding]) -> Message:
    """Returns the request to mend an answer."""
    told = "\n".join(f"- {finding.message}" for finding in findings[:6])
    return Message("user", f"That does not work yet:\n{told}\nWrite the whole corrected method again.")


def mission_text(brief: MissionBrief, target: UvmObject) -> str:
    """Returns the mission in words: purpose, the call that was missed, examples."""
    what = brief.description or brief.selector.replace("_", " ")
    lines = [f"Mission: method `{signature(brief)}` of {target.label}. Its purpose: {what}"]
    if brief.parameter_names() is None:
        arity = brief.arity()
        count = "" if arity is None else f" It takes {arity} besides self."
        lines.append(f"Choose the names of its parameters.{count}")
    call = brief.call()
    if call is not None:
        lines.append(f"It was called as: self.{brief.selector}({arguments(*call)})")
    if brief.examples:
        lines.append("Examples:")
        lines += [f"  {example_text(brief.selector, example)}" for example in brief.examples[:MAX_SHOWN]]
    return "\n".join(lines)


def signature(brief: MissionBrief) -> str:
    """Returns `name(self, a, b)`, with `...` where the parameters are open."""
    names = brief.parameter_names()
    return f"def {brief.selector}({', '.join(['self', *(['...'] if names is None else names)])})"


def example_text(selector: str, example: Example) -> str:
    """Returns an example as `self.f(1) returns 2`."""
    outcome = f"raises {example.raises}" if example.raises else f"returns {short(example.returns, 400)}"
    return f"self.{selector}({arguments(example.args, example.kwargs, 400)}) {outcome}"


def arguments(args: Sequence[Any], kwargs: dict[str, Any], limit: int = MAX_VALUE) -> str:
    """Returns arguments as they are written in a call."""
    told = [short(arg, limit) for arg in args]
    return ", ".join(told + [f"{name}={short(value, limit)}" for name, value in kwargs.items()])


def short(value: Any, limit: int = MAX_VALUE) -> str:
    """Returns the repr of a value, cut to `limit` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        text = f"a {type(value).__name__} with a number of more than 4,300 digits"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def extract_code(text: str, selector: str) -> str:
    """Returns the code in an answer: the fenced block that defines `selector`, or what comes closest."""
    blocks = [textwrap.dedent(block) for block in _FENCE.findall(text)] or [text]
    for wanted in (f"def {selector}", "def "):
        for block in blocks:
            if wanted in block:
                return block.strip("\n") + "\n"
    return blocks[0].strip("\n") + "\n"


def _object_text(target: UvmObject, selector: str) -> str:
    slots = list(target.data().items())[:MAX_SHOWN]
    held = {
        name: f"self.{name}({', '.join(method.parameters)})"
        for owner in target.chain()
        for name, method in owner.methods().items()
        if name != selector
    }
    lines = [f"The object {target.label}."]
    if slots:
        lines.append("Its slots: " + "; ".join(f"self.{name} = {short(value)}" for name, value in slots))
    if held:
        lines.append("It understands: " + ", ".join(list(held.values())[:MAX_SHOWN]))
    return "\n".join([" ".join(lines), *_grant_lines(target)])


def _grant_lines(target: UvmObject) -> list[str]:
    """Returns a line for each grant that methods of the object can use."""
    lines = []
    for slot, (_, grant) in target.grants_in_reach().items():
        kind = KINDS[grant.kind]
        about = kind.about.format(hosts=", ".join(grant.options.get("hosts", ())[:MAX_SHOWN]))
        calls = ", ".join(kind.offered(slot, write=grant.options.get("write", True)))
        lines.append(f"It may use self.{slot}, {about}: {calls}")
    return lines


def _memory_text(memories: Sequence[Hit]) -> str:
    told, left = [], MAX_MEMORY
    for hit in memories:
        if len(hit.text) <= left:
            told.append(hit.text)
            left -= len(hit.text)
    return "\n\n".join(told)
