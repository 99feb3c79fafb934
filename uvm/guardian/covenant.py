"""The Persistence Covenant: which exits of a method come after a change that no marker follows.

On every path on which a method changes what self holds, `self._p_changed = True` (the marker) follows the
last change, and only a `return` comes after it. A path is CLEAN before its first change, DIRTY after one,
MARKED after the marker, and DIRTY again after any further statement. Blocks are run abstractly: where paths
meet the worse mark holds, loops run until nothing moves, handlers begin with what their `try` may have done
when it raised, a `finally` lies on the way of every exit. A path that ends in `raise` needs no marker,
because its message is discarded.

Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from uvm.guardian.known import Known
from uvm.guardian.levels import ATOMIC, FRESH, SELF, inside
from uvm.guardian.policy import is_marker
from uvm.guardian.scopes import arguments
from uvm.guardian.statements import Reader, learn


class Mark(IntEnum):
    """How far a path has kept the covenant; the worst of joined paths is the greatest."""

    CLEAN = 0
    MARKED = 1
    DIRTY = 2


@dataclass(frozen=True, slots=True)
class State:
    """What is known at a point of a path: its mark, and the level of each local name."""

    mark: Mark
    env: dict[str, int]


@dataclass(frozen=True, slots=True)
class Exit:
    """A place where a method ends: a `return`, the end of its body, or the end of a `finally` on the way out.

    `changes` says that the value of the `return` itself changes self.
    """

    node: ast.Return | ast.FunctionDef | ast.Try | ast.TryStar
    changes: bool = False

    @property
    def anchor(self) -> ast.Return | list[ast.stmt]:
        """What the marker belongs right before, or the block at whose end it belongs."""
        if isinstance(self.node, ast.Return):
            return self.node
        return self.node.body if isinstance(self.node, ast.FunctionDef) else self.node.finalbody

    @property
    def line(self) -> int:
        if isinstance(self.anchor, list):
            return self.anchor[-1].end_lineno or self.anchor[-1].lineno
        return self.anchor.lineno


@dataclass(slots=True)
class Ways:
    """The ways out of a block, each with the state that it is taken in, or None where no path takes it."""

    on: State | None = None
    broken: State | None = None
    continued: State | None = None
    raised: State | None = None
    left: list[tuple[Exit, State]] = field(default_factory=list)

    def add(self, other: Ways) -> None:
        """Joins the ways of another block into these."""
        self.on = join(self.on, other.on)
        self.broken = join(self.broken, other.broken)
        self.continued = join(self.continued, other.continued)
        self.raised = join(self.raised, other.raised)
        self.left += other.left


def join(*states: State | None) -> State | None:
    """Returns the state of a point where paths meet: the worst mark, the lowest levels."""
    found = [state for state in states if state]
    if len(found) < 2:
        return found[0] if found else None
    names = {name for state in found for name in state.env}
    env = {name: min(state.env.get(name, FRESH) for state in found) for name in names}
    return State(max(state.mark for state in found), env)


def open_exits(tree: ast.Module, method: ast.FunctionDef, *, heed_markers: bool = True) -> list[Exit]:
    """Returns the exits of a method that a path may reach with a change that no marker follows.

    Args:
        tree: the module of the method, for its imports.
        method: the function whose paths are followed.
        heed_markers: whether the markers in the source count.

    Returns:
        The exits in the order of their lines, each once.

    Raises:
        TooComplex: there is more to follow than the analysis is willing to.
    """
    known = Known(tree, method)
    known.lower("self", SELF)
    env = dict.fromkeys([arg.arg for arg in arguments(method)], FRESH) | {"self": SELF}
    while True:
        ways = _Flow(known, heed_markers).block(method.body, State(Mark.CLEAN, env))
        if not learn(known):
            break
    if ways.on:
        ways.left.append((Exit(method), ways.on))
    changing: dict[Any, bool] = {}
    for exit_, state in ways.left:
        if state.mark is Mark.DIRTY:
            changing[exit_.node] = exit_.changes or changing.get(exit_.node, False)
    return sorted((Exit(*item) for item in changing.items()), key=lambda exit_: exit_.line)


class _Flow:
    """Runs blocks abstractly: each method takes the state before a statement, returns the ways out of it."""

    def __init__(self, known: Known, heed_markers: bool) -> None:
        self._known = known
        self._heed_markers = heed_markers
        self._compound: dict[type[ast.stmt], Callable[[Any, State], Ways]] = {
            ast.Return: self._return,
            ast.Raise: self._raise,
            ast.Break: lambda _, state: Ways(broken=state),
            ast.Continue: lambda _, state: Ways(continued=state),
            ast.If: self._if,
            ast.While: self._while,
            ast.For: self._for,
            ast.With: self._with,
            ast.Match: self._match,
            ast.Try: self._try,
            ast.TryStar: self._try,
        }

    def block(self, body: list[ast.stmt], state: State | None) -> Ways:
        """Runs a block; a state of None, where no path comes, leads nowhere."""
        ways = Ways(on=state)
        for stmt in body:
            if ways.on is None:
                break
            before, ways.on = ways.on, None
            ways.add(self._compound.get(type(stmt), self._simple)(stmt, before))
        return ways

    def _simple(self, stmt: ast.stmt, state: State) -> Ways:
        if is_marker(stmt):
            mark = min(state.mark, Mark.MARKED) if self._heed_markers else state.mark
            return Ways(on=State(mark, state.env))
        if _does_nothing(stmt):
            return Ways(on=state)
        before = State(Mark.DIRTY if state.mark else Mark.CLEAN, state.env)
        after, changes = self._read(stmt, before)
        return Ways(on=after, raised=self._raised(stmt, before, after, changes))

    def _read(self, stmt: ast.stmt, state: State) -> tuple[State, int]:
        reader = Reader(self._known, dict(state.env))
        reader.perform(stmt)
        return _after(reader, state), reader.changes

    def _raised(self, stmt: ast.stmt, before: State, after: State, changes: int) -> State | None:
        """Returns the state in which an exception may leave a simple statement."""
        reader = Reader(self._known, dict(before.env))
        if changes == 1 and (first := _before_last_step(stmt)) is not None:
            for node in first:
                reader.level(node)
            return join(before, after) if reader.changes else before
        return join(before, after)

    def _return(self, stmt: ast.Return, state: State) -> Ways:
        after, changes = self._read(stmt, state)
        return Ways(left=[(Exit(stmt, changes > 0), after)], raised=self._raised(stmt, state, after, changes))

    def _raise(self, stmt: ast.Raise, state: State) -> Ways:
        return Ways(raised=self._simple(stmt, state).on)

    def _if(self, stmt: ast.If, state: State) -> Ways:
        test, _ = self._read(stmt, state)
        ways = Ways(raised=join(state, test))
        ways.add(self.block(stmt.body, test))
        ways.add(self.block(stmt.orelse, test))
        return ways

    def _while(self, stmt: ast.While, state: State) -> Ways:
        return self._loop(stmt, state, lambda head: self._read(stmt, head)[0])

    def _for(self, stmt: ast.For, state: State) -> Ways:
        reader = Reader(self._known, dict(state.env))
        level = inside(reader.level(stmt.iter))

        def bind(head: State) -> State:
            target = Reader(self._known, dict(head.env))
            target.bind(stmt.target, level)
            return _after(target, head)

        ways = self._loop(stmt, _after(reader, state), bind)
        ways.raised = join(ways.raised, state)
        return ways

    def _loop(self, stmt: ast.For | ast.While, head: State, enter: Callable[[State], State]) -> Ways:
        """Runs a loop round by round until its head meets no new state."""
        while True:
            entered = enter(head)
            body = self.block(stmt.body, entered)
            again = join(head, body.on, body.continued)
            if again is None or again == head:
                break
            head = again
        ways = Ways(on=body.broken, raised=join(head, entered, body.raised), left=body.left)
        done = head if isinstance(stmt, ast.For) else None if _is_endless(stmt) else entered
        ways.add(self.block(stmt.orelse, done))
        return ways

    def _with(self, stmt: ast.With, state: State) -> Ways:
        entered, _ = self._read(stmt, state)
        ways = self.block(stmt.body, entered)
        if any(self._may_swallow(item.context_expr) for item in stmt.items):
            ways.on = join(ways.on, ways.raised)
        ways.raised = join(ways.raised, state, entered)
        return ways

    def _may_swallow(self, manager: ast.expr) -> bool:
        """Whether a context manager may end exceptions: `suppress`, or a class of the method's own."""
        function = manager.func if isinstance(manager, ast.Call) else manager
        path = self._known.path(function, {})
        return not path or path in {"contextlib.suppress", "contextlib.ExitStack"}

    def _match(self, stmt: ast.Match, state: State) -> Ways:
        after, _ = self._read(stmt, state)
        entered = join(after, State(after.mark, state.env))
        ways = Ways(raised=join(state, after))
        for case in stmt.cases:
            ways.add(self.block(case.body, entered))
        last = stmt.cases[-1]
        if last.guard or not (isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None):
            ways.on = join(ways.on, entered)
        return ways

    def _try(self, stmt: ast.Try | ast.TryStar, state: State) -> Ways:
        ways = self.block(stmt.body, state)
        caught = ways.raised
        passed, ways.on = ways.on, None
        ways.add(self.block(stmt.orelse, passed))
        for handler in stmt.handlers:
            ways.add(self.block(handler.body, caught))
        return self._finally(stmt, ways) if stmt.finalbody else ways

    def _finally(self, stmt: ast.Try | ast.TryStar, ways: Ways) -> Ways:
        """Leads every way out of a `try` through its `finally`, each by itself so that none soils another."""
        on = self.block(stmt.finalbody, ways.on)
        broken = self.block(stmt.finalbody, ways.broken)
        continued = self.block(stmt.finalbody, ways.continued)
        raised = self.block(stmt.finalbody, ways.raised)
        left = self.block(stmt.finalbody, join(*(state for _, state in ways.left)))
        found = Ways(broken=broken.on, continued=continued.on, raised=raised.on)
        found.left += [(Exit(stmt), left.on)] if left.on else []
        broken.on = continued.on = raised.on = left.on = None
        for way in (on, broken, continued, raised, left):
            found.add(way)
        return found


