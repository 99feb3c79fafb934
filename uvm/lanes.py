"""Lanes: how many requests of a kind run at once, and how many may wait, in which order. Layer 1."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from uvm.errors import QueueFull

_Waiter = tuple[int, int, "asyncio.Future[None]"]  # rank, number of arrival, done when it has its place


class Lane:
    """A bounded queue in front of a fixed number of places: by rank, then first come, first served.

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
        self._places = places
        self._queue: list[_Waiter] = []
        self._arrivals = itertools.count()

    def admit(self, share: float = 1.0, coming: int = 0) -> None:
        """Refuses at once where the queue is full.

        Args:
            share: the part of the queue that this kind of request may fill.
            coming: how many were admitted before and do not wait yet.

        Raises:
            QueueFull: so many requests wait already.
        """
        ahead = self.running + self.waiting + coming - self._places
        if ahead >= 0 and ahead + 1 > self.limit * share:
            raise QueueFull(f"{ahead} {self.name} wait already; try again later", lane=self.name)

    @asynccontextmanager
    async def place(self, rank: int = 0) -> AsyncIterator[None]:
        """Waits for a place and holds it; who has a lower rank goes before who has a higher one."""
        await self._take(rank)
        try:
            yield
        finally:
            self._give_back()

    def told(self) -> dict[str, int]:
        """Returns how many run, wait, and may wait, for `status`."""
        return {"running": self.running, "waiting": self.waiting, "limit": self.limit}

    async def _take(self, rank: int) -> None:
        if self.running < self._places:  # none that still waits is left then: see `_give_back`
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (rank, next(self._arrivals), turn)
        heapq.heappush(self._queue, waiter)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(waiter)
            else:  # its turn came in the same moment
                self._give_back()
            raise

    def _forget(self, waiter: _Waiter) -> None:
        self.waiting -= 1
        with suppress(ValueError):  # passed over already
            self._queue.remove(waiter)
            heapq.heapify(self._queue)

    def _give_back(self) -> None:
        """Hands the place to whoever is next; it is free where nobody waits."""
        while self._queue:
            _, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(None)
                self.waiting -= 1
                return
        self.running -= 1
