"""How much may be under way: for each connection, each client's key and all, in requests and in bytes.

Lanes limit what runs; this limits what is kept, so that whoever sends without end, or never reads an answer,
fills his own share and nobody else's memory. That a connection has a share of its own leaves room for the
others of the same key; that a key has one, for those of other keys. Used by the bridge.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from uvm.errors import QueueFull


@dataclass(frozen=True)
class Share:
    """A bound: so many requests, of so many bytes together (one of any size always fits)."""

    requests: int
    size: int


CONNECTION = Share(requests=1024, size=64 << 20)
CLIENT = Share(requests=4096, size=256 << 20)
ALL = Share(requests=8192, size=512 << 20)

_Owner = tuple[str] | tuple[str, bytes] | tuple[()]  # a key, a connection of it, or all


@dataclass
class Admission:
    """Counts what is under way."""

    connection: Share = CONNECTION
    client: Share = CLIENT
    all: Share = ALL
    _under_way: dict[_Owner, tuple[int, int]] = field(default_factory=dict)

    def enter(self, key: str, connection: bytes, size: int) -> None:
        """Counts a request of `size` bytes in, over this connection of the client with this key.

        Raises:
            QueueFull: the connection, the client, or all together, have too much under way.
        """
        self._check((key, connection), self.connection, size, "this connection has")
        self._check((key,), self.client, size, "the connections of this key have")
        self._check((), self.all, size, "all connections together have")
        self._count(key, connection, 1, size)

    def leave(self, key: str, connection: bytes, size: int) -> None:
        """Counts it out."""
        self._count(key, connection, -1, -size)

    def _check(self, owner: _Owner, share: Share, size: int, who: str) -> None:
        requests, held = self._under_way.get(owner, (0, 0))
        if requests >= share.requests or (requests and held + size > share.size):
            raise QueueFull(
                f"{who} {requests} requests under way; read their answers first", requests=requests
            )

    def _count(self, key: str, connection: bytes, requests: int, size: int) -> None:
        owners: tuple[_Owner, ...] = ((key, connection), (key,), ())
        for owner in owners:
            before = self._under_way.pop(owner, (0, 0))
            if before[0] + requests:
                self._under_way[owner] = before[0] + requests, before[1] + size
