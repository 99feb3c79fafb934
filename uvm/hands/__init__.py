"""Hands: generated code runs in these locked-down child processes, never in the kernel's. Layer 2.

The names are fetched when they are first used: the child processes pass through this package too, and must
not load what only the kernel needs (asyncio above all).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvm.hands.calls import Call, Created, Host, ObjectView, Outcome, SlotChanges
    from uvm.hands.natives import NATIVES
    from uvm.hands.pool import HandPool

_HOMES = {
    "NATIVES": "natives",
    "Call": "calls",
    "Created": "calls",
    "HandPool": "pool",
    "Host": "calls",
    "ObjectView": "calls",
    "Outcome": "calls",
    "SlotChanges": "calls",
}
__all__ = ["NATIVES", "Call", "Created", "HandPool", "Host", "ObjectView", "Outcome", "SlotChanges"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
