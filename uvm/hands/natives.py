"""What every object understands by nature, and what the names of slots, selectors and objects look like.

Inside a hand `uvm.hands.session` answers the natives, outside the kernel; both read here. Imports nothing
of BAT OS.
"""

from __future__ import annotations

import keyword
import unicodedata

NATIVES: dict[str, tuple[str, ...]] = {"clone": ("name",), "selectors": (), "understands": ("selector",)}
RESERVED = frozenset({"parents"})  # no slots: what an object delegates to is not for its methods to change
MAX_NAME = 100  # characters


def is_public(name: object) -> bool:
    """Returns whether `name` may name a slot, a selector or an object: an identifier without underscore."""
    return (
        type(name) is str
        and len(name) <= MAX_NAME
        and name.isidentifier()
        and not name.startswith("_")
        and not keyword.iskeyword(name)
        and unicodedata.normalize("NFKC", name) == name
    )


def filename(owner: str, selector: str) -> str:
    """Returns the file name of a method in tracebacks; no real file has one like it."""
    return f"<method {owner}.{selector}>"


def selector_of(file: str) -> str | None:
    """Returns the selector of the method that `filename` named, or None for any other file."""
    return file[:-1].rpartition(".")[2] if file.startswith("<method ") else None
