"""The policy: what a method may not contain, each refusal with a sentence that says what to do instead.

A lint, not a wall: it refuses early and explains; what slips through still runs in a hand only. Identifiers
need no folding here, since Python's parser brings them to NFKC before the tree has them.
Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from uvm.guardian.findings import Finding
from uvm.guardian.modules import check_import, check_member
from uvm.guardian.scopes import Scope, arguments, binds, imports, root_name, walk
from uvm.guardian.text import words

Findings = Iterator[Finding]

_BUILTINS = {
    "a method can't run source text": "exec eval compile",
    "a method can't open files": "open",
    "use an import statement": "__import__",
    "use local names or attributes of self": "globals locals vars",
    "take the value as a parameter": "input",
    "end the method with return or raise": "exit quit breakpoint help",
}
_REFUSED_BUILTINS = {name: hint for hint, names in _BUILTINS.items() for name in names.split()}
_BY_NAME = frozenset({"getattr", "hasattr", "setattr", "delattr"})
_FETCHERS = frozenset({"attrgetter", "methodcaller"})
_FUNCTION_DECORATORS = frozenset({"lru_cache", "cache"})
_MEMBER_DECORATORS = _FUNCTION_DECORATORS | words("staticmethod classmethod property setter abstractmethod")
_CLASS_DECORATORS = frozenset({"dataclass", "total_ordering", "unique"})
_DUNDER = re.compile(r"__.*__\Z", re.DOTALL)
_CLASS_DUNDERS = frozenset(
    f"__{name}__"
    for name in words(
        """
        abs add and bool bytes call contains copy deepcopy delitem divmod enter eq exit float floordiv format
        ge getitem gt hash iadd index init int invert ior isub iter le len lshift lt match_args matmul missing
        mod mul ne neg next or pos post_init pow radd repr reversed rmul round rshift rsub setitem slots str
        sub truediv xor
        """
    )
)
_INSTEAD = {
    "__class__": "ask with `isinstance`",
    "__name__": "ask with `isinstance`, and write the names of types as text",
    "__dict__": "read and assign attributes by their names",
    "_asdict": "make the dict from the fields by their names",
    "_replace": "make a new tuple from the fields by their names",
}
_PRIVATE_FIELD = re.compile(r"\{[^{}]*[.\[]_")


def is_marker(node: ast.AST) -> bool:
    """Whether a statement is `self._p_changed = True`, the only use of an underscore that a method has."""
    match node:
        case ast.Assign(
            targets=[ast.Attribute(value=ast.Name(id="self"), attr="_p_changed")],
            value=ast.Constant(value=True),
        ):
            return True
    return False


def check_policy(tree: ast.Module, method: ast.FunctionDef) -> Findings:
    """Yields every breach of the policy in the imports and in the method of a module."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from check_import(node)
    yield from _Policy(tree, method).findings()


class _Policy:
    """One pass over the nodes of a method, with a check for each type of node that needs one."""

    def __init__(self, tree: ast.Module, method: ast.FunctionDef) -> None:
        self._method = method
        self._parameters = frozenset(arg.arg for arg in arguments(method))
        self._modules = imports(tree)
        self._clones = _clones(method) - self._parameters
        self._has_class = any(isinstance(node, ast.ClassDef) for node in ast.walk(method))
        self._excused = frozenset(id(node) for node in _excused(method))
        self._checks: dict[type[ast.AST], Callable[[Any, Scope], Findings]] = {
            ast.Import: lambda node, _: check_import(node),
            ast.ImportFrom: lambda node, _: check_import(node),
            ast.FunctionDef: self._decorated,
            ast.ClassDef: self._decorated,
            ast.Attribute: self._attribute,
            ast.Name: self._name,
            ast.Call: self._call,
            ast.Constant: self._constant,
            ast.MatchClass: _pattern,
            ast.Global: _global,
            ast.Yield: _generator,
            ast.YieldFrom: _generator,
            ast.AsyncFunctionDef: _async,
            ast.AsyncFor: _async,
            ast.AsyncWith: _async,
            ast.Await: _async,
            ast.comprehension: _comprehension,
        }

    def findings(self) -> Findings:
        for node, scope in walk(self._method):
            yield from _identifier(node, scope)
            if check := self._checks.get(type(node)):
                yield from check(node, scope)

    def _decorated(self, node: ast.FunctionDef | ast.ClassDef, scope: Scope) -> Findings:
        allowed = _MEMBER_DECORATORS if scope.in_class else _FUNCTION_DECORATORS
        if isinstance(node, ast.ClassDef):
            allowed = _CLASS_DECORATORS
        for decorator in node.decorator_list:
            if _last_name(decorator.func if isinstance(decorator, ast.Call) else decorator) not in allowed:
                yield Finding("decorator", decorator.lineno, f"Remove this decorator from `{node.name}`.")

    def _attribute(self, node: ast.Attribute, scope: Scope) -> Findings:
        if id(node) in self._excused:
            return
        if node.attr == "_p_changed":
            message = "Use `_p_changed` only in the statement `self._p_changed = True`."
            yield Finding("underscore", node.lineno, message)
        elif node.attr.startswith("_"):
            yield _private(node.attr, node.lineno)
        elif not isinstance(node.ctx, ast.Load) and not self._may_set(node.value, scope):
            yield _other_object(node.attr, node.lineno)
        elif isinstance(node.value, ast.Name) and node.value.id in self._modules:
            yield from check_member(node, self._modules[node.value.id], node.attr)

    def _may_set(self, owner: ast.expr, scope: Scope) -> bool:
        """Whether a method may set attributes of a value: of self, and of objects that it made itself."""
        if scope.in_class or (isinstance(owner, ast.Name) and owner.id in {"self", *self._clones}):
            return True
        root = root_name(owner)
        return self._has_class and root in scope.bound and root not in self._parameters

    def _name(self, node: ast.Name, scope: Scope) -> Findings:
        if node.id in scope.bound or id(node) in self._excused:
            return
        if node.id in _REFUSED_BUILTINS:
            yield Finding("builtin", node.lineno, f"Don't use `{node.id}`: {_REFUSED_BUILTINS[node.id]}.")
        elif node.id in _BY_NAME:
            yield Finding("getattr", node.lineno, f"Call `{node.id}` directly, don't pass it on.")

    def _call(self, node: ast.Call, scope: Scope) -> Findings:
        name = _last_name(node.func)
        if name in _FETCHERS:
            yield from _constant_names(
                name, node.args if name == "attrgetter" else node.args[:1], node.lineno
            )
        if not isinstance(node.func, ast.Name) or name not in _BY_NAME or name in scope.bound:
            return
        yield from _constant_names(name, node.args[1:2], node.lineno)
        if len(node.args) < 2 or any(isinstance(arg, ast.Starred) for arg in node.args):
            yield Finding("getattr", node.lineno, f"Give `{name}` an object and a constant name.")
        elif name in {"setattr", "delattr"} and not self._may_set(node.args[0], scope):
            yield _other_object(name, node.lineno)

    def _constant(self, node: ast.Constant, _: Scope) -> Findings:
        if id(node) in self._excused or not isinstance(node.value, str):
            return
        if _PRIVATE_FIELD.search(unicodedata.normalize("NFKC", node.value)):
            message = "Don't reach names with a leading underscore through a format string."
            yield Finding("format", node.lineno, message)


