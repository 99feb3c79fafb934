"""From source to function: generated code gets a namespace of its own and the builtins that it may have.

This keeps honest code honest; what stops hostile code is the sandbox around the process. Runs in the child.
"""

from __future__ import annotations
import __future__

import builtins
import functools
import importlib
import linecache
import marshal
from collections.abc import Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from uvm.guardian import ALLOWED_MODULES

_WITHHELD = frozenset(
    {"open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit"}
    | {"help", "copyright", "credits", "license"}
)
# What the standard library imports only when it is first used: inside a hand no file opens any more.
_LATE = (
    "_strptime",
    "unicodedata",
    "encodings.ascii",
    "encodings.cp1252",
    "encodings.cp437",
    "encodings.hex_codec",
    "encodings.base64_codec",
    "encodings.idna",
    "encodings.iso8859_1",
    "encodings.iso8859_15",
    "encodings.latin_1",
    "encodings.punycode",
    "encodings.raw_unicode_escape",
    "encodings.rot_13",
    "encodings.unicode_escape",
    "encodings.utf_16",
    "encodings.utf_16_be",
    "encodings.utf_16_le",
    "encodings.utf_32",
    "encodings.utf_8_sig",
)
# Late ones too: `datetime.strptime` imports `_strptime` in the name of the method that calls it.
_IMPORTABLE = frozenset(module.partition(".")[0] for module in (*ALLOWED_MODULES, *_LATE))


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    if level or name.partition(".")[0] not in _IMPORTABLE:
        raise ImportError(f"'{name}' is not among the modules that a method may import", name=name)
    return __import__(name, globals, locals, fromlist or (), level)


# Small models write `x: List[int]` without the import; as text, annotations need none.
_LAZY_ANNOTATIONS = __future__.annotations.compiler_flag

_BUILTINS = {name: value for name, value in vars(builtins).items() if name not in _WITHHELD}
_BUILTINS["__import__"] = _import


_ZONES: list[ZoneInfo] = []  # as long as they are held, `ZoneInfo` finds them without a file


def preload() -> None:
    """Loads everything that a method may use, in the zygote, while files still open."""
    for name in (*sorted(ALLOWED_MODULES), *_LATE):
        importlib.import_module(name)
    _ZONES.extend(map(ZoneInfo, available_timezones()))


@functools.cache
def compiled(source: str, selector: str, file: str, code: bytes | None = None) -> FunctionType:
    """Returns the function called `selector` that `source` defines.

    Args:
        code: what `bytecode` made of the same source; None compiles it here.

    Raises:
        SyntaxError, or whatever else running the source raises.
        NameError: it defines no function of that name.
    """
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__builtins__": _BUILTINS, "__name__": "method"}
    exec(_compile(source, file) if code is None else marshal.loads(code), namespace)
    function = namespace.pop(selector, None)  # a method `sum` that calls `sum` means the builtin
    if not isinstance(function, FunctionType):
        raise NameError(f"the source defines no function '{selector}'")
    return function


def bytecode(source: str, file: str) -> bytes | None:
    """Returns `source` compiled for this interpreter, not run; None where it is no Python."""
    try:
        return marshal.dumps(_compile(source, file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _compile(source: str, file: str) -> CodeType:
    code: CodeType = compile(source, file, "exec", _LAZY_ANNOTATIONS, dont_inherit=True)
    return code
