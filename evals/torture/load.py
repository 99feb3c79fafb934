"""The load of a torture run: clients over real connections, which write down all that is acknowledged.

A client does one thing after the other, as a script would. What is not answered in time is not sent again,
since it may have been carried out, and the books say so; but for what is missed, which must be learned once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from evals.torture import script
from evals.torture.books import Book, Slot, Taught
from uvm import errors
from uvm.client import Kernel

MESSAGE_S, CYCLE_S = 1.5, 6.0  # how long a client waits for an answer
PAUSE_S = 0.03  # at most, between two things that a client does
AGAIN = 0.7  # share of the missed messages that are sent again where they may be
SLOTS = 12  # that a client writes to in turn
# What a client must be ready for when processes die under its requests. All else is a fault.
EXPECTED = (
    *(errors.KernelUnreachable, errors.ShuttingDown, errors.Conflict, errors.QueueFull),
    *(errors.HandDied, errors.MissionFailed, errors.MissionCancelled),
)

Connect = Callable[[], Kernel]


class Client:
    """One client with a book, objects and methods of its own.

    Args:
        connect: makes a connection, not yet entered.
        rng: decides what it does next.
        stop: set when it is to end.
    """

    def __init__(self, book: Book, connect: Connect, rng: random.Random, stop: asyncio.Event) -> None:
        self.book = book
        self._connect = connect
        self._rng = rng
        self._stop = stop
        self._kernel: Kernel
        self._numbers = 0
        self._doubtful: set[str] = set()  # selectors whose last revision was not acknowledged
        self._deeds: dict[Callable[[], Awaitable[None]], int] = {
            self._increment: 32,
            self._dwell: 6,
            self._set_slot: 14,
            self._create_object: 8,
            self._read: 10,
            self._inspect: 4,
            self._teach: 8,
            self._teach_and_wait: 10,
            self._revise: 5,
            self._miss: 4,
            self._fail: 2,
            self._cancel: 2,
        }

    async def run(self) -> None:
        """Works until it is told to stop, over as many connections as that takes."""
        while not self._stop.is_set():
            try:
                async with self._connect() as self._kernel:
                    await self._work()
            except errors.BatosError as error:
                self._note("connect", error)

    async def _work(self) -> None:
        """Does one thing after the other; now and then it hangs up."""
        deeds, weights = [*self._deeds], [*self._deeds.values()]
        while not self._stop.is_set() and self._rng.random() > 0.01:
            (deed,) = self._rng.choices(deeds, weights)
            try:
                await deed()
                self.book.done[deed.__name__.strip("_")] += 1
            except errors.BatosError as error:
                self._note(deed.__name__.strip("_"), error)
            await asyncio.sleep(self._rng.uniform(0, PAUSE_S))

    def _note(self, deed: str, error: errors.BatosError) -> None:
        kind = type(error).__name__ if type(error) is not errors.BatosError else error.details.get("type")
        self.book.errors[str(kind)] += 1
        if not isinstance(error, EXPECTED):
            self.book.unexpected.append(f"{deed}: {kind}: {error}")

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _send(self, target: str, selector: str, *args: Any, on_missing: str = "error") -> Any:
        return await self._kernel.request(
            "send_message",
            target_oid=target,
            selector=selector,
            args=list(args),
            on_missing=on_missing,
            timeout_s=MESSAGE_S if on_missing == "error" else CYCLE_S,
        )

    # Messages and objects

    async def _increment(self, selector: str = "increment") -> None:
        number = self._next()
        self.book.entries.add(number)
        await self._send(self.book.ledger, selector, number)
        self.book.acknowledged.add(number)

    async def _dwell(self) -> None:
        await self._increment("dwell")

    async def _set_slot(self) -> None:
        value = self._next()
        usable = [name for name, slot in self.book.slots.items() if slot.doubtful is None]
        name = self._rng.choice(usable) if len(usable) >= SLOTS else f"slot_{value}"
        slot = self.book.slots.setdefault(name, Slot())
        slot.doubtful = value
        await self._kernel.request(
            "set_slot", target_oid=self.book.store, slot=name, value=value, timeout_s=MESSAGE_S
        )
        slot.acknowledged, slot.doubtful = value, None

    async def _create_object(self) -> None:
        mark = self._next()
        name = f"made_{self.book.name}_{mark}"
        self.book.objects[name] = mark
        self.book.made[name] = await self._kernel.request(
            "create_object", name=name, slots={"mark": mark}, timeout_s=MESSAGE_S
        )

    async def _read(self) -> None:
        acknowledged = set(self.book.acknowledged)
        entries = await self._send(self.book.ledger, "entries")
        if lost := acknowledged - set(entries):
            self.book.broken.append(f"a read of {self.book.ledger} does not show {sorted(lost)}")

    async def _inspect(self) -> None:
        known = dict(self.book.known)
        told = await self._kernel.request("inspect", target_oid=self.book.pupil, timeout_s=MESSAGE_S)
        if lost := [selector for _, selector in known if selector not in told["methods"]]:
            self.book.broken.append(f"inspecting {self.book.pupil} does not show {lost}")

    # Missions

    def _brief(self, selector: str, edition: int) -> dict[str, Any]:
        returns = script.answer(selector, script.SAMPLE, edition)
        return {
            "selector": selector,
            "parameters": ["x"],
            "description": f"edition {edition} of {selector}",
            "examples": [{"args": [script.SAMPLE], "returns": returns}],
        }

    async def _begin(self, selector: str, *, wait: bool, edition: int = 1) -> str:
        """Sends a mission and writes down what was acknowledged of it; returns its id."""
        brief = self._brief(selector, edition) | ({"type": "revision"} if edition > 1 else {})
        told = await self._kernel.request(
            "initiate_cognitive_cycle",
            target_oid=self.book.pupil,
            mission_brief=brief,
            wait=wait,
            timeout_s=CYCLE_S if wait else MESSAGE_S,
        )
        taught = Taught(self.book.pupil, selector, edition, complete=wait)
        self.book.missions[told["mission_id"]] = taught
        if wait:
            self.book.known[self.book.pupil, selector] = edition
        return str(told["mission_id"])

    def _fresh(self) -> str:
        (kind,) = self._rng.choices([*script.KINDS], [*script.KINDS.values()])
        return f"{kind}_{self._next()}"

    async def _teach(self) -> None:
        await self._begin(self._fresh(), wait=False)

    async def _teach_and_wait(self) -> None:
        selector = self._fresh()
        await self._begin(selector, wait=True)
        await self._ask(selector, 1)

    async def _revise(self) -> None:
        """Revises a method that nobody else revises: one whose last revision came to a known end."""
        known = {
            selector: edition
            for (_, selector), edition in self.book.known.items()
            if selector not in self._doubtful and edition < script.LAST
        }
        if known:
            selector = self._rng.choice([*known])
            self._doubtful.add(selector)
            await self._begin(selector, wait=True, edition=known[selector] + 1)
            self._doubtful.discard(selector)
            await self._ask(selector, known[selector] + 1)

    async def _miss(self) -> None:
        """Sends what nobody was taught; told to try later, it mostly does so at once."""
        selector = self._fresh()
        self.book.missed.add(selector)
        for again in (AGAIN, 0.0):
            try:
                got = await self._send(self.book.pupil, selector, script.SAMPLE, on_missing="create")
                break
            except errors.RetryLater as error:
                if self._rng.random() >= again:
                    raise
                self._note("miss", error)
        self.book.known[self.book.pupil, selector] = 1
        self._compare(selector, got, script.SAMPLE, 1)

    async def _fail(self) -> None:
        with suppress(errors.MissionFailed):
            await self._begin(f"{script.FAILS}_{self._next()}", wait=True)

    async def _cancel(self) -> None:
        """Begins a mission that never ends, and cancels it, again and again until that is acknowledged."""
        mission_id = await self._begin(f"{script.STALLS}_{self._next()}", wait=False)
        await asyncio.sleep(self._rng.uniform(0, 0.3))
        while not self._stop.is_set():
            try:
                told = await self._kernel.request(
                    "cancel_mission", mission_id=mission_id, timeout_s=MESSAGE_S
                )
            except errors.BatosError as error:
                self._note("cancel", error)
            else:
                self.book.missions[mission_id].cancelled = told["state"] == "cancelled"
                break

    async def _ask(self, selector: str, edition: int) -> None:
        self._compare(selector, await self._send(self.book.pupil, selector, 7), 7, edition)

    def _compare(self, selector: str, got: Any, argument: int, edition: int) -> None:
        if got != (wanted := script.answer(selector, argument, edition)):
            self.book.broken.append(f"{self.book.pupil} {selector} answered {got!r}, not {wanted!r}")


async def prepare(kernel: Kernel, books: list[Book]) -> None:
    """Makes the objects that the clients use, and teaches the ledger, before anything is killed."""
    await kernel.request("create_object", name=script.LEDGER, slots={"count": 0, "entries": []})
    for selector in ("increment", "dwell"):
        await kernel.teach(
            script.LEDGER,
            selector,
            ["number"],
            f"Enters a number ({selector}).",
            [{"args": [0], "returns": 1}],
        )
    for book in books:
        slots = {"count": 0, "entries": []}
        await kernel.request("create_object", name=book.ledger, parents=[script.LEDGER], slots=slots)
        await kernel.request("create_object", name=book.store)
        await kernel.request("create_object", name=book.pupil)
