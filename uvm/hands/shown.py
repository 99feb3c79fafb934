"""What one hand has been shown, and so what it can reach: it may refer to nothing else.

An object is reachable as the receiver, through the arguments, and through slots of objects that the hand has
been sent. It may look at their parents too, from which they inherit, but has no hold of them: what a method
can't name it can neither change nor refer to. Kernel's side; no I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uvm.codec import references


class Shown:
    """What the kernel has sent to one hand.

    Attributes:
        objects: oids of the objects whose views were sent.
    """

    def __init__(self, receiver: str) -> None:
        self.objects: set[str] = set()
        self._reachable = {receiver}
        self._parents: set[str] = set()
        # Most calls ask for nothing further, so values are searched for references only when one does.
        self._unsearched: list[Any] = []

    def add(self, oid: str, parents: Iterable[str], values: Any) -> None:
        """Notes that the hand was sent an object, and with it these values of its slots."""
        self.objects.add(oid)
        self._parents.update(parents)
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

    def may_view(self, oid: str) -> bool:
        """Returns whether the hand may be sent this object."""
        return oid in self._parents or self.reaches(oid)

    def may_change(self, oid: str) -> bool:
        """Returns whether the hand may write this object."""
        return oid in self.objects and self.reaches(oid)
