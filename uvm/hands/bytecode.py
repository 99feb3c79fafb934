"""Methods compiled beforehand: what a fresh worker would otherwise do again for each message.

Compiling is done in a hand that runs nothing else, so that no method can forge another one's code; the kernel
keeps the bytes and never looks inside. Kernel's side.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MOST = 2000  # methods kept
AT_ONCE = 50  # methods compiled by one hand
MAX_BYTES = 256 << 10  # of one method's bytecode; it travels with every call


class Method(NamedTuple):
    """A method to be compiled; `file` is what `uvm.hands.methods.filename` calls it."""

    source: str
    file: str


class Bytecode:
    """The compiled methods of a pool, the least recently used forgotten first."""

    def __init__(self) -> None:
        self._known: OrderedDict[Method, bytes | None] = OrderedDict()
        self._wanted: dict[Method, None] = {}

    def of(self, method: Method) -> bytes | None:
        """Returns the bytes, or None while there are none; a method not known yet is noted as wanted."""
        if method in self._known:
            self._known.move_to_end(method)
            return self._known[method]
        if len(self._wanted) < MOST:
            self._wanted[method] = None
        return None

    def wanted(self) -> list[Method]:
        """Returns up to `AT_ONCE` methods that were asked for in vain; each is told once."""
        found = list(self._wanted)[:AT_ONCE]
        for method in found:
            del self._wanted[method]
        return found

    def keep(self, method: Method, code: bytes | None) -> None:
        """Keeps what came of compiling a method; too large a result counts as none."""
        self._known[method] = code if code is not None and len(code) <= MAX_BYTES else None
        while len(self._known) > MOST:
            self._known.popitem(last=False)
