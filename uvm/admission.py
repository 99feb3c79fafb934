"""How much may be under way: for each connection and for all, in requests and in bytes. Used by the bridge.

Lanes limit what runs; this limits what is kept, so that whoever sends without end, or never reads an answer,
fills his own share and nobody else's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from uvm.errors import QueueFull


@dataclass(frozen=True)
class Share:
    """A bound: so many requests, of so many bytes together (one of any size always fits)."""

    requests: int
    size: int


EACH = Share(requests=1024, size=64 << 20)
ALL = Share(requests=8192, size=512 << 20)


@dataclass
class Admission:
    """Counts what is under way."""

    each: Share = EACH
    all: Share = ALL
    _under_way: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    _total: tuple[int, int] = (0, 0)

    def enter(self, connection: bytes, size: int) -> None:
        """Counts a request of `size` bytes in.

        Raises:
            QueueFull: this connection, or all together, have too much under way.
        """
        requests, held = self._under_way.get(connection, (0, 0))
        _check(self.each, requests, held + size, "this connection has")
        _check(self.all, self._total[0], self._total[1] + size, "all connections together have")
        self._under_way[connection] = requests + 1, held + size
        self._total = self._total[0] + 1, self._total[1] + size

    def leave(self, connection: bytes, size: int) -> None:
        """Counts it out."""
        requests, held = self._under_way.pop(connection)
        if requests > 1:
            self._under_way[connection] = requests - 1, held - size
        self._total = self._total[0] - 1, self._total[1] - size


def _check(share: Share, requests: int, size: int, who: str) -> None:
    if requests >= share.requests or (requests and size > share.size):
        raise QueueFull(f"{who} {requests} requests under way; read their answers first", requests=requests)
