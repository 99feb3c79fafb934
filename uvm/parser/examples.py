"""Examples that a sentence states: `double(4) should give 8`, `'abc' -> 'cba'`.

A wrong example makes a mission impossible, so only the plainest forms count. Imports nothing of BAT OS.
"""

from __future__ import annotations

import ast
import re
from typing import Any

_LITERAL = r"""(?:'[^']*'|"[^"]*"|[-+]?\d+(?:\.\d+)?(?![\w.]*\w)|\[[^\[\]]*\]|\{[^{}]*\}|True|False|None)"""
_GIVES = (
    r"\s*(?:->|→|=>|⇒|==?|(?:should|must|shall|will)?\s*(?:be|equals?|gives?|returns?|yields?|is|becomes?))\s+"
)
_GIVES = _GIVES[:-3] + r"\s*"
_CALL = re.compile(rf"(?<![\w.])([^\W\d]\w*)\(([^()]*)\){_GIVES}({_LITERAL})")
_PAIR = re.compile(rf"(?<![\w.(,\[])({_LITERAL}(?:\s*,\s*{_LITERAL})*)\s*(?:->|→|=>|⇒)\s*({_LITERAL})")


def examples_in(text: str, selector: str, count: int) -> list[dict[str, Any]]:
    """Returns the examples `{args, returns}` in a text.

    Args:
        selector: name of the method; calls of others are not examples.
        count: how many arguments an example must have.
    """
    found = [(match[2], match[3]) for match in _CALL.finditer(text) if match[1] == selector]
    if not found and count:
        found = [(match[1], match[2]) for match in _PAIR.finditer(text)]
    examples = []
    for arguments, result in found:
        try:
            args, returns = list(ast.literal_eval(f"({arguments},)" if arguments.strip() else "()")), ast.literal_eval(result)
        except (ValueError, SyntaxError):
            continue
        if len(args) == count:
            examples.append({"args": args, "returns": returns})
    return examples
