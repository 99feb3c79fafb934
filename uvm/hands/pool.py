"""The hands of the kernel: locked-down workers kept ready, one for each call, killed when over their limits.

Kernel's side. A call waits for its turn, takes a worker that is ready, talks with it, and has it replaced.
The zygote (`uvm.hands.worker`) makes the workers; when it dies, the next call starts another.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from uvm.errors import (
    BatosError,
    HandDied,
    HandOutOfMemory,
    HandTimeout,
    HomeError,
    MalformedMessage,
    MethodError,
    QueueFull,
    ShuttingDown,
)
from uvm.guardian import Audit
from uvm.hands.answers import audited, checked, missed, raised, returned, unstorable
from uvm.hands.calls import Call, Host, Outcome
from uvm.hands.conversation import Conversation
from uvm.hands.frames import pack
from uvm.hands.sandbox import tier
from uvm.hands.zygote import Hand, HandGone, Zygote

_READY_S = 30.0  # a worker that takes longer to lock itself down is given up
_TRIES = 3  # workers that may be found dead before one reads the job

Answer = Callable[[str, Any], bytes | None]  # a frame's kind and payload -> the reply, None for a last frame


class HandPool:
    """Runs generated code in processes of its own.

    Args:
        count: calls at once, and workers kept ready beside them.
        timeout_s: wall clock of one call, where the call does not say; CPU time is limited a little above.
        memory_mib: address space of a worker beyond what it starts with, MiB.
        output_bytes: longest frame that a hand may send.
        waiting: calls that may wait for their turn.

    Attributes:
        layers: layer of the sandbox -> whether it held when it was tried out at the start.
        tier: what the layers are worth, A to C; see `uvm.hands.sandbox.tier`.
        kills: hands ended before they had answered.
        restarts: zygotes started after the first.
    """

    def __init__(
        self,
        *,
        count: int,
        timeout_s: float,
        memory_mib: int,
        output_bytes: int = 8 << 20,
        waiting: int = 1000,
    ) -> None:
        self.layers: dict[str, bool] = {}
        self.tier = tier({})
        self.kills = 0
        self.restarts = 0
        self._count = count
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._output_bytes = output_bytes
        self._most_waiting = waiting
        self._waiting = 0
        self._turns = asyncio.Semaphore(count)
        self._spares: deque[Hand] = deque()
        self._zygote: Zygote | None = None

    async def start(self) -> None:
        """Starts the zygote and tries the sandbox out.

        Must be called from the thread that lives as long as the kernel, before any secret is loaded.

        Raises:
            HomeError: no hand can be made here.
        """
        if not hasattr(os, "fork"):
            raise HomeError("hands are forked processes, and this platform has no os.fork")
        self._zygote = Zygote(self._memory_mib, self._output_bytes)
        self._refill()
        try:
            async with self._turn():
                self.layers = await self._check()
        except MethodError as error:
            await self.close()
            raise HomeError(f"no hand can be made here: {error}") from error
        self.tier = tier(self.layers)

    async def run(
        self,
        call: Call,
        host: Host,
        *,
        overlay: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Outcome:
        """Runs a call in a hand.

        Args:
            host: answers what the hand asks about other objects.
            overlay: selector -> source of methods of the target that are not installed yet.
            timeout_s: wall clock of this call, from the moment that its hand begins.

        Raises:
            DoesNotUnderstand: the method sent a message that nobody understands.
            MethodRaised: the method raised, or read a slot that is not there.
            ValueNotStorable: the result, or a slot to be kept, is no plain data.
            HandTimeout, HandOutOfMemory, HandOutputTooLarge, HandDied: the hand ended without a result.
            ObjectNotFound: the call's target is not there.
            QueueFull, ShuttingDown: it did not get its turn.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        talk = Conversation(call, host, overlay)
        endings: dict[str, Callable[[Any], BatosError]] = {
            "raised": raised,
            "unstorable": unstorable,
            "missed": lambda payload: missed(payload, talk.shown),
        }
        async with self._turn():
            job = talk.job(_cpu_s(limit_s))
            kind, payload, seconds = await self._serve(call.selector, job, talk.answer, limit_s)
        with _honest(call.selector):
            if kind in endings:
                raise endings[kind](payload)
            self._expect("returned", kind, call.selector)
            return returned(payload, talk.shown, seconds)

    async def audit(self, source: str, selector: str, parameters: Sequence[str] | None) -> Audit:
        """Returns what the guardian finds in `source`; it reads the source in a hand.

        Raises:
            HandTimeout, HandOutOfMemory, HandOutputTooLarge, HandDied: the hand ended without a result.
            QueueFull, ShuttingDown: it did not get its turn.
        """
        job = {
            "source": source,
            "selector": selector,
            "parameters": None if parameters is None else list(parameters),
            "cpu_s": _cpu_s(self._timeout_s),
        }
        async with self._turn():
            kind, payload, _ = await self._serve("the audit", pack("audit", job), _no_answer, self._timeout_s)
        with _honest("the audit"):
            self._expect("audited", kind, "the audit")
            return audited(payload)

    async def close(self) -> None:
        """Ends every process; calls that are running end as ShuttingDown."""
        zygote, self._zygote = self._zygote, None
        while self._spares:
            self._spares.popleft().close()
        if zygote is not None:
            await zygote.close()

    async def _check(self) -> dict[str, bool]:
        job = pack("check", {"cpu_s": _cpu_s(_READY_S)})
        kind, payload, _ = await self._serve("the sandbox's check", job, _no_answer, _READY_S)
        with _honest("the sandbox's check"):
            self._expect("checked", kind, "the sandbox's check")
            return checked(payload)

    def _expect(self, expected: str, kind: str, what: str) -> None:
        if kind == "exhausted":
            told = f"{what} needed more than {self._memory_mib} MiB"
            raise HandOutOfMemory(told, memory_mib=self._memory_mib)
        if kind != expected:
            raise MalformedMessage(f"'{kind:.40}' where '{expected}' was due")

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._turns.locked() and self._waiting >= self._most_waiting:
            raise QueueFull(f"{self._waiting} calls are waiting for a hand", waiting=self._waiting)
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()

    async def _serve(self, what: str, job: bytes, answer: Answer, limit_s: float) -> tuple[str, Any, float]:
        """Returns kind and payload of a hand's last frame, and the seconds that it took."""
        for _ in range(_TRIES):
            zygote = self._living_zygote()
            hand = self._take(zygote)
            try:
                return await self._converse(zygote, hand, what, job, answer, limit_s)
            except HandGone as gone:
                if not gone.unread:
                    raise self._obituary(what, limit_s, await zygote.bury(hand)) from None
                zygote.look()  # if it died, its workers died with it
            except BaseException:
                self.kills += 1
                raise
            finally:
                asyncio.get_running_loop().call_soon(self._retire, zygote, hand)
        raise HandDied(f"{what}: no worker lived long enough to begin")

    async def _converse(
        self, zygote: Zygote, hand: Hand, what: str, job: bytes, answer: Answer, limit_s: float
    ) -> tuple[str, Any, float]:
        await self._begin(zygote, hand)
        began = time.perf_counter()
        try:
            async with asyncio.timeout(limit_s):
                await hand.send(job)
                while True:
                    with _honest(what):
                        kind, payload = await hand.frame()
                        reply = answer(kind, payload)
                    if reply is None:
                        break
                    await hand.send(reply)
        except TimeoutError:
            raise HandTimeout(f"{what} ran longer than {limit_s:g} s", timeout_s=limit_s) from None
        return kind, payload, time.perf_counter() - began

    async def _begin(self, zygote: Zygote, hand: Hand) -> None:
        """Waits until the worker is locked down."""
        try:
            async with asyncio.timeout(_READY_S):
                kind, payload = await hand.frame()
        except TimeoutError:
            zygote.lose()  # the next call starts another
            raise HandDied(f"a worker was not ready within {_READY_S:g} s") from None
        if kind != "ready":
            raise HandDied(f"a worker could not be locked down: {payload}")

    def _obituary(self, what: str, limit_s: float, end: tuple[int, float] | None) -> BatosError:
        """Returns the error for a hand that ended with this exit status and these seconds of CPU time."""
        if end is None:
            if self._zygote is None:
                return ShuttingDown(f"{what} was cut short: the hands are closing")
            return HandDied(f"{what} was cut short: the process that makes the hands died")
        status, cpu_s = end
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and cpu_s >= _cpu_s(limit_s)):
            return HandTimeout(f"{what} used more than {_cpu_s(limit_s)} s of CPU time", timeout_s=limit_s)
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"left with status {status}"
        return HandDied(f"{what} {how} before it had answered", status=status)

    def _living_zygote(self) -> Zygote:
        if self._zygote is None:
            raise ShuttingDown("the hands are closed")
        if not self._zygote.alive:
            while self._spares:
                self._spares.popleft().close()
            self.restarts += 1
            self._zygote = Zygote(self._memory_mib, self._output_bytes)
            self._refill()
        return self._zygote

    def _take(self, zygote: Zygote) -> Hand:
        while self._spares:
            hand = self._spares.popleft()
            if not hand.ended:
                return hand
            zygote.end(hand)
        return zygote.fork()

    def _retire(self, zygote: Zygote, hand: Hand) -> None:
        zygote.end(hand)
        self._refill()

    def _refill(self) -> None:
        zygote = self._zygote
        while zygote is not None and zygote.alive and len(self._spares) < self._count:
            self._spares.append(zygote.fork())


def _cpu_s(limit_s: float) -> int:
    """Returns the CPU time that goes with a wall clock: enough that the wall clock ends a busy loop."""
    return math.ceil(limit_s) + 1


def _signal_name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def _no_answer(kind: str, payload: Any) -> None:
    """Answers no question: there is nothing to ask about."""


@contextmanager
def _honest(what: str) -> Iterator[None]:
    """Turns what an honest hand does not send into the end of the call."""
    try:
        yield
    except MalformedMessage as error:
        raise HandDied(f"{what} broke the protocol of hands: {error}") from None
