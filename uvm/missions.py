"""Missions under way: from the journal to the state machine and back. Layer 3.

A mission is in the journal before anybody hears that it was accepted, and goes on when the one who asked goes
away. Shutting down interrupts missions; their rows stay open, and the next start takes them up again. Each
mission has two tasks: its work, which can be cancelled at any point, and the keeper of its row, which never
is, and closes the row however the work ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from uvm.cycle import cannot_go_on
from uvm.errors import (
    DoesNotUnderstand,
    MissionCancelled,
    MissionError,
    MissionExpired,
    ResourceExhausted,
    RetryLater,
    ShuttingDown,
    to_wire,
)
from uvm.image import journal
from uvm.image.image import LivingImage, to_its_end
from uvm.image.txn import Txn
from uvm.lanes import Lane
from uvm.messages import MissionBrief
from uvm.outcomes import MISS, brief_of, interrupted, key_of, settled, told
from uvm.psm import PrototypalStateMachine

PRIORITIES = {"architect": 0, MISS: 0, "autotelic": 10}  # by origin; the lowest is run first
IDLE_SHARE = 0.5  # the part of the queue that missions of a later priority may fill
BREATH = 200  # rows of the journal that are read in one go
CLOSING_S = 8.0  # how long closing waits for the last commits of what it interrupts
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0  # pauses of a mission that can't go on now

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of an open mission before it runs.

    Attributes:
        until: the event loop's time at which its deadline passes; a clock that is set changes nothing.
        suspect: a kernel died while it ran.
        pause_s: since it could not go on the last time; 0 where it never was so.
    """

    mission_id: str
    priority: int
    until: float | None
    suspect: bool = False
    pause_s: float = 0.0


@dataclass(eq=False, slots=True)
class _UnderWay:
    """A mission under way.

    Attributes:
        work: the cycle, with the wait for a place before it.
        outcome: what the work comes to, once the row says so too.
        ending: why the work was ended early; None where it was not, or the kernel stops.
    """

    plan: _Plan
    work: asyncio.Task[Result]
    outcome: asyncio.Task[Result] = field(init=False)
    ending: MissionError | None = None
    timer: asyncio.TimerHandle | None = None

    def end(self, error: MissionError) -> None:
        """Ends the work for this reason, unless there is one already."""
        self.ending = self.ending or error
        self.work.cancel(str(error))


