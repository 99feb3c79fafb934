"""Examples that a sentence states: `double(4) should give 8`, `'abc' -> 'cba'`.

A wrong example makes a mission impossible, so only the plainest forms count. Imports `exact`, for literals.
"""

from __future__ import annotations

import re
from typing import Any

from uvm.errors import InvalidField
from uvm.parser.exact import literal

_LITERAL = (
    r"""(?:'[^']*'|"[^"]*"|[-+]?\d+(?:\.\d+)?(?!\w)|\[[^\[\]]*\]|\{[^{}]*\}|(?:True|False|None)(?!\w))"""
)
_ARROW = r"(?:->|→|=>|⇒)"
_VERB = r"(?:be|equals?|gives?|returns?|yields?|is|becomes?)"
_GIVES = rf"\s*(?:{_ARROW}|==?|(?:(?:should|must|shall|will)\s+)?{_VERB}(?!\w))\s*"
_CALL = re.compile(rf"(?<![\w.])([^\W\d]\w*)\(([^()]*)\){_GIVES}({_LITERAL})")
_PAIR = re.compile(rf"(?<![\w.(,\[])({_LITERAL}(?:\s*,\s*{_LITERAL}){{0,8}})\s*{_ARROW}\s*({_LITERAL})")


def examples_in(text: str, selector: str, count: int) -> list[dict[str, Any]]:
    """Returns the examples `{args, returns}` in a text.

    Args:
        selector: name of the method; calls of others are not examples.
        count: how many arguments an example must have.
    """
    found = [(match[2], match[3]) for match in _CALL.finditer(text) if match[1] == selector]
    if not found and count:
        found = [(match[1], match[2]) for match in _PAIR.finditer(text)]
    examples = [_example(arguments, result) for arguments, result in found]
    return [example for example in examples if example is not None and len(example["args"]) == count]


def _example(arguments: str, result: str) -> dict[str, Any] | None:
    try:
        return {"args": literal(f"[{arguments}]"), "returns": literal(result)}
    except InvalidField:
        return None
