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
