"""What is known of a method as a whole while its statements are read: imports, nested functions, steps.

Imports nothing of BAT OS but the guardian's parts.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from uvm.guardian.findings import TooComplex
from uvm.guardian.levels import CONTAINERS, FRESH
from uvm.guardian.scopes import bound_names, imports, root_name

# The largest functions of the standard library take under 3,000.
MAX_STEPS = 40_000
Helper = ast.FunctionDef | ast.ClassDef | ast.Lambda


@dataclass(frozen=True, slots=True)
class Summary:
    """What using a nested function does: does it change self, its result's level, the names it lowers."""

    changes: bool = False
    returns: int = FRESH
    lowers: frozenset[tuple[str, int]] = frozenset()


class Known:
    """Shared by all readers of one method.

    `helpers` are the nested functions and classes by name, `members` the functions of those classes,
    `anywhere` the lowest level that each name has at any place, which is what a nested function may meet.
    """

    def __init__(self, tree: ast.Module, method: ast.FunctionDef) -> None:
        self.helpers: dict[str, list[Helper]] = {}
        self.members: set[ast.stmt] = set()
        self.anywhere: dict[str, int] = {}
        self.summaries: dict[tuple[Helper, int], Summary] = {}
        self._modules = imports(tree)
        self._steps = 0
        self._local: dict[Helper, frozenset[str]] = {}
        nodes = [node for node in ast.walk(method) if node is not method]
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                self.members.update(node.body)
        for node in nodes:
            match node:
                case ast.FunctionDef() | ast.ClassDef() if node not in self.members:
                    self.helpers.setdefault(node.name, []).append(node)
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Lambda() as function):
                    self.helpers.setdefault(name, []).append(function)

    def step(self, weight: int = 1) -> None:
        """Counts a step of the analysis, which ends when there are too many."""
        self._steps += weight
        if self._steps > MAX_STEPS:
            raise TooComplex

    def lower(self, name: str, level: int) -> None:
        self.anywhere[name] = min(self.anywhere.get(name, FRESH), level)

    def local_names(self, helper: Helper) -> frozenset[str]:
        if helper not in self._local:
            self._local[helper] = bound_names(helper)
        return self._local[helper]

    def summary(self, helper: Helper, given: int) -> Summary:
        """Returns what is known so far of a helper whose arguments have the level `given`."""
        return self.summaries.setdefault((helper, given), Summary())

    def helpers_of(self, node: ast.expr) -> list[Helper]:
        """Returns the nested functions that an expression names or is."""
        if isinstance(node, ast.Lambda):
            return [node]
        return self.helpers.get(node.id, []) if isinstance(node, ast.Name) else []

    def path(self, node: ast.expr, local: dict[str, int]) -> str:
        """Returns the dotted path of an imported or built-in function, or "" for anything else."""
        match node:
            case ast.Name(id=name) if name in self._modules:
                return self._modules[name]
            case ast.Name(id=name):
                return "" if name in local or name in self.helpers else name
            case ast.Attribute(value=value, attr=attr):
                owner = self.path(value, local)
                known = owner in CONTAINERS or root_name(node) in self._modules
                return f"{owner}.{attr}" if owner and known else ""
        return ""
