"""Lanes: how many requests of a kind run at once, and how many may wait. Layer 1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from uvm.errors import QueueFull


class Lane:
    """A bounded queue in front of a fixed number of places, first come, first served.

    Args:
        name: what waits here, for errors and `status`.
        places: how many run at once.
        limit: how many may wait besides.
    """

    def __init__(self, name: str, places: int, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.running = 0
        self.waiting = 0
        self._places = asyncio.Semaphore(places)

    def admit(self) -> None:
        """Refuses at once where the queue is full.

        Raises:
            QueueFull: `limit` requests wait already.
        """
        if self.waiting >= self.limit:
            raise QueueFull(f"{self.waiting} {self.name} wait already; try again later", lane=self.name)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a place and holds it."""
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    def told(self) -> dict[str, int]:
        """Returns how many run, wait, and may wait, for `status`."""
        return {"running": self.running, "waiting": self.waiting, "limit": self.limit}
