"""What went wrong in a method, told so that its author can act: the lines it went through, what it missed.

A message that nobody understands becomes a mission, so the report of a miss says how it was called. Runs in
the child.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from itertools import groupby
from types import FrameType, TracebackType
from typing import Any

from uvm import codec
from uvm.errors import DoesNotUnderstand, GrantMissing, ValueNotStorable
from uvm.hands.natives import is_public, selector_of
from uvm.hands.proxy import Proxy, oid_of, to_refs
from uvm.hands.session import Session

MAX_TEXT = 2000  # characters of an exception's text
MAX_LINES = 20  # of a traceback


def raised(error: BaseException, selector: str) -> dict[str, Any]:
    """Returns the payload of a `raised` frame.

    Args:
        error: what came out of the call.
        selector: the message that was sent.
    """
    name, text = type(error).__name__, _text(error)
    told = {
        "message": f"{selector} raised {name}: {text}" if text else f"{selector} raised {name}",
        "exception": name,
        "traceback": _lines(error.__traceback__),
        "selector": selector,
    }
    if isinstance(error, GrantMissing):
        return told | {"message": text, "grant": [error.details["target"], error.details["grant"]]}
    return told


def missed(error: DoesNotUnderstand, session: Session) -> dict[str, Any] | None:
    """Returns the payload of a `missed` frame, or None where the name was only read, not called.

    `parameters` is None where a star hides their number; `call` is None where an argument's value can't be
    had without running code.
    """
    told = {"message": error.message, "target": error.target, "selector": error.selector}
    place = _place(error.__traceback__)
    if place is None:  # no method asked: the call itself found nobody
        return told | {"parameters": None, "call": None}
    frame, end = place
    call = _call_at(linecache.getlines(frame.f_code.co_filename), end, error.selector)
    if call is None:
        return None
    return told | {"parameters": _parameters(call), "call": _values(call, frame, session)}


def slot_missing(error: DoesNotUnderstand) -> AttributeError:
    """Returns the error that tells how to read a slot which may not be there yet."""
    advice = f"give the slot a first value where `hasattr(self, '{error.selector}')` is False"
    told = AttributeError(f"{error.message}: {advice}")
    return told.with_traceback(error.__traceback__)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except Exception:  # its __str__ is generated code too
        return "(its text could not be read)"


def _steps(traceback: TracebackType | None) -> Iterator[TracebackType]:
    """Yields the steps of a traceback that are in methods, outermost first."""
    while traceback is not None:
        if selector_of(traceback.tb_frame.f_code.co_filename):
            yield traceback
        traceback = traceback.tb_next


def _lines(traceback: TracebackType | None) -> list[str]:
    lines = []
    for line, repeats in groupby(_line(step) for step in _steps(traceback)):
        times = len(list(repeats))
        lines.append(line if times == 1 else f"{line} ({times} times)")
    half = MAX_LINES // 2
    return lines if len(lines) <= MAX_LINES else [*lines[:half], "…", *lines[-half:]]


def _line(step: TracebackType) -> str:
    file = step.tb_frame.f_code.co_filename
    source = linecache.getline(file, step.tb_lineno).strip()[:200]
    return f"{selector_of(file)} line {step.tb_lineno}: {source}"


def _place(traceback: TracebackType | None) -> tuple[FrameType, tuple[int, int]] | None:
    """Returns the innermost frame of a method and where its current expression ends: line, byte column."""
    steps = list(_steps(traceback))
    if not steps:
        return None
    frame, instruction = steps[-1].tb_frame, steps[-1].tb_lasti // 2
    _, end_line, _, end_column = list(frame.f_code.co_positions())[instruction]
    return frame, (end_line or 0, end_column or 0)


def _call_at(lines: list[str], end: tuple[int, int], selector: str) -> ast.Call | None:
    """Returns the call whose function is the attribute `selector` that ends at `end`."""
    for node in ast.walk(ast.parse("".join(lines))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == selector
            and (node.func.end_lineno, node.func.end_col_offset) == end
        ):
            return node
    return None


def _parameters(call: ast.Call) -> list[str] | None:
    """Returns names for the parameters: those that the caller uses, else arg1, arg2 …"""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    names: list[str] = []
    for number, argument in enumerate(call.args, 1):
        name = argument.id if isinstance(argument, ast.Name) else ""
        usable = is_public(name) and name != "self" and name not in names
        names.append(name if usable else f"arg{number}")
    for keyword in call.keywords:
        if keyword.arg is None:
            return None
        names.append(keyword.arg)
    usable = len(set(names)) == len(names) and "self" not in names and all(map(is_public, names))
    return names if usable else None


def _values(call: ast.Call, frame: FrameType, session: Session) -> bytes | None:
    """Returns the encoded [args, kwargs], or None where not all of them can be known."""
    try:
        args = [_value(argument, frame, session) for argument in call.args]
        kwargs = {keyword.arg: _value(keyword.value, frame, session) for keyword in call.keywords}
        if None in kwargs:  # **names
            return None
        # An object made in this run will not be there when the message is sent again: its origin stands in.
        return codec.encode(to_refs([args, kwargs], session.origin))
    except (LookupError, ValueError, AttributeError, ReferenceError, ValueNotStorable):
        return None


def _value(node: ast.expr, frame: FrameType, session: Session) -> Any:
    """Returns the value of a constant, a local variable, or a slot of an object in a local variable."""
    if isinstance(node, ast.Name):
        return frame.f_locals[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = frame.f_locals[node.value.id]
        if type(owner) is Proxy:
            return session.read(oid_of(owner), node.attr)
    return ast.literal_eval(node)
