"""The workers that wait for calls: made ahead of time, many in one turn of the zygote, replaced when used.

Kernel's side. When the zygote dies, its workers die with it, and the next call has another one started.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from uvm.errors import QueueFull, ShuttingDown
from uvm.hands.sandbox import Limits
from uvm.hands.zygote import Hand, Zygote
from uvm.pressure import exhausted

BESIDE = 12  # workers kept ready beside one for each call that may run at once
_RENEW_S = 0.03  # a burst of calls is not slowed by the making of new workers before this is over


class Stock:
    """The zygote, and the workers that it has made and nobody has used.

    Args:
        calls: how many may run at once.
        output_bytes: longest frame that a hand may send.

    Attributes:
        limits: of the next zygote.
        zygote: the living or the last one; None before the start and after the end.
        restarts: zygotes started after the first.
    """

    def __init__(self, calls: int, limits: Limits, output_bytes: int) -> None:
        self.limits = limits
        self.zygote: Zygote | None = None
        self.restarts = 0
        self._calls = calls
        self._output_bytes = output_bytes
        self._spares: deque[Hand] = deque()
        self._done: list[Hand] = []  # to be ended when their places are filled
        self._renewal: asyncio.TimerHandle | None = None

    @property
    def most(self) -> int:
        """How many workers wait when all is quiet."""
        return self._calls + BESIDE

    def start(self) -> Zygote:
        """Starts a zygote, in the place of an earlier one that has died."""
        self._forget()
        self.zygote = Zygote(self.limits, self._output_bytes)
        self._renew()
        return self.zygote

    def living(self) -> Zygote:
        """Returns the zygote, or a new one if it has died.

        Raises:
            ShuttingDown: the hands are closed.
        """
        if self.zygote is None:
            raise ShuttingDown("the hands are closed")
        if not self.zygote.alive:
            self.restarts += 1
            return self.start()
        return self.zygote

    def take(self, zygote: Zygote) -> Hand:
        """Returns a worker for a call: one that waits, or a new one.

        Raises:
            ResourceExhausted, QueueFull: there is none, and the system gives no means to make one.
        """
        while self._spares:
            hand = self._spares.popleft()
            hand.look()
            if not hand.ended:
                return hand
            self._done.append(hand)
        try:
            return zygote.fork(1)[0]
        except OSError as error:
            raise exhausted(error) or QueueFull(f"no hand can be made now: {error}") from None

    def retire(self, zygote: Zygote, hand: Hand) -> None:
        """Has a worker that served its call replaced: soon, or at once where there are few left."""
        if zygote is not self.zygote:
            hand.close()
            return
        self._done.append(hand)
        if len(self._spares) < self._calls:
            self._renew()
        elif self._renewal is None:
            self._renewal = asyncio.get_running_loop().call_later(_RENEW_S, self._renew)

    async def close(self) -> None:
        """Ends every process."""
        zygote, self.zygote = self.zygote, None
        self._forget()
        if zygote is not None:
            await zygote.close()

    def _renew(self) -> None:
        """Ends the workers that are done and has new ones made, in one turn of the zygote."""
        self._cancel_renewal()
        if self.zygote is not None and self.zygote.alive:
            self.zygote.end(self._done)
            self._done.clear()
            with suppress(OSError):  # no descriptor is left: the next call tries again
                self._spares.extend(self.zygote.fork(self.most - len(self._spares)))

    def _forget(self) -> None:
        self._cancel_renewal()
        for hand in (*self._spares, *self._done):
            hand.close()
        self._spares.clear()
        self._done.clear()

    def _cancel_renewal(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None
