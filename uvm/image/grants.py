"""A grant: what the Architect lets the methods of an object use of the world. Layer 1.

`Grant` is persistent: its module path is the disk format. It holds no power of its own, only what was
allowed; the broker carries each use out. Imports nothing of BAT OS.
"""

from __future__ import annotations

import time
from typing import Any

from persistent import Persistent


class Grant(Persistent):
    """What one slot of an object opens; never changed, only replaced.

    Attributes:
        kind: one of `uvm.capabilities.KINDS`.
        options: plain dict, as `uvm.grant_options` has it.
        granted: Unix seconds.
    """

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.kind = kind
        self.options = options
        self.granted = time.time()

    def record(self) -> dict[str, Any]:
        """Returns the grant as plain data."""
        return {"kind": self.kind, "options": dict(self.options), "granted": self.granted}
