"""Mends by rule: a forgotten `self`, recursion without it, and the covenant.

Each returns its edits and the findings that report them. Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from itertools import chain, count

from uvm.guardian.covenant import Exit, open_exits
from uvm.guardian.findings import Finding
from uvm.guardian.policy import is_marker
from uvm.guardian.scopes import binds, imports, signature, walk
from uvm.guardian.statements import blocks
from uvm.guardian.text import Edit, Text

Mend = tuple[list[Edit], list[Finding]]
MARKER = "self._p_changed = True"


def add_self(text: Text, method: ast.FunctionDef, parameters: Sequence[str] | None) -> Mend:
    """Returns the mend for a method that lacks `self` but otherwise has the right parameters."""
    names = signature(method)
    if "self" in names or (parameters is not None and names != tuple(parameters)):
        return [], []
    opening = text.raw.index(b"(", text.start(method)) + 1
    finding = Finding("self", method.lineno, "`self` was added as the first parameter.", mended=True)
    return [Edit(opening, opening, "self, " if names else "self")], [finding]


def send_recursion(text: Text, tree: ast.Module, method: ast.FunctionDef) -> Mend:
    """Returns the mend for bare uses of the method's own name, which only `self` understands.

    A name that is bound in the method, imported, or built in (`sum` that calls `sum`) means something else.
    """
    name = method.name
    if hasattr(builtins, name) or name in imports(tree):
        return [], []
    uses = [
        node
        for node, scope in walk(method)
        if isinstance(node, ast.Name) and node.id == name and name not in scope.bound
    ]
    # Positions inside an f-string are not reliable, so such a use may have to go back to its author.
    if not all(text.raw.startswith(name.encode(), text.start(use)) for use in uses):
        return [], [Finding("recursion", uses[0].lineno, f"Call `self.{name}` instead of `{name}`.")]
    calls = {id(node.func): node for node in ast.walk(method) if isinstance(node, ast.Call)}
    edits = [Edit(text.start(use), text.start(use), "self.") for use in uses]
    edits += [_drop_self(text, call) for use in uses if (call := calls.get(id(use))) and _passes_self(call)]
    message = f"The recursive use of `{name}` became `self.{name}`."
    return edits, [Finding("recursion", use.lineno, message, mended=True) for use in uses]


def _passes_self(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[0], ast.Name) and call.args[0].id == "self"


def _drop_self(text: Text, call: ast.Call) -> Edit:
    following = [text.start(arg) for arg in call.args[1:]] + [text.start(arg) for arg in call.keywords]
    return Edit(text.start(call.args[0]), min(following, default=text.end(call) - 1), "")


def keep_covenant(text: Text, tree: ast.Module, method: ast.FunctionDef) -> Mend:
    """Returns the mend for exits without a marker: the markers go, and one comes before each such exit."""
    exits = open_exits(tree, method)
    if not exits:
        return [], []
    places = {id(place.anchor): place for place in open_exits(tree, method, heed_markers=False)}
    edits: list[Edit] = []
    for block, index in _markers(method):
        anchor = block[index + 1] if index + 1 < len(block) else block
        if id(anchor) in places and not places[id(anchor)].changes:
            del places[id(anchor)]
        elif text.alone(block[index]) and not all(is_marker(stmt) for stmt in block):
            edits.append(Edit(text.line(block[index].lineno), text.after(block[index]), ""))
    for place in places.values():
        edits += _mark(text, method, place)
    return edits, [Finding("covenant", exit_.line, _explain(exit_), mended=True) for exit_ in exits]


def _markers(method: ast.FunctionDef) -> Iterator[tuple[list[ast.stmt], int]]:
    """Yields the markers of the method itself, each as its block and its index there."""
    stack = [method.body]
    while stack:
        block = stack.pop()
        for index, stmt in enumerate(block):
            stack.extend(blocks(stmt))
            if is_marker(stmt):
                yield block, index


def _mark(text: Text, method: ast.FunctionDef, place: Exit) -> list[Edit]:
    anchor = place.anchor
    if isinstance(anchor, list):
        return [_append(text, anchor)]
    start, end, indent = text.start(anchor), text.end(anchor), text.indent(anchor)
    if not place.changes:
        return [Edit(start, start, f"{MARKER}; " if indent is None else f"{MARKER}\n{indent}")]
    name = _fresh_name(method)
    computed = Edit(start, start + len("return"), f"{name} =")
    if indent is None or not text.alone(anchor):
        return [computed, Edit(end, end, f"; {MARKER}; return {name}")]
    after = text.after(anchor)
    return [computed, Edit(after, after, f"{indent}{MARKER}\n{indent}return {name}\n")]


def _append(text: Text, block: list[ast.stmt]) -> Edit:
    indent, end = text.indent(block[0]), text.end(block[-1])
    if indent is None:
        return Edit(end, end, f"; {MARKER}")
    after = text.after(block[-1])
    return Edit(after, after, f"{indent}{MARKER}\n")


def _fresh_name(method: ast.FunctionDef) -> str:
    taken = {node.id if isinstance(node, ast.Name) else binds(node) for node in ast.walk(method)}
    numbered = (f"result{number}" for number in count(2))
    return next(name for name in chain(["result"], numbered) if name not in taken)


def _explain(exit_: Exit) -> str:
    if exit_.changes:
        return f"The returned value changes self, so it is computed first, then `{MARKER}`, then returned."
    return f"`{MARKER}` was put right before the end of this path, which changes self."
