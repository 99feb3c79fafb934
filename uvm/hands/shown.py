"""What one hand has been shown, and so what it can reach: it may refer to nothing else.

An object is reachable through the delegation chain of the receiver, through the arguments, and through
parents and slots of reachable objects, once the hand has been sent them. Kernel's side; no I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uvm.codec import references


class Shown:
    """What the kernel has sent to one hand.

    Attributes:
        objects: oids of the objects whose views were sent, which are those that the hand may change.
    """

    def __init__(self) -> None:
        self.objects: set[str] = set()
        self._reachable: set[str] = set()
        # Most calls ask for nothing further, so values are searched for references only when one does.
        self._unsearched: list[Any] = []

    def add(self, oid: str, parents: Iterable[str], values: Any) -> None:
        """Notes that the hand was sent an object, and with it these values of its slots."""
        self.objects.add(oid)
        self._reachable.add(oid)
        self._reachable.update(parents)
        self.hold(values)

    def hold(self, values: Any) -> None:
        """Notes that the hand was sent plain values: whatever they refer to is reachable from now on."""
        self._unsearched.append(values)

    def reaches(self, oid: str) -> bool:
        """Returns whether the hand may refer to this object."""
        if oid not in self._reachable and self._unsearched:
            self._reachable.update(references(self._unsearched))
            self._unsearched.clear()
        return oid in self._reachable