def _after(reader: Reader, before: State) -> State:
    return State(Mark.DIRTY if reader.changes else before.mark, reader.env)


def _does_nothing(stmt: ast.stmt) -> bool:
    return isinstance(stmt, ast.Pass) or (isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Constant))


def _is_endless(stmt: ast.While) -> bool:
    return isinstance(stmt.test, ast.Constant) and bool(stmt.test.value)


def _before_last_step(stmt: ast.stmt) -> list[ast.expr] | None:
    """Returns what runs before a statement's last step, if that step can't both change self and raise."""
    match stmt:
        case (
            ast.Expr(value=ast.Call(func=ast.Attribute(attr=name)) as call)
            | ast.Return(value=ast.Call(func=ast.Attribute(attr=name)) as call)
            | ast.Assign(targets=[ast.Name()], value=ast.Call(func=ast.Attribute(attr=name)) as call)
        ):
            return [*_parts(call.func), *call.args] if name in ATOMIC else None
        case ast.Assign(targets=[target], value=value):
            return [value, *_parts(target)]
        case ast.AugAssign(target=target, value=value):
            return None if _is_lazy(value) else [value, *_parts(target)]
        case ast.Delete(targets=[target]):
            return _parts(target)
    return None


def _parts(target: ast.expr) -> list[ast.expr]:
    return [part for part in ast.iter_child_nodes(target) if isinstance(part, ast.expr)]


def _is_lazy(value: ast.expr) -> bool:
    """Whether a value is computed while it is stored, so that half of it may be there when it raises."""
    match value:
        case ast.GeneratorExp() | ast.Call(func=ast.Name(id="map" | "filter" | "zip")):
            return True
    return False
