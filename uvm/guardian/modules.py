"""Which modules generated code may import, and what to say about the others.

The list is about good methods, not about safety: the hand is the wall. Imports nothing of BAT
OS but the guardian's parts.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

from uvm.guardian.findings import Finding
from uvm.guardian.text import words

ALLOWED_MODULES: frozenset[str] = words(
    """
    abc array base64 bisect binascii calendar cmath collections collections.abc colorsys contextlib copy csv
    dataclasses datetime decimal difflib enum fractions functools graphlib hashlib heapq hmac html io
    itertools json math numbers operator pprint random re statistics string struct textwrap time typing
    unicodedata uuid zlib zoneinfo
    """
)

_REASONS = {
    "use float('inf') or a literal instead": "sys",
    "a method can't reach the operating system": "os pathlib shutil glob tempfile subprocess platform signal",
    "a method can't reach the network": "socket ssl urllib http requests httpx aiohttp ftplib smtplib",
    "do the work directly, one step after another": "threading multiprocessing concurrent asyncio queue",
    "keep data in attributes of self": "pickle marshal shelve sqlite3 dbm persistent transaction ZODB BTrees",
    "use plain lists and the modules math and statistics": "numpy pandas scipy sympy",
    "use the module random": "secrets",
    "annotations need no import here": "__future__",
    "return the text instead": "logging",
    "a method can't look into the interpreter": "ast builtins ctypes dis gc importlib inspect types weakref",
}
_HINTS = {module: hint for hint, modules in _REASONS.items() for module in modules.split()}
# Files by another name than `open`, which hands refuse anyhow.
_REFUSED_MEMBERS = frozenset({"io.open", "io.open_code", "io.FileIO"})


def check_import(node: ast.Import | ast.ImportFrom) -> Iterator[Finding]:
    """Yields a finding for each refused module, and for relative, star and underscore imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name not in ALLOWED_MODULES:
                yield _refuse(alias.name, node)
    elif node.level or not node.module:
        yield Finding("import", node.lineno, "Import from a module by its full name, not with a leading dot.")
    elif node.module not in ALLOWED_MODULES:
        yield _refuse(node.module, node)
    else:
        for alias in node.names:
            yield from _check_member(node, node.module, alias.name)


def _check_member(node: ast.ImportFrom, module: str, name: str) -> Iterator[Finding]:
    if name == "*":
        yield Finding("import", node.lineno, f"Name what you import from `{module}` instead of `*`.")
    elif name.startswith("_"):
        yield Finding(
            "import", node.lineno, f"Don't import `{name}`, because names with an underscore are private."
        )
    else:
        yield from check_member(node, module, name)


def check_member(node: ast.stmt | ast.expr, module: str, name: str) -> Iterator[Finding]:
    """Yields a finding where a member of an allowed module is a refused one, as in `uuid.os`."""
    leaked = name in sys.stdlib_module_names and name not in ALLOWED_MODULES
    if leaked or f"{module}.{name}" in _REFUSED_MEMBERS:
        yield _refuse(name if leaked else f"{module}.{name}", node)


def _refuse(name: str, node: ast.stmt | ast.expr) -> Finding:
    hint = _HINTS.get(name.partition(".")[0], "solve it with plain Python")
    if name in _REFUSED_MEMBERS:
        hint = "a method can't open files"
    return Finding("import", node.lineno, f"Don't import or use `{name}`: {hint}.")
