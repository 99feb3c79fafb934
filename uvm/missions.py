"""Missions under way: from the journal to the state machine and back, one task each. Layer 3.

A mission is in the journal before anybody hears that it was accepted, and goes on when the one who asked goes
away. Shutting down interrupts missions; their rows stay open, and the next start takes them up again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvm.cycle import Cycle
from uvm.errors import DoesNotUnderstand, MissionCancelled, MissionFailed, ResourceExhausted
from uvm.image import journal
from uvm.image.image import LivingImage, Txn
from uvm.lanes import Lane
from uvm.messages import MissionBrief
from uvm.pressure import typed
from uvm.psm import PrototypalStateMachine

RETRY_S, LONGEST_RETRY_S = 1.0, 60.0  # pauses of a mission for which disk or memory did not suffice
MAX_STARTS = 3  # a kernel that died so often in the middle of a mission does not try it again


class Missions:
    """All missions of one kernel.

    Args:
        lane: how many cycles run at once and how many may wait.
        report: told of faults of the kernel's own.
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
        self._tasks: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._cancelled: set[str] = set()
        self._begun: set[str] = set()  # by this kernel; to go on after a pause is no further start
        self._closing = False
        self._learning: dict[tuple[str, str], asyncio.Future[str]] = {}

    async def begin(self, target: str, brief: MissionBrief, origin: str) -> str:
        """Commits a mission to the journal, then starts it; returns its id.

        Raises:
            QueueFull: too many wait already; nothing was written.
        """
        self._lane.admit()

        def add(txn: Txn) -> str:
            return journal.add(txn, target, brief.model_dump(exclude_unset=True), origin).mission_id

        mission_id = await self._image.attempt(f"mission {brief.selector} acknowledged", add, user=origin)
        self._pursue(mission_id)
        return mission_id

    async def outcome(self, mission_id: str) -> dict[str, Any]:
        """Waits for a mission under way and returns `{mission_id, state, method | result, attempts, …}`.

        Raises:
            MissionFailed: it ended in FAILED.
            MissionCancelled: somebody cancelled it.
            ResourceExhausted: it can't go on now; it stays in the journal and goes on by itself.
        """
        return await asyncio.shield(self._tasks[mission_id])

    async def learn(self, miss: DoesNotUnderstand) -> None:
        """Turns a miss into a mission and waits for it; the same miss of several callers is one mission."""
        key = (miss.target, miss.selector)
        if key not in self._learning:
            begun = asyncio.ensure_future(self.begin(miss.target, _brief_of(miss), "doesNotUnderstand"))
            self._learning[key] = begun
        try:
            await self.outcome(await asyncio.shield(self._learning[key]))
        finally:
            self._learning.pop(key, None)

    async def cancel(self, mission_id: str) -> dict[str, Any]:
        """Cancels a mission, if it is under way, and returns its record."""
        task = self._tasks.get(mission_id)
        if task is not None:
            self._cancelled.add(mission_id)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and isinstance(error := task.exception(), ResourceExhausted):
                raise error  # the journal could not take it in
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
        async with self._image.reading() as txn:
            return [row.record() for row in journal.newest(txn, state, limit)]

    async def resume(self) -> int:
        """Takes up the missions that an earlier kernel left open; returns how many."""
        async with self._image.reading() as txn:
            left_open = [row.mission_id for row in journal.unfinished(txn)]
        for mission_id in left_open:
            self._pursue(mission_id)
        return len(left_open)

    async def close(self) -> None:
        """Interrupts what is under way; the journal keeps it."""
        self._closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pursue(self, mission_id: str, pause_s: float = 0.0) -> None:
        task = asyncio.create_task(self._run(mission_id, pause_s))
        self._tasks[mission_id] = task
        task.add_done_callback(lambda done: self._ended(mission_id, pause_s, done))

    def _ended(self, mission_id: str, pause_s: float, task: asyncio.Task[dict[str, Any]]) -> None:
        del self._tasks[mission_id]
        error = None if task.cancelled() else task.exception()  # asking marks it as seen
        if isinstance(error, ResourceExhausted):  # its row is open: it goes on when there is room again
            if not self._closing:
                self._pursue(mission_id, min(max(2 * pause_s, RETRY_S), LONGEST_RETRY_S))
            return
        self._begun.discard(mission_id)
        if error is not None and not isinstance(error, (MissionFailed, MissionCancelled)):
            self._report(error)

    async def _run(self, mission_id: str, pause_s: float) -> dict[str, Any]:
        try:
            with typed():
                await asyncio.sleep(pause_s)
                async with self._lane.place():
                    row = await self._image.attempt(
                        f"mission {mission_id} started", lambda txn: self._start(txn, mission_id)
                    )
                    self._begun.add(mission_id)
                    if row["starts"] > MAX_STARTS:
                        raise await self._give_up(mission_id)
                    return _told(await self._psm.run(row))
        except ResourceExhausted as error:
            error.details["mission_id"] = mission_id
            raise
        except asyncio.CancelledError:
            if mission_id not in self._cancelled:
                raise
            self._cancelled.discard(mission_id)
            with typed():
                await self._finish(mission_id, journal.CANCELLED, {})
            raise MissionCancelled(f"mission {mission_id} was cancelled", mission_id=mission_id) from None

    def _start(self, txn: Txn, mission_id: str) -> dict[str, Any]:
        return journal.start(txn, mission_id, again=mission_id in self._begun).record()

    async def _give_up(self, mission_id: str) -> MissionFailed:
        reason = f"mission {mission_id} was given up: the kernel died {MAX_STARTS} times while it ran"
        await self._finish(
            mission_id, journal.FAILED, {"error": {"type": "MissionFailed", "message": reason}}
        )
        return MissionFailed(reason, mission_id=mission_id)

    async def _finish(self, mission_id: str, state: str, outcome: dict[str, Any]) -> None:
        await self._image.attempt(
            f"mission {mission_id} {state}", lambda txn: journal.finish(txn, mission_id, state, outcome)
        )


def _brief_of(miss: DoesNotUnderstand) -> MissionBrief:
    """Returns the brief of a miss: the call as it was made, as far as the caller's arguments are known."""
    return MissionBrief(
        selector=miss.selector,
        args=list(miss.details.get("args") or []),
        kwargs=dict(miss.details.get("kwargs") or {}),
        parameters=miss.details.get("parameters"),
    )


def _told(cycle: Cycle) -> dict[str, Any]:
    """Returns a completed cycle as its reply tells it."""
    result = {"mission_id": cycle.mission_id, "state": str(cycle.state), **cycle.outcome()}
    if cycle.brief.type == "task":
        return {**result, "result": cycle.reply.text if cycle.reply else ""}
    method = {
        "selector": cycle.brief.selector,
        "parameters": list(cycle.parameters),
        "source": cycle.source,
        "doc": cycle.doc,
        "transaction_id": cycle.transaction_id,
    }
    return {**result, "method": method}
