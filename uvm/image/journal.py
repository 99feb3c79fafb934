"""The journal: one persistent row for each mission, committed before the mission is acknowledged.

Rows are all that is left of a failed mission. Their ids sort by time. Layer 1.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from types import NoneType
from typing import Any, ClassVar

from persistent import Persistent

from uvm.errors import MissionNotFound
from uvm.image.image import Txn
from uvm.image.shapes import Shape, a, names

_BREATH = 200  # rows between two looks at the memory
QUEUED, RUNNING, COMPLETE, FAILED, CANCELLED = "queued", "running", "complete", "failed", "cancelled"


class MissionRow(Persistent):
    """A mission as the journal keeps it; `record` says what each field is."""

    _shape: ClassVar[Shape] = {
        "mission_id": a(str),
        "target": a(str),
        "brief": names,
        "origin": a(str),
        "state": a(str),
        "created": a(float),
        "finished": a(float, NoneType),
        "starts": a(int),
        "outcome": names,
    }

    def __init__(self, mission_id: str, target: str, brief: dict[str, Any], origin: str) -> None:
        self.mission_id = mission_id
        self.target = target
        self.brief = brief
        self.origin = origin
        self.state = QUEUED
        self.created = time.time()
        self.finished: float | None = None
        self.starts = 0
        self.outcome: dict[str, Any] = {}

    def record(self) -> dict[str, Any]:
        """Returns the row as plain data: times in Unix seconds, `outcome` merged in."""
        return {
            "mission_id": self.mission_id,
            "target": self.target,
            "brief": self.brief,
            "origin": self.origin,
            "state": self.state,
            "created": self.created,
            "finished": self.finished,
            "starts": self.starts,
            **self.outcome,
        }


def new_id(last: str | None = None) -> str:
    """Returns a mission id, which sorts after `last` even if the clock was set back since."""
    now = time.time_ns()
    if last is not None:
        with suppress(ValueError):  # a foreign image may have ids of another form
            now = max(now, int(last.partition("-")[0], 16) + 1)
    return f"{now:016x}-{secrets.token_hex(3)}"


def add(txn: Txn, target: str, brief: dict[str, Any], origin: str) -> MissionRow:
    """Adds a queued mission: `target` is an oid, `brief` the plain form of a mission brief."""
    last = txn.missions.maxKey() if txn.missions else None
    row = MissionRow(new_id(last), target, brief, origin)
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


def start(txn: Txn, mission_id: str, *, again: bool = False) -> MissionRow:
    """Marks a mission as running and counts the start, but for one that this kernel had begun before."""
    row = get(txn, mission_id)
    row.state = RUNNING
    row.starts += not again
    return row


def finish(txn: Txn, mission_id: str, state: str, outcome: dict[str, Any]) -> None:
    """Closes a mission with its final state and what came of it."""
    row = get(txn, mission_id)
    row.state, row.outcome, row.finished = state, outcome, time.time()
    txn.root["open_missions"].discard(mission_id)


def newest(txn: Txn, state: str | None, limit: int) -> Iterator[MissionRow]:
    """Yields up to `limit` rows, the newest first, of one state or of any."""
    mission_id = txn.missions.maxKey() if txn.missions else None
    looked_at = 0
    while mission_id is not None and limit:
        looked_at += 1
        if looked_at % _BREATH == 0:
            txn.spare_memory()
        row = txn.missions[mission_id]
        if state is None or row.state == state:
            limit -= 1
            yield row
        mission_id = _before(txn.missions, mission_id)


def _before(rows: Any, mission_id: str) -> str | None:
    """Returns the greatest id below `mission_id`; a BTree can't be walked backwards otherwise."""
    just_below = mission_id[:-1] + chr(ord(mission_id[-1]) - 1) + "\x7f"
    try:
        return str(rows.maxKey(just_below))
    except ValueError:
        return None


def unfinished(txn: Txn) -> list[MissionRow]:
    """Returns the missions that a kernel left open, the oldest first."""
    return [txn.missions[mission_id] for mission_id in txn.root["open_missions"]]