def _clones(method: ast.FunctionDef) -> frozenset[str]:
    """Returns the names of objects that the method makes itself, as in `young = self.clone("young")`."""
    found = set()
    for node in ast.walk(method):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(attr="clone")))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(func=ast.Attribute(attr="clone")))
                | ast.NamedExpr(target=ast.Name(id=name), value=ast.Call(func=ast.Attribute(attr="clone")))
            ):
                found.add(name)
    return frozenset(found)


def _excused(method: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yields the nodes that would breach the policy anywhere but where they stand."""
    for node in ast.walk(method):
        match node:
            case ast.Expr(value=ast.Constant() as text):  # a docstring, or a comment in its form
                yield text
            case ast.Assign(targets=[target]) if is_marker(node):
                yield target
            case ast.Call(
                func=ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr="__init__") as func
            ):
                yield func
            case ast.Call(func=ast.Name(id=name)) if name in _BY_NAME:
                yield node.func


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _private(name: str, line: int) -> Finding:
    advice = _INSTEAD.get(name, "choose another name")
    message = f"Don't use `{name}`, because names with a leading underscore are private; {advice}."
    return Finding("underscore", line, message)


def _other_object(name: str, line: int) -> Finding:
    message = (
        f"Don't set attributes of another object (`{name}`); change another object by sending it a message."
    )
    return Finding("attribute", line, message)


def _identifier(node: ast.AST, scope: Scope) -> Findings:
    name = node.id if isinstance(node, ast.Name) else binds(node)
    if not name or not _DUNDER.match(name) or name in _REFUSED_BUILTINS:
        return
    if not scope.in_class or name not in _CLASS_DUNDERS:
        yield _private(name, getattr(node, "lineno", 1))


def _constant_names(function: str, names: list[ast.expr], line: int) -> Findings:
    for name in names:
        if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
            message = f"Give `{function}` a constant name; keep values under other names in a dict on self."
            yield Finding("getattr", line, message)
        elif any(part.startswith("_") for part in unicodedata.normalize("NFKC", name.value).split(".")):
            yield _private(name.value, line)


def _pattern(node: ast.MatchClass, _: Scope) -> Findings:
    for name in node.kwd_attrs:
        if name.startswith("_"):
            yield _private(name, node.lineno)


def _global(node: ast.Global, _: Scope) -> Findings:
    yield Finding(
        "global", node.lineno, "Keep what must last in attributes of self instead of `global` names."
    )


def _generator(node: ast.Yield | ast.YieldFrom, scope: Scope) -> Findings:
    if not scope.in_function:
        yield Finding(
            "generator", node.lineno, "Collect the values in a list and return it instead of `yield`."
        )


def _async(node: ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await, _: Scope) -> Findings:
    yield Finding("async", node.lineno, "Write plain code without `async` and `await`.")


def _comprehension(node: ast.comprehension, _: Scope) -> Findings:
    if node.is_async:
        yield Finding("async", node.iter.lineno, "Write plain code without `async` and `await`.")
