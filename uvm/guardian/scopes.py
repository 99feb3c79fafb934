"""Which names a method and its nested functions bind, and a walk that knows them at every node.

Imports nothing of BAT OS.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_SCOPES = (Function, ast.ClassDef, Comprehension)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is known at a node: the names that enclosing functions bind, and the kind of its surroundings."""

    bound: frozenset[str]
    in_class: bool = False
    in_function: bool = False


def arguments(function: Function) -> list[ast.arg]:
    """Returns all parameters in the order in which a call fills them, the starred ones included."""
    args = function.args
    starred = [[args.vararg] if args.vararg else [], args.kwonlyargs, [args.kwarg] if args.kwarg else []]
    return [*args.posonlyargs, *args.args, *(arg for group in starred for arg in group)]


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Returns the names of all parameters, a starred one with its stars."""
    stars = {id(function.args.vararg): "*", id(function.args.kwarg): "**"}
    return tuple(stars.get(id(arg), "") + arg.arg for arg in arguments(function))


def binds(node: ast.AST) -> str | None:
    """Returns the name that this very node binds in its scope, if it binds one."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.alias(name=name, asname=asname):
            return asname or name.partition(".")[0]
        case ast.ExceptHandler(name=found) | ast.MatchAs(name=found) | ast.MatchStar(name=found):
            return found
        case ast.MatchMapping(rest=found):
            return found
    return None


def bound_names(scope: ast.AST) -> frozenset[str]:
    """Returns the names that a function, class or comprehension binds itself, not those of scopes inside."""
    found: set[str | None] = {None}
    outer: set[str | None] = {None}
    stack = list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop()
        found.add(binds(node))
        if isinstance(node, ast.Nonlocal):
            outer.update(node.names)
        if not isinstance(node, _SCOPES):
            stack.extend(ast.iter_child_nodes(node))
    return frozenset(name for name in found - outer if name)


def walk(method: ast.FunctionDef) -> Iterator[tuple[ast.AST, Scope]]:
    """Yields every node inside a method with its scope, in no order that matters."""
    stack: list[tuple[ast.AST, Scope]] = [(method, Scope(frozenset()))]
    while stack:
        node, scope = stack.pop()
        if node is not method:
            yield node, scope
        inner = _enter(node, method, scope)
        stack.extend((child, inner) for child in ast.iter_child_nodes(node))


def _enter(node: ast.AST, method: ast.FunctionDef, scope: Scope) -> Scope:
    if node is method:
        return Scope(bound_names(node))
    if isinstance(node, ast.ClassDef):
        return replace(scope, in_class=True)
    if isinstance(node, Function):
        return replace(scope, bound=scope.bound | bound_names(node), in_function=True)
    if isinstance(node, Comprehension):
        return replace(scope, bound=scope.bound | bound_names(node))
    return scope


def imports(tree: ast.AST) -> dict[str, str]:
    """Returns what each imported name stands for, as a dotted path."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.partition(".")[0]
                found[alias.asname or head] = alias.name if alias.asname else head
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def root_name(node: ast.expr) -> str | None:
    """Returns the name at the start of a chain of attributes, subscripts and calls, if there is one."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
