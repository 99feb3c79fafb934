"""A grant: what the Architect lets the methods of an object use of the world. Layer 1.

`Grant` is persistent: its module path is the disk format. It holds no power of its own, only what was
allowed; the broker carries each use out.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

from persistent import Persistent

from uvm.image.shapes import Shape, a, names


class Grant(Persistent):
    """What one slot of an object opens; never changed, only replaced.

    Attributes:
        kind: one of `uvm.capabilities.KINDS`.
        options: plain dict, as `uvm.grant_options` has it.
        granted: Unix seconds.
    """

    _shape: ClassVar[Shape] = {"kind": a(str), "options": names, "granted": a(float)}

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.kind = kind
        self.options = options
        self.granted = time.time()

    def record(self) -> dict[str, Any]:
        """Returns the grant as plain data."""
        return {"kind": self.kind, "options": dict(self.options), "granted": self.granted}
