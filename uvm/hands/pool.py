"""The hands of the kernel: locked-down workers kept ready, one for each call, killed when over their limits.

Kernel's side. A call waits for its turn, takes a worker that is ready, talks with it, and has it replaced.
The stock (`uvm.hands.stock`) has the workers made.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
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
    SandboxTooWeak,
    ShuttingDown,
)
from uvm.guardian import Audit
from uvm.hands.answers import audited, checked, compiled, missed, raised, returned, unstorable
from uvm.hands.bytecode import Bytecode, Method
from uvm.hands.calls import Call, Host, Outcome
from uvm.hands.conversation import Conversation
from uvm.hands.frames import pack
from uvm.hands.sandbox import Limits, tier
from uvm.hands.seccomp import compile_filter
from uvm.hands.stock import Stock
from uvm.hands.zygote import Hand, HandGone, Zygote
from uvm.pressure import out_of_memory

_EXAMINATIONS = 3  # of the sandbox at the start, before it counts as impossible
_READY_S = 30.0  # a worker that takes longer to lock itself down is given up

# A frame's kind and payload -> the reply, at once or later; None for a last frame.
Answer = Callable[[str, Any], bytes | Awaitable[bytes] | None]


class HandPool:
    """Runs generated code in processes of its own.

    Args:
        count: calls at once, and workers kept ready beside them.
        timeout_s: wall clock of one call, where the call does not say; CPU time is limited a little above.
        memory_mib: address space of a worker beyond what it starts with, MiB.
        output_bytes: longest frame that a hand may send.
        waiting: calls that may wait for their turn.
        allow_weak: whether generated code may run where the sandbox is no more than tier C.
        without: layers of the sandbox to leave out; for measurements of what each one stops.

    Attributes:
        layers: layer of the sandbox -> whether it held when it was tried out at the start.
        tier: what the layers are worth, A to C; see `uvm.hands.sandbox.tier`.
        kills: hands ended before they had answered.
    """

    def __init__(
        self,
        *,
        count: int,
        timeout_s: float,
        memory_mib: int,
        output_bytes: int = 8 << 20,
        waiting: int = 1000,
        allow_weak: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        self.layers: dict[str, bool] = {}
        self.tier = tier({})
        self.kills = 0
        self._timeout_s = timeout_s
        limits = Limits(memory_mib, _cpu_s(timeout_s), without=tuple(without))
        self._stock = Stock(count, limits, output_bytes)
        self._most_waiting = waiting
        self._allow_weak = allow_weak
        self._waiting = 0
        self._turns = asyncio.Semaphore(count)
        self._bytecode = Bytecode()
        self._compiling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the zygote and tries the sandbox out.

        Must be called from the thread that lives as long as the kernel, before any secret is loaded.

        Raises:
            HomeError: no hand can be made here.
        """
        if not hasattr(os, "fork"):
            raise HomeError("hands are forked processes, and this platform has no os.fork")
        self._stock.limits = replace(self._stock.limits, filter=compile_filter() or b"")
        try:
            self.layers = await self._examine_patiently()
        except MethodError as error:
            await self.close()
            raise HomeError(f"no hand can be made here: {error}") from error
        self.tier = tier(self.layers)
        held = tuple(name for name, holds in self.layers.items() if holds)
        # A later zygote has them all, or none works.
        self._stock.limits = replace(self._stock.limits, required=held)

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the process that makes the hands; None where there is none."""
        return None if self._stock.zygote is None else self._stock.zygote.pid

    @property
    def restarts(self) -> int:
        """Zygotes started after the first."""
        return self._stock.restarts

    @property
    def spares(self) -> int:
        """Workers that wait when all is quiet."""
        return self._stock.most

    def require_walls(self) -> None:
        """Makes sure that generated code may run here.

        Raises:
            SandboxTooWeak: there is no sandbox, and the Architect has not allowed to go without.
        """
        if self._stock.zygote is not None and self.tier == "C" and not self._allow_weak:
            raise SandboxTooWeak(
                "generated code is not run: without seccomp, missing here, a hostile method could read "
                "your files; BATOS_ALLOW_WEAK_SANDBOX=true runs it all the same",
                tier=self.tier,
            )

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
            ResourceExhausted: no worker can be made for it now.
            SandboxTooWeak: nothing generated runs here.
        """
        self.require_walls()
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        talk = Conversation(call, host, self._bytecode, overlay)
        endings: dict[str, Callable[[Any], BatosError]] = {
            "raised": lambda payload: raised(payload, talk.shown),
            "unstorable": unstorable,
            "missed": lambda payload: missed(payload, talk.shown),
        }
        async with self._turn():
            job = talk.job()
            kind, payload, seconds = await self._serve(call.selector, job, talk.answer, limit_s)
            self._compile_wanted()
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
        }
        audit = pack("audit", job)
        async with self._turn():
            try:
                kind, payload, _ = await self._serve("the audit", audit, _no_answer, self._timeout_s)
            except (
                HandDied
            ):  # reading changes nothing, so a mission need not fail because its hand was killed
                kind, payload, _ = await self._serve("the audit", audit, _no_answer, self._timeout_s)
        with _honest("the audit"):
            self._expect("audited", kind, "the audit")
            return audited(payload)

    async def close(self) -> None:
        """Ends every process; calls that are running end as ShuttingDown."""
        await self._stock.close()

    async def _examine_patiently(self) -> dict[str, bool]:
        """Examines again where the zygote or the worker was killed: that says nothing about walls."""
        zygote = self._stock.start()
        for _ in range(_EXAMINATIONS - 1):
            with suppress(HandDied):
                return await self._examine(zygote)
            zygote.look()
            zygote = self._stock.living()
        return await self._examine(zygote)

    async def _examine(self, zygote: Zygote) -> dict[str, bool]:
        """Returns which layers hold in a worker made to try them out."""
        examiner = zygote.examiner()
        try:
            async with asyncio.timeout(_READY_S):
                with _honest("the sandbox's check"):
                    kind, payload = await examiner.frame()
                    if kind == "refused":
                        raise HandDied(f"a worker could not be locked down: {payload}")
                    self._expect("checked", kind, "the sandbox's check")
                    return checked(payload)
        except (TimeoutError, HandGone):
            raise HandDied("the sandbox's check ended without a word") from None
        finally:
            zygote.end([examiner])

    def _compile_wanted(self) -> None:
        """Has the methods that calls met compiled in a hand of their own, beside the calls."""
        if self._compiling is None or self._compiling.done():
            wanted = self._bytecode.wanted()
            if wanted:
                self._compiling = asyncio.create_task(self._compile(wanted))

    async def _compile(self, wanted: list[Method]) -> None:
        job = pack("compile", [list(method) for method in wanted])
        codes: list[bytes | None] = [None] * len(wanted)
        with suppress(BatosError):  # what can't be compiled beforehand is compiled in each call
            kind, payload, _ = await self._serve("the compiler", job, _no_answer, self._timeout_s)
            with _honest("the compiler"):
                self._expect("compiled", kind, "the compiler")
                codes = compiled(payload, len(wanted))
        for method, code in zip(wanted, codes, strict=True):
            self._bytecode.keep(method, code)

    def _expect(self, expected: str, kind: str, what: str) -> None:
        if kind == "exhausted":
            memory_mib = self._stock.limits.memory_mib
            raise HandOutOfMemory(f"{what} needed more than {memory_mib} MiB", memory_mib=memory_mib)
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
        for _ in range(self._stock.most + 1):  # if all spares have died, a new worker serves
            zygote = self._stock.living()
            hand = self._stock.take(zygote)
            try:
                return await self._converse(zygote, hand, what, job, answer, limit_s)
            except HandGone as gone:
                if not gone.unread:
                    raise self._obituary(what, limit_s, await zygote.bury(hand)) from None
                zygote.look()  # if it died, its workers died with it
            except BaseException:
                self.kills += 1
                zygote.end([hand])
                raise
            finally:
                self._stock.retire(zygote, hand)
        raise HandDied(f"{what}: no worker lived long enough to begin")

    async def _converse(
        self, zygote: Zygote, hand: Hand, what: str, job: bytes, answer: Answer, limit_s: float
    ) -> tuple[str, Any, float]:
        await self._begin(zygote, hand)
        began = time.perf_counter()
        try:
            async with asyncio.timeout(limit_s) as clock:
                await hand.send(job)
                while True:
                    with _honest(what):
                        kind, payload = await hand.frame()
                        reply = answer(kind, payload)
                    if reply is None:
                        break
                    await hand.send(reply if isinstance(reply, bytes) else await _off_the_clock(clock, reply))
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
        if kind == "starved":
            raise out_of_memory()
        if kind != "ready":
            raise HandDied(f"a worker could not be locked down: {payload}")

    def _obituary(self, what: str, limit_s: float, end: tuple[int, float] | None) -> BatosError:
        """Returns the error for a hand that ended with this exit status and these seconds of CPU time."""
        if end is None:
            if self._stock.zygote is None:
                return ShuttingDown(f"{what} was cut short: the hands are closing")
            return HandDied(f"{what} was cut short: the process that makes the hands died")
        status, cpu_s = end
        most_s = self._stock.limits.cpu_s
        if status == -signal.SIGXCPU or (status == -signal.SIGKILL and cpu_s >= most_s):
            return HandTimeout(f"{what} used more than {most_s} s of CPU time", timeout_s=limit_s)
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"left with status {status}"
        return HandDied(f"{what} {how} before it had answered", status=status)


async def _off_the_clock(clock: asyncio.Timeout, reply: Awaitable[bytes]) -> bytes:
    """Awaits a reply for which the hand has to wait; the time does not count against the call."""
    left = (clock.when() or 0.0) - asyncio.get_running_loop().time()
    clock.reschedule(None)
    try:
        return await reply
    finally:
        clock.reschedule(asyncio.get_running_loop().time() + left)


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
