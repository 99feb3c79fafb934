"""Reads expressions: the level of their value, and how often they change what self holds.

Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from uvm.guardian import levels
from uvm.guardian.known import Known
from uvm.guardian.levels import ALIAS, FRESH, MUTATOR, MUTATORS, SELF, around, inside

# The operators whose augmented form changes a container in place.
_IN_PLACE = (ast.Add, ast.Sub, ast.Mult, ast.BitOr, ast.BitAnd, ast.BitXor)


class Expressions:
    """Reads expressions over `env`, the levels of the local names; `changes` counts changes of self.

    A `weak` reader never raises the level of a name, so that it may read a text in any order.
    """

    def __init__(self, known: Known, env: dict[str, int], *, weak: bool = False) -> None:
        self.known = known
        self.env = env
        self.changes = 0
        self.returned = FRESH
        self.lowered: dict[str, int] = {}
        self._weak = weak
        known.step(len(env) // 4)  # what copying and joining environments costs

    def level(self, node: ast.expr) -> int:
        """Returns the level of an expression's value, after reading all that it does."""
        self.known.step()
        find = _LEVELS.get(type(node))
        return find(self, node) if find else self.read_parts(node)

    def read_parts(self, node: ast.AST) -> int:
        """Reads the expressions directly inside a node, whose own value is fresh."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.level(child)
        return FRESH

    # Names and the places that assignments write to

    def bind(self, target: ast.expr, level: int) -> None:
        """Gives a value of some level to the target of an assignment, a loop or a deletion."""
        match target:
            case ast.Name(id=name):
                self.set(name, level)
            case ast.Starred(value=value):
                self.bind(value, around(level))
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                for element in elements:
                    self.bind(element, inside(level))
            case ast.Attribute() | ast.Subscript():
                self.store(target, level)

    def set(self, name: str, level: int) -> None:
        if self._weak:
            self.lower(name, level)
        else:
            self.env[name] = level
            self.known.lower(name, level)

    def lower(self, name: str, level: int) -> None:
        """Notes that a name's value may from now on reach self by `level`."""
        for table in (self.env, self.lowered):
            table[name] = min(table.get(name, FRESH), level)
        self.known.lower(name, level)

    def store(self, target: ast.Attribute | ast.Subscript, level: int) -> None:
        """Puts a value of some level into an object or a container."""
        if isinstance(target, ast.Attribute) and target.attr == "_p_changed":
            return
        if isinstance(target, ast.Subscript):
            self.level(target.slice)
        self._put(target.value, self.level(target.value), level)

    def _put(self, owner: ast.expr, owner_level: int, level: int) -> None:
        """Puts a value of some level into an owner: a change, if the owner belongs to self."""
        if owner_level <= ALIAS:
            self.changes += 1
        elif level < FRESH:
            self._absorb(owner, around(level))

    def _absorb(self, owner: ast.expr, level: int) -> None:
        """Notes that a local container, at the root of a chain, now holds something of self."""
        while isinstance(owner, ast.Attribute | ast.Subscript | ast.Call):
            if isinstance(owner, ast.Call):
                if not isinstance(owner.func, ast.Attribute):
                    return
                owner = owner.func
            owner, level = owner.value, around(level)
        if isinstance(owner, ast.Name):
            self.lower(owner.id, level)

    def adopt(self, value: ast.expr) -> None:
        """Notes that self now holds a value, so that the names that stand for it are aliases."""
        match value:
            case ast.Name(id=name) if self.env.get(name) != SELF:
                self.lower(name, ALIAS)
            case ast.NamedExpr(target=ast.Name(id=name)):
                self.lower(name, ALIAS)
            case ast.Tuple() | ast.List() | ast.Set() | ast.Dict() | ast.BoolOp() | ast.IfExp():
                for part in ast.iter_child_nodes(value):
                    if isinstance(part, ast.expr):
                        self.adopt(part)

    # Kinds of expressions

    def _name(self, node: ast.Name) -> int:
        self._refer(node, FRESH)
        return self.env.get(node.id, FRESH)

    def _attribute(self, node: ast.Attribute) -> int:
        owner = self.level(node.value)
        if owner == ALIAS and node.attr in MUTATORS:
            self.changes += 1
            return MUTATOR
        return inside(owner)

    def _subscript(self, node: ast.Subscript) -> int:
        element = inside(self.level(node.value))
        self.level(node.slice)
        return around(element) if isinstance(node.slice, ast.Slice) else element

    def _operation(self, node: ast.BinOp) -> int:
        level = min(self.level(node.left), self.level(node.right))
        number = not isinstance(node.op, ast.Mult) and (is_number(node.left) or is_number(node.right))
        return around(inside(level)) if is_in_place(node.op) and not number else FRESH

    def _either(self, node: ast.BoolOp) -> int:
        return min([self.level(value) for value in node.values])

    def _conditional(self, node: ast.IfExp) -> int:
        self.level(node.test)
        return min(self.level(node.body), self.level(node.orelse))

    def _walrus(self, node: ast.NamedExpr) -> int:
        level = self.level(node.value)
        self.bind(node.target, level)
        return level

    def _starred(self, node: ast.Starred) -> int:
        return inside(self.level(node.value))

    def _display(self, node: ast.Tuple | ast.List | ast.Set) -> int:
        return around(min([self.level(element) for element in node.elts], default=FRESH))

    def _dict(self, node: ast.Dict) -> int:
        found = FRESH
        for key, value in zip(node.keys, node.values, strict=True):
            level = self.level(value)
            found = min(found, level if key else inside(level))
            if key:
                self.level(key)
        return around(found)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> int:
        outer = dict(self.env)
        targets: set[str] = set()
        for loop in node.generators:
            self.bind(loop.target, inside(self.level(loop.iter)))
            targets |= {name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
            for test in loop.ifs:
                self.level(test)
        if isinstance(node, ast.DictComp):
            self.level(node.key)
        level = self.level(node.value if isinstance(node, ast.DictComp) else node.elt)
        for name in targets:
            self.env[name] = outer.get(name, FRESH)
        return around(level)

    def _lambda(self, node: ast.Lambda) -> int:
        self._refer(node, FRESH)
        return FRESH

    def _yield(self, node: ast.Yield | ast.YieldFrom) -> int:
        if node.value:
            level = self.level(node.value)
            level = inside(level) if isinstance(node, ast.YieldFrom) else level
            self.returned = min(self.returned, around(level))
        return FRESH

    # Calls

    def _call(self, node: ast.Call) -> int:
        path = self.known.path(node.func, self.env)
        function = node.func
        owner = self.level(function.value) if isinstance(function, ast.Attribute) and not path else FRESH
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        given = [FRESH if self.known.helpers_of(value) else self.level(value) for value in values]
        self.changes += MUTATOR in given
        reach = min([owner, *given])
        returned = min([self._refer(value, inside(reach)) for value in values], default=FRESH)
        if path:
            return self._apply(path, node.args, given, returned)
        if isinstance(function, ast.Attribute):
            return self._send(function, owner, values, given)
        if self.known.helpers_of(function):
            return self._refer(function, max(reach, ALIAS))
        self.changes += self.level(function) == MUTATOR
        return FRESH

    def _refer(self, node: ast.expr, given: int) -> int:
        """Reads a use of nested functions, whose changes count here; returns the level of their result."""
        found = FRESH
        for helper in self.known.helpers_of(node):
            summary = self.known.summary(helper, given)
            self.changes += summary.changes
            found = min(found, summary.returns)
            for name, level in summary.lowers:
                self.lower(name, level)
        return found

    def _apply(self, path: str, args: list[ast.expr], given: list[int], returned: int) -> int:
        """Reads a call of a function that is built in or imported."""
        owner, _, name = path.rpartition(".")
        reach = min(given, default=FRESH)
        unbound = owner in levels.CONTAINERS
        if args and (path in levels.CHANGERS or (unbound and name in MUTATORS)):
            self._put(args[0], given[0], min(given[1:], default=FRESH))
        if path in levels.PICKERS or (unbound and name in levels.GIVERS):
            return min(inside(reach), returned)
        if path in levels.COPIERS or owner.startswith("itertools") or (unbound and name in levels.VIEWS):
            return around(inside(reach))
        if path == "map":
            return around(returned)
        return around(inside(inside(reach))) if path == "sum" and len(args) > 1 else FRESH

    def _send(self, function: ast.Attribute, owner: int, values: list[ast.expr], given: list[int]) -> int:
        """Reads a call of a method; a message to self is no change, whatever its name."""
        if owner == SELF:
            return FRESH
        if function.attr in MUTATORS:
            added = min(given[1:] if function.attr in levels.KEYED else given, default=FRESH)
            self._put(function.value, owner, inside(added) if function.attr in levels.BULK else added)
            if owner <= ALIAS:
                for value in values:
                    self.adopt(value)
        if function.attr in levels.GIVERS:
            return min([inside(owner), *given[1:]])
        return around(inside(min([owner, *given]))) if function.attr in levels.VIEWS else FRESH


def is_in_place(operator: ast.operator) -> bool:
    return isinstance(operator, _IN_PLACE)


def is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float | complex)


_LEVELS: dict[type[ast.expr], Callable[[Expressions, Any], int]] = {
    ast.Name: Expressions._name,
    ast.Attribute: Expressions._attribute,
    ast.Subscript: Expressions._subscript,
    ast.BinOp: Expressions._operation,
    ast.BoolOp: Expressions._either,
    ast.IfExp: Expressions._conditional,
    ast.NamedExpr: Expressions._walrus,
    ast.Starred: Expressions._starred,
    ast.Tuple: Expressions._display,
    ast.List: Expressions._display,
    ast.Set: Expressions._display,
    ast.Dict: Expressions._dict,
    ast.ListComp: Expressions._comprehension,
    ast.SetComp: Expressions._comprehension,
    ast.GeneratorExp: Expressions._comprehension,
    ast.DictComp: Expressions._comprehension,
    ast.Lambda: Expressions._lambda,
    ast.Yield: Expressions._yield,
    ast.YieldFrom: Expressions._yield,
    ast.Call: Expressions._call,
}
