"""What becomes of missions: how briefs are made of misses, and how a mission's end is told. Layer 3."""

from __future__ import annotations

from typing import Any

from uvm.cycle import Cycle
from uvm.errors import (
    DoesNotUnderstand,
    MissionCancelled,
    MissionExpired,
    MissionFailed,
    RetryLater,
    ShuttingDown,
)
from uvm.image import journal
from uvm.messages import MissionBrief
from uvm.states import State

MISS = "doesNotUnderstand"  # the origin of missions that a miss began


def interrupted(mission_id: str) -> ShuttingDown:
    """Returns what those who wait for a mission are told when the kernel stops."""
    return ShuttingDown(
        f"the kernel shuts down; mission {mission_id} is in the journal, and the next start goes on with it",
        mission_id=mission_id,
    )


def key_of(row: journal.MissionRow) -> tuple[str, str] | None:
    """Returns target and selector of a mission that a miss began; None of any other."""
    return (row.target, str(row.brief["selector"])) if row.origin == MISS else None


def brief_of(miss: DoesNotUnderstand) -> MissionBrief:
    """Returns the brief of a miss: the call as it was made, as far as the caller's arguments are known."""
    return MissionBrief(
        selector=miss.selector,
        args=list(miss.details.get("args") or []),
        kwargs=dict(miss.details.get("kwargs") or {}),
        parameters=miss.details.get("parameters"),
    )


def told(cycle: Cycle) -> dict[str, Any]:
    """Returns a completed cycle as its reply tells it: in the same form as `settled` does of its record."""
    return _complete(cycle.mission_id, {**cycle.achieved(), "transaction_id": cycle.transaction_id})


def settled(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a mission that is over as its record tells it, or raises what it ended with."""
    mission_id, state = record["mission_id"], record["state"]
    if state == journal.COMPLETE:
        return _complete(mission_id, record)
    if state == journal.CANCELLED:
        raise MissionCancelled(f"mission {mission_id} was cancelled", mission_id=mission_id)
    if state in journal.OPEN:
        raise RetryLater(f"mission {mission_id} is open; ask for it later", mission_id=mission_id)
    error = record["error"]
    kind = MissionExpired if error["type"] == MissionExpired.__name__ else MissionFailed
    raise kind(error["message"], **{**error["details"], "mission_id": mission_id})


def _complete(mission_id: str, record: dict[str, Any]) -> dict[str, Any]:
    names = ("attempts", "tokens", "seconds", "method", "result", "transaction_id")
    known = {name: record[name] for name in names if name in record}
    if "method" in known:
        known["method"] = {**known["method"], "transaction_id": record["transaction_id"]}
    return {"mission_id": mission_id, "state": str(State.COMPLETE), **known}