class Missions:
    """All missions of one kernel.

    Args:
        lane: how many cycles run at once and how many may wait.
        report: told of faults of the kernel's own.

    Attributes:
        quarantined: how many missions this kernel put into quarantine at its start.
    """

    def __init__(
        self,
        image: LivingImage,
        psm: PrototypalStateMachine,
        lane: Lane,
        report: Callable[[BaseException], None],
    ) -> None:
        self._image = image
        self._psm = psm
        self._lane = lane
        self._report = report
        self._under_way: dict[str, _UnderWay] = {}
        self._learning: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._begun: set[str] = set()  # whose rows say that they run
        self._coming: set[str] = set()  # not yet in the lane
        self._acknowledging = 0
        self._suspects = asyncio.Lock()  # run one at a time, so that the innocent is cleared,
        self._innocent: set[asyncio.Task[Result]] = set()  # and when these have ended, or pause
        self._closing = False
        self.quarantined = 0

    async def begin(
        self, target: str, brief: MissionBrief, origin: str, deadline_s: float | None = None
    ) -> str:
        """Commits a mission to the journal, then starts it; returns its id.

        Raises:
            QueueFull: too many wait already; nothing was written.
        """
        priority = PRIORITIES.get(origin, 0)
        self._lane.admit(IDLE_SHARE if priority else 1.0, self._acknowledging + len(self._coming))
        until = self._until(deadline_s)

        def add(txn: Txn) -> str:
            told = brief.plain()
            return journal.add(txn, target, told, origin, priority=priority, deadline_s=deadline_s).mission_id

        self._acknowledging += 1
        try:
            mission_id = await self._image.attempt(f"mission {brief.selector} acknowledged", add, user=origin)
        finally:
            self._acknowledging -= 1
        self._pursue(_Plan(mission_id, priority, until))
        return mission_id

    async def outcome(self, mission_id: str) -> Result:
        """Waits for a mission under way and returns `{mission_id, state, method | result, attempts, …}`.

        Raises:
            MissionFailed: it ended in FAILED.
            MissionCancelled: somebody cancelled it.
            MissionExpired: its deadline has passed.
            ShuttingDown: the kernel stops; the next one goes on with it.
        """
        if mission_id in self._under_way:
            return await asyncio.shield(self._under_way[mission_id].outcome)
        record = await self.record(mission_id)
        if self._closing and record["state"] in journal.OPEN:
            raise interrupted(mission_id)
        return settled(record)

    async def learn(self, miss: DoesNotUnderstand) -> None:
        """Turns a miss into a mission and waits for it; the same miss of several callers is one mission."""
        key = (miss.target, miss.selector)
        if key not in self._learning:
            self._share(key, self._learned(miss))
        await asyncio.shield(self._learning[key])

    async def cancel(self, mission_id: str) -> dict[str, Any]:
        """Cancels a mission unless it is over, under way or not, and returns its record.

        Raises:
            MissionNotFound: there is none of this id.
        """
        mission = self._under_way.get(mission_id)
        if mission is None:
            await self._finish(mission_id, journal.CANCELLED, {})
        else:
            mission.end(MissionCancelled(f"mission {mission_id} was cancelled", mission_id=mission_id))
            await asyncio.wait([mission.outcome])
            error = mission.outcome.exception()
            if error is not None and not isinstance(error, (MissionError, ShuttingDown)):
                raise error  # the row could not be closed
        return await self.record(mission_id)

    async def record(self, mission_id: str) -> dict[str, Any]:
        """Returns the record of a mission.

        Raises:
            MissionNotFound: there is none of this id.
        """
        async with self._image.reading() as txn:
            return journal.get(txn, mission_id).record()

    async def newest(self, state: str | None, limit: int) -> list[dict[str, Any]]:
        """Returns the records of the newest missions, of one state or of any."""
        found: list[dict[str, Any]] = []
        async with self._image.reading() as txn:
            is_open = state in journal.OPEN  # these are listed apart; the journal may be long
            rows = reversed(journal.unfinished(txn)) if is_open else journal.backwards(txn)
            for number, row in enumerate(rows, 1):
                if state is None or row.state == state:
                    found.append(row.record())
                if len(found) == limit:
                    break
                if number % BREATH == 0:
                    txn.trim_cache()
                    await asyncio.sleep(0)
        return found

    async def open(self) -> int:
        """Returns how many missions are open in the journal: in safe mode, those of old too."""
        async with self._image.reading() as txn:
            return len(txn.root["open_missions"])

    async def resume(self) -> int:
        """Takes up the missions that an earlier kernel left open; returns how many.

        Those during which it died come last and one at a time; the second death means quarantine.
        """

        def take_up(txn: Txn) -> tuple[list[tuple[_Plan, tuple[str, str] | None]], int]:
            open_before = len(txn.root["open_missions"])
            taken = [(self._plan(row), key_of(row)) for row in journal.take_up(txn)]
            return taken, open_before - len(taken)

        taken, self.quarantined = await self._image.attempt("missions taken up", take_up)
        for plan, key in taken:
            self._pursue(plan)
            if not (plan.suspect or self._closing):
                outcome = self._under_way[plan.mission_id].outcome
                self._innocent.add(outcome)
                outcome.add_done_callback(self._innocent.discard)
            if key is not None and key not in self._learning:  # who misses it again waits for it
                self._share(key, self._awaited(plan.mission_id))
        return len(taken)

    async def close(self) -> None:
        """Interrupts what is under way; the journal keeps it, and that its kernel did not die."""
        self._closing = True
        for mission in self._under_way.values():
            mission.work.cancel("the kernel shuts down")
        waiting = {*(mission.outcome for mission in self._under_way.values()), *self._learning.values()}
        if waiting:
            await asyncio.wait(waiting, timeout=CLOSING_S)
        if self._begun:
            await asyncio.wait({asyncio.create_task(self._interrupt())}, timeout=CLOSING_S)

    async def _interrupt(self) -> None:
        begun = list(self._begun)
        try:
            await self._image.attempt("missions interrupted", lambda txn: journal.interrupt(txn, begun))
        except Exception as error:  # they count as missions during which the kernel died
            self._report(error)

    # Tasks

    def _pursue(self, plan: _Plan) -> None:
        if self._closing or plan.mission_id in self._under_way:
            return  # it is in the journal; or who missed the same did not wait for the end of its pause
        mission = _UnderWay(plan, asyncio.create_task(self._work(plan)))
        self._coming.add(plan.mission_id)
        mission.outcome = asyncio.create_task(self._keep(mission))
        mission.outcome.add_done_callback(lambda outcome: self._ended(plan, outcome))
        self._under_way[plan.mission_id] = mission
        self._set_timer(mission)

    def _ended(self, plan: _Plan, outcome: asyncio.Task[Result]) -> None:
        mission = self._under_way.pop(plan.mission_id)
        if mission.timer is not None:
            mission.timer.cancel()
        self._coming.discard(plan.mission_id)
        error = None if outcome.cancelled() else outcome.exception()  # asking marks it as seen
        if error is None or isinstance(error, (MissionError, ShuttingDown)):
            return
        if not isinstance(error, RetryLater) or isinstance(error, ResourceExhausted):
            self._report(error)
        if isinstance(error, (RetryLater, OSError)):
            pause_s = min(max(2 * plan.pause_s, RETRY_S), LONGEST_RETRY_S)
            again = asyncio.get_running_loop().call_later
            again(self._before_deadline(plan, pause_s), self._pursue, replace(plan, pause_s=pause_s))

    async def _keep(self, mission: _UnderWay) -> Result:
        """Waits for the work of a mission and sees to it that its row says how it ended."""
        mission_id = mission.plan.mission_id
        await asyncio.wait({mission.work})
        error = _error_of(mission.work)
        if error is None or isinstance(error, MissionError):
            self._begun.discard(mission_id)
            return mission.work.result()
        if mission.ending is not None:
            return await self._close_row(mission_id, mission.ending)
        if self._closing:
            raise interrupted(mission_id)
        if (pressed := cannot_go_on(error)) is not None:
            await self._pause(mission_id)
            pressed.details["mission_id"] = mission_id
            raise pressed from error
        raise error

    async def _pause(self, mission_id: str) -> None:
        """Puts a mission back into the queue, if there is room to: no kernel dies of one that only waits."""
        if mission_id not in self._begun:
            return
        with contextlib.suppress(RetryLater, OSError):
            await to_its_end(
                self._image.attempt(
                    f"mission {mission_id} pauses", lambda txn: journal.interrupt(txn, [mission_id])
                )
            )
            self._begun.discard(mission_id)  # else closing tries it once more

    async def _work(self, plan: _Plan) -> Result:
        alone = self._suspects if plan.suspect else contextlib.nullcontext()
        async with alone:
            if plan.suspect and self._innocent:
                await asyncio.wait(self._innocent)
            self._coming.discard(plan.mission_id)
            async with self._lane.place(plan.priority):
                mine = plan.mission_id in self._begun
                self._begun.add(plan.mission_id)
                row = await self._image.attempt(
                    f"mission {plan.mission_id} started",
                    lambda txn: journal.start(txn, plan.mission_id, mine=mine).record(),
                )
                return told(await self._psm.run(row))

    async def _close_row(self, mission_id: str, error: MissionError) -> Result:
        expired = isinstance(error, MissionExpired)
        state, why = (journal.FAILED, {"error": to_wire(error)}) if expired else (journal.CANCELLED, {})
        closed = await to_its_end(self._finish(mission_id, state, why))
        self._begun.discard(mission_id)
        if closed:
            raise error
        return settled(await self.record(mission_id))  # it had ended by itself just before

    async def _finish(self, mission_id: str, state: str, why: dict[str, Any]) -> bool:
        return await self._image.attempt(
            f"mission {mission_id} {state}", lambda txn: journal.finish(txn, mission_id, state, why)
        )

    # Deadlines

    def _plan(self, row: journal.MissionRow) -> _Plan:
        until = self._until(row.time_left())
        return _Plan(row.mission_id, row.priority, until, bool(row.deaths))

    @staticmethod
    def _until(deadline_s: float | None) -> float | None:
        return None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s

    @staticmethod
    def _before_deadline(plan: _Plan, pause_s: float) -> float:
        """Returns the pause, cut short where the deadline passes within it."""
        left = pause_s if plan.until is None else plan.until - asyncio.get_running_loop().time()
        return min(pause_s, left) if left > 0 else pause_s

    def _set_timer(self, mission: _UnderWay) -> None:
        """Ends the mission when its deadline passes; at once where it has passed."""
        mission_id, until = mission.plan.mission_id, mission.plan.until
        if until is None:
            return
        loop = asyncio.get_running_loop()
        error = MissionExpired(f"the deadline of mission {mission_id} has passed", mission_id=mission_id)
        if until <= loop.time():
            mission.end(error)
        else:
            mission.timer = loop.call_at(until, mission.end, error)

    # Misses

    def _share(self, key: tuple[str, str], learned: Coroutine[Any, Any, None]) -> None:
        """Lets all who miss the same selector wait for one mission."""
        task: asyncio.Task[None] = asyncio.create_task(learned)
        self._learning[key] = task

        def forget(done: asyncio.Task[None]) -> None:
            del self._learning[key]
            if not done.cancelled():
                done.exception()  # seen, also where all who waited have gone

        task.add_done_callback(forget)

    async def _learned(self, miss: DoesNotUnderstand) -> None:
        """Waits for the mission of a miss: one that is open already, under way or not, or a new one."""
        with self._image.view() as txn:
            if txn.find(miss.target).lookup(miss.selector) is not None:
                return  # learned since
            key = (miss.target, miss.selector)
            plan = next((self._plan(row) for row in journal.unfinished(txn) if key_of(row) == key), None)
        if plan is None:
            mission_id = await self.begin(miss.target, brief_of(miss), MISS)
        else:
            mission_id = plan.mission_id
            self._pursue(plan)
        await self.outcome(mission_id)

    async def _awaited(self, mission_id: str) -> None:
        await self.outcome(mission_id)


def _error_of(work: asyncio.Task[Result]) -> BaseException | None:
    return asyncio.CancelledError() if work.cancelled() else work.exception()
