"""The journal: one persistent row for each mission, committed before the mission is acknowledged.

Rows are all that is left of a failed mission. Their ids sort by time. Layer 1.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any, ClassVar

from persistent import Persistent

from uvm.errors import MissionFailed, MissionNotFound
from uvm.image import values
from uvm.image.shapes import Shape, a, names, tuple_of
from uvm.image.txn import Txn

QUEUED, RUNNING = "queued", "running"
COMPLETE, FAILED, CANCELLED, QUARANTINED = "complete", "failed", "cancelled", "quarantined"
OPEN = (QUEUED, RUNNING)
MAX_DEATHS = 2  # a mission during which so many kernels died is not tried again


class MissionRow(Persistent):
    """A mission as the journal keeps it; `record` says what each field is."""

    _shape: ClassVar[Shape] = {
        "mission_id": a(str),
        "target": a(str),
        "brief": names,
        "origin": a(str),
        "priority": a(int),
        "deadline": a(float, NoneType),
        "state": a(str),
        "created": a(float),
        "finished": a(float, NoneType),
        "starts": a(int),
        "deaths": tuple_of(int),
        "outcome": names,
    }
    priority: int = 0  # rows of older kernels have none of these three
    deadline: float | None = None
    deaths: tuple[int, ...] = ()  # the starts after which the kernel died

    def __init__(
        self,
        mission_id: str,
        target: str,
        brief: dict[str, Any],
        origin: str,
        priority: int,
        deadline_s: float | None,
    ) -> None:
        self.mission_id = mission_id
        self.target = target
        self.brief = brief
        self.origin = origin
        self.priority = priority
        self.state = QUEUED
        self.created = time.time()
        self.deadline = None if deadline_s is None else self.created + deadline_s
        self.finished: float | None = None
        self.starts = 0
        self.outcome: dict[str, Any] = {}

    def record(self) -> dict[str, Any]:
        """Returns the row as plain data: times in Unix seconds, `outcome` merged in.

        A completed mission's `transaction_id` is that of the row's last change, which is the commit that
        completed it; who changes a closed row puts it into `outcome`.
        """
        committed = self.state == COMPLETE and self._p_jar is not None and not self._p_changed
        return {
            "mission_id": self.mission_id,
            "target": self.target,
            "brief": values.to_plain(self.brief),
            "origin": self.origin,
            "priority": self.priority,
            "state": self.state,
            "created": self.created,
            "deadline": self.deadline,
            "finished": self.finished,
            "starts": self.starts,
            "deaths": len(self.deaths),
            **({"transaction_id": self._p_serial.hex()} if committed else {}),
            **self.outcome,
        }

    def time_left(self) -> float | None:
        """Returns the seconds until the deadline, or None; a clock that jumps gives no more than at first."""
        if self.deadline is None:
            return None
        return max(0.0, min(self.deadline - time.time(), self.deadline - self.created))


def new_id(newest: str = "") -> str:
    """Returns a mission id that sorts after `newest`, also where the clock was set back since."""
    try:
        after = int(newest[:16], 16)
    except ValueError:
        after = 0
    return f"{max(time.time_ns(), after + 1):016x}-{secrets.token_hex(3)}"


def add(
    txn: Txn,
    target: str,
    brief: dict[str, Any],
    origin: str,
    *,
    priority: int = 0,
    deadline_s: float | None = None,
) -> MissionRow:
    """Adds a queued mission: `target` is an oid, `brief` the plain form of a mission brief.

    Args:
        priority: a lower one is run sooner.
        deadline_s: seconds after which it fails, from now.

    Raises:
        ObjectNotFound: the brief refers to an object that is not there.
    """
    mission_id = new_id(txn.missions.maxKey() if txn.missions else "")
    row = MissionRow(mission_id, target, txn.storable(brief), origin, priority, deadline_s)
    txn.missions[row.mission_id] = row
    txn.root["open_missions"].add(row.mission_id)
    return row


def get(txn: Txn, mission_id: str) -> MissionRow:
    """Returns the row of a mission.

    Raises:
        MissionNotFound: the journal has none of this id.
    """
    row = txn.missions.get(mission_id)
    if row is None:
        raise MissionNotFound(f"no mission {mission_id}", mission_id=mission_id)
    return row  # type: ignore[no-any-return]


def start(txn: Txn, mission_id: str, *, mine: bool = False) -> MissionRow:
    """Marks a mission as running and counts the start.

    Args:
        mine: where it is marked so already, it was by this kernel; else an earlier one died while it ran.

    Raises:
        MissionFailed: it is over already; what is complete is never run again.
    """
    row = get(txn, mission_id)
    if row.state not in OPEN:
        raise MissionFailed(f"mission {mission_id} is over already: {row.state}", mission_id=mission_id)
    if row.state == RUNNING and not mine:
        row.deaths = (*row.deaths, row.starts)
    row.state = RUNNING
    row.starts += 1
    return row


def finish(txn: Txn, mission_id: str, state: str, outcome: dict[str, Any]) -> bool:
    """Closes a mission with its final state and what came of it; returns False where it is over already.

    Only a quarantined mission can still be cancelled; its outcome, which says why it was, stays.
    """
    row = get(txn, mission_id)
    if row.state == QUARANTINED and state == CANCELLED:
        outcome = row.outcome
    elif row.state not in OPEN:
        return False
    row.state, row.outcome, row.finished = state, outcome, time.time()
    txn.root["open_missions"].discard(mission_id)
    return True


def interrupt(txn: Txn, mission_ids: Iterable[str]) -> None:
    """Puts missions that ran back into the queue: their kernel stops in good order, which is no death."""
    for mission_id in mission_ids:
        row = get(txn, mission_id)
        if row.state == RUNNING:
            row.state = QUEUED


def take_up(txn: Txn) -> list[MissionRow]:
    """Returns the missions that an earlier kernel left open, those to run first first.

    One that is still marked as running ran when its kernel died. When that has happened `MAX_DEATHS` times,
    it is quarantined instead.
    """
    found = unfinished(txn)
    for row in found:
        if row.state == RUNNING:
            row.state, row.deaths = QUEUED, (*row.deaths, row.starts)
        if len(row.deaths) >= MAX_DEATHS:
            finish(txn, row.mission_id, QUARANTINED, _quarantine(row))
    return sorted((row for row in found if row.state in OPEN), key=lambda row: (row.priority, row.mission_id))


def _quarantine(row: MissionRow) -> dict[str, Any]:
    cycles = [f"{row.mission_id}.{start}" for start in row.deaths]
    told = (
        f"mission {row.mission_id} is in quarantine: the kernel died {len(cycles)} times while it ran. Its "
        f"log is in metacognition.jsonl under the cycles {', '.join(cycles)}; cancel the mission, or send "
        "its brief again to try once more"
    )
    return {"error": {"type": "MissionFailed", "message": told, "details": {"cycles": cycles}}}


def backwards(txn: Txn) -> Iterator[MissionRow]:
    """Yields all rows, the newest first."""
    mission_id = txn.missions.maxKey() if txn.missions else None
    while mission_id is not None:
        yield txn.missions[mission_id]
        mission_id = _before(txn.missions, mission_id)


def _before(rows: Any, mission_id: str) -> str | None:
    """Returns the greatest id below `mission_id`; a BTree can't be walked backwards otherwise.

    No id lies between the bound and `mission_id`: the only texts there begin with the bound, and no id has
    the last of all characters.
    """
    if not mission_id:
        return None
    last = ord(mission_id[-1])
    just_below = mission_id[:-1] + (chr(last - 1) + chr(sys.maxunicode) if last else "")
    try:
        return str(rows.maxKey(just_below))
    except ValueError:
        return None


def unfinished(txn: Txn) -> list[MissionRow]:
    """Returns the open missions, the oldest first."""
    return [txn.missions[mission_id] for mission_id in txn.root["open_missions"]]
