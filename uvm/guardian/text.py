"""Source text, and edits of it at the places where the syntax tree says its nodes are.

A mend edits lines instead of printing the tree anew, so that comments and layout stay as they were written.
Imports nothing of BAT OS.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


def words(text: str) -> frozenset[str]:
    """Returns the words of a table."""
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Edit:
    """Replaces the bytes from `start` to `end` by `text`; an insertion where they are equal."""

    start: int
    end: int
    text: str


class Text:
    """A source as UTF-8 bytes, which is what the positions of a syntax tree count."""

    def __init__(self, source: str) -> None:
        # The parser reads every line end as "\n" too, even inside strings, so this changes no meaning.
        source = source.replace("\r\n", "\n").replace("\r", "\n")
        self.raw = (source if source.endswith("\n") else source + "\n").encode()
        self._starts = list(accumulate((len(line) + 1 for line in self.raw.split(b"\n")), initial=0))

    def line(self, number: int) -> int:
        """Returns the offset of the first byte of a line; lines count from 1."""
        return self._starts[number - 1]

    def start(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self.line(node.lineno) + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        return self.line(node.end_lineno or node.lineno) + (node.end_col_offset or 0)

    def after(self, node: ast.stmt) -> int:
        """Returns the offset of the line that follows the node's last one."""
        return self.line((node.end_lineno or node.lineno) + 1)

    def indent(self, node: ast.stmt) -> str | None:
        """Returns the white space before a statement, or None where it does not open its line."""
        line = self.line(node.lineno)
        before = self.raw[line : self.start(node)]
        continued = self.raw[max(0, line - 2) : line] == b"\\\n"
        return None if before.strip() or continued else before.decode()

    def alone(self, node: ast.stmt) -> bool:
        """Whether nothing but a comment shares the lines of a statement."""
        rest = self.raw[self.end(node) : self.after(node)].strip()
        return self.indent(node) is not None and (not rest or rest.startswith(b"#"))

    def apply(self, edits: Iterable[Edit]) -> str:
        """Returns the text with all edits made; they must not overlap."""
        raw = self.raw
        for edit in sorted(edits, key=lambda edit: (edit.start, edit.end), reverse=True):
            raw = raw[: edit.start] + edit.text.encode() + raw[edit.end :]
        return raw.decode()
