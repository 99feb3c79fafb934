"""The outside of a submission: one function, its name, parameters, defaults and annotations.

All of that runs when the method is defined, before any trial, so it must be inert. The policy looks inside
the function, the covenant at its paths. Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from uvm.guardian.findings import Finding
from uvm.guardian.scopes import arguments, bound_names, signature

Findings = Iterator[Finding]

_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_ANNOTATION = (
    ast.Name
    | ast.Attribute
    | ast.Subscript
    | ast.Constant
    | ast.BinOp
    | ast.Tuple
    | ast.List
    | ast.expr_context
    | ast.operator
)


def find_method(tree: ast.Module, selector: str) -> ast.FunctionDef | None:
    """Returns the top-level function that is meant: the one of the right name, or else the only one."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    named = [function for function in functions if function.name == selector]
    return named[0] if named else functions[0] if len(functions) == 1 else None


def check_shape(
    tree: ast.Module, method: ast.FunctionDef | None, selector: str, parameters: Sequence[str] | None
) -> Findings:
    """Yields what is wrong with the outside of a submission."""
    expected = f"def {selector}({', '.join(['self', *(parameters or ())])}):"
    if not any(isinstance(node, _DEFINITIONS) for node in tree.body):
        yield Finding("shape", 1, f"Write exactly one function that starts with `{expected}`.")
        return
    for node in tree.body:
        if node is not method:
            yield from _beside(node, selector)
    if method is None:
        return
    if method.name != selector:
        yield Finding("name", method.lineno, f"Name the function `{selector}`, not `{method.name}`.")
    if not takes_self(method):
        yield Finding("self", method.lineno, f"Make `self` the first parameter: `{expected}`.")
    elif parameters is not None and signature(method)[1:] != tuple(parameters):
        yield Finding("parameters", method.lineno, f"Write the signature as `{expected}`.")
    yield from _header(method)


def takes_self(method: ast.FunctionDef) -> bool:
    """Whether the first positional parameter of a method is `self`."""
    positional = [*method.args.posonlyargs, *method.args.args]
    return bool(positional) and positional[0].arg == "self"


def _beside(node: ast.stmt, selector: str) -> Findings:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
            pass
        case ast.FunctionDef(name=name) if name == selector:
            yield Finding("shape", node.lineno, f"Define `{selector}` only once.")
        case ast.FunctionDef(name=name):
            message = f"Move the function `{name}` inside `{selector}`; only one may stand at the top."
            yield Finding("shape", node.lineno, message)
        case ast.AsyncFunctionDef():
            yield Finding("async", node.lineno, f"Write `def {selector}` instead of `async def`.")
        case ast.ClassDef():
            message = f"Write only the function `{selector}`, without a class around or beside it."
            yield Finding("shape", node.lineno, message)
        case _:
            message = f"Remove this statement, because only imports may stand beside `{selector}`."
            yield Finding("shape", node.lineno, message)


def _header(method: ast.FunctionDef) -> Findings:
    for decorator in method.decorator_list:
        yield Finding("decorator", decorator.lineno, f"Remove the decorator from `{method.name}`.")
    for default in [*method.args.defaults, *method.args.kw_defaults]:
        if default and not _is_literal(default):
            message = "Use a literal such as None as default, and compute the value inside the method."
            yield Finding("default", default.lineno, message)
    for annotation in [*(arg.annotation for arg in arguments(method)), method.returns]:
        if annotation and not all(isinstance(node, _ANNOTATION) for node in ast.walk(annotation)):
            yield Finding("annotation", annotation.lineno, "Use a plain type as annotation, or none.")
    if "self" in bound_names(ast.Module(method.body, [])):
        yield Finding("self", method.lineno, "Don't assign to `self`; use another name.")


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True
