"""Reads statements: what they bind, and how often they change what self holds.

A simple statement is read whole, a compound one up to its colon; the paths through blocks are the
covenant's business. Nested functions are read here too, into summaries.
Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from uvm.guardian.expressions import Expressions, is_in_place, is_number
from uvm.guardian.known import Helper, Known, Summary
from uvm.guardian.levels import ALIAS, FRESH, around, inside
from uvm.guardian.scopes import arguments, binds


class Reader(Expressions):
    """Reads statements over an environment of levels."""

    def scan(self, body: Iterable[ast.stmt]) -> None:
        """Reads statements and the blocks inside them in the order of the text."""
        for stmt in body:
            self.perform(stmt)
            for block in blocks(stmt):
                self.scan(block)

    def perform(self, stmt: ast.stmt) -> None:
        """Reads one simple statement, or the head of a compound one."""
        self.known.step()
        perform = _STATEMENTS.get(type(stmt), Reader.read_parts)
        perform(self, stmt)

    def _assign(self, stmt: ast.Assign) -> None:
        before = self.changes
        parts = _parts(stmt.value)
        levels = [self.level(part) for part in parts]
        whole = around(min(levels)) if levels else self.level(stmt.value)
        for target in stmt.targets:
            if levels and len(names := _parts(target)) == len(levels):
                for name, level in zip(names, levels, strict=True):
                    self.bind(name, level)
            else:
                self.bind(target, whole)
        if self.changes > before:
            for adopted in [stmt.value, *stmt.targets]:
                self.adopt(adopted)

    def _annotated(self, stmt: ast.AnnAssign) -> None:
        if stmt.value:
            before = self.changes
            self.bind(stmt.target, self.level(stmt.value))
            if self.changes > before:
                self.adopt(stmt.value)

    def _augmented(self, stmt: ast.AugAssign) -> None:
        value, current = self.level(stmt.value), self.level(stmt.target)
        in_place = is_in_place(stmt.op) and not is_number(stmt.value)
        if not isinstance(stmt.target, ast.Name):
            before = self.changes
            self.store(stmt.target, inside(value) if in_place else FRESH)
            self.changes += in_place and current == ALIAS and self.changes == before
        elif in_place and current <= ALIAS:
            self.changes += 1
        else:
            self.set(stmt.target.id, around(inside(min(current, value))) if in_place else FRESH)

    def _delete(self, stmt: ast.Delete) -> None:
        for target in stmt.targets:
            self.bind(target, FRESH)

    def _for(self, stmt: ast.For) -> None:
        self.bind(stmt.target, inside(self.level(stmt.iter)))

    def _test(self, stmt: ast.If | ast.While) -> None:
        self.level(stmt.test)

    def _with(self, stmt: ast.With) -> None:
        for item in stmt.items:
            level = self.level(item.context_expr)
            if item.optional_vars:
                self.bind(item.optional_vars, level)

    def _match(self, stmt: ast.Match) -> None:
        level = inside(self.level(stmt.subject))
        for case in stmt.cases:
            for node in ast.walk(case.pattern):
                if name := binds(node):
                    self.set(name, level)
            if case.guard:
                self.level(case.guard)

    def _return(self, stmt: ast.Return) -> None:
        if stmt.value:
            self.returned = min(self.returned, self.level(stmt.value))

    def _function(self, stmt: ast.FunctionDef) -> None:
        for node in [*stmt.decorator_list, *defaults(stmt)]:
            self.level(node)

    def _class(self, stmt: ast.ClassDef) -> None:
        self.read_parts(stmt)
        body = Reader(self.known, dict(self.env), weak=True)
        body.scan(stmt.body)
        self.changes += body.changes

    def _skip(self, stmt: ast.stmt) -> None:
        """Reads nothing: all that this statement does is done by its blocks, or by no one."""


def blocks(stmt: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Yields the blocks of a compound statement; those of a function or a class run at other times."""
    if isinstance(stmt, ast.FunctionDef | ast.ClassDef):
        return
    for part in [stmt, *getattr(stmt, "handlers", []), *getattr(stmt, "cases", [])]:
        for name in ("body", "orelse", "finalbody"):
            if block := getattr(part, name, None):
                yield block


def defaults(function: ast.FunctionDef | ast.Lambda) -> list[ast.expr]:
    return [node for node in [*function.args.defaults, *function.args.kw_defaults] if node]


def learn(known: Known) -> bool:
    """Reads all nested functions that are in use anew; returns whether that taught anything."""
    before = dict(known.summaries), dict(known.anywhere)
    for helper, given in reversed(list(known.summaries)):  # a helper is met after those that use it
        known.summaries[helper, given] = _summarise(known, helper, given)
    return before != (known.summaries, known.anywhere)


def _summarise(known: Known, helper: Helper, given: int) -> Summary:
    if isinstance(helper, ast.ClassDef):
        members = [known.summary(node, given) for node in helper.body if isinstance(node, ast.FunctionDef)]
        lowers = frozenset(pair for member in members for pair in member.lowers)
        return Summary(any(member.changes for member in members), around(given), lowers)
    local = known.local_names(helper)
    reader = Reader(known, known.anywhere | dict.fromkeys(local, FRESH), weak=True)
    level = min([given, *(reader.level(default) for default in defaults(helper))])
    parameters = [arg.arg for arg in arguments(helper)]
    reader.env.update(dict.fromkeys(parameters, level))
    if helper in known.members and parameters:
        reader.env[parameters[0]] = around(level)
    for _ in range(2):  # what a loop binds late, its next round meets early
        if isinstance(helper, ast.Lambda):
            reader.returned = reader.level(helper.body)
        else:
            reader.scan(helper.body)
    lowers = frozenset((name, level) for name, level in reader.lowered.items() if name not in local)
    return Summary(reader.changes > 0, reader.returned, lowers)


def _parts(node: ast.expr) -> list[ast.expr]:
    """Returns the elements of a plain tuple or list, or nothing where they can't be told one by one."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List) else []
    return [] if any(isinstance(part, ast.Starred) for part in parts) else parts


_STATEMENTS: dict[type[ast.stmt], Callable[[Reader, Any], object]] = {
    ast.Assign: Reader._assign,
    ast.AnnAssign: Reader._annotated,
    ast.AugAssign: Reader._augmented,
    ast.Delete: Reader._delete,
    ast.For: Reader._for,
    ast.If: Reader._test,
    ast.While: Reader._test,
    ast.With: Reader._with,
    ast.Match: Reader._match,
    ast.Return: Reader._return,
    ast.FunctionDef: Reader._function,
    ast.ClassDef: Reader._class,
    ast.Try: Reader._skip,
    ast.TryStar: Reader._skip,
}
