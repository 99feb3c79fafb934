"""Replays: what a new version of a method would break of the methods that call it. Layer 3.

A method is kept with the trials that it passed. Before a revision is installed, and when an earlier version
comes back, the trials of its callers, and of theirs, run once more, in a doomed transaction that holds the
new version. What fails is run again without it: only what worked before can be broken.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from uvm.errors import BatosError
from uvm.guardian import Finding
from uvm.image import history
from uvm.image.image import blocking
from uvm.image.prototypes import UvmMethod, UvmObject
from uvm.image.txn import Txn
from uvm.trials import Trial, TrialRunner, Verdict

MAX_TRIALS = 200  # of callers, in one replay
MAX_SECONDS = 60.0  # for the trials of all callers together


@dataclass(frozen=True, slots=True)
class Caller:
    """A method that may call the one that changes, with one trial that it passed."""

    owner: UvmObject
    selector: str
    trial: Trial


@dataclass(slots=True)
class Replay:
    """What came of a replay.

    Attributes:
        callers: names of the methods found, nearest first.
        ran: how many trials ran.
        left_out: how many did not, because there were too many or they took too long.
        broken: what worked without the new version and fails with it, in a sentence each.
    """

    callers: list[str] = field(default_factory=list)
    ran: int = 0
    left_out: int = 0
    broken: list[str] = field(default_factory=list)

    def findings(self) -> list[Finding]:
        """Returns the findings that a revision is refused for."""
        return [Finding("caller", 1, told) for told in self.broken]

    def record(self) -> dict[str, Any]:
        """Returns the replay as the log keeps it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Replays:
    """Replays the trials of callers.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        trials: TrialRunner,
        *,
        max_trials: int = MAX_TRIALS,
        max_seconds: float = MAX_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trials = trials
        self._max_trials = max_trials
        self._max_seconds = max_seconds
        self._clock = clock

    async def run(self, txn: Txn, target: UvmObject, method: UvmMethod) -> Replay:
        """Returns what a new version would break.

        Args:
            txn: a doomed transaction; it is left as it was.
            target: the object that is to hold the version.
            method: the version, not installed.

        Raises:
            RetryLater: it can't be found out now.
        """
        found = await blocking(lambda: list(_callers(txn, target, method.selector)))
        deadline = self._clock() + self._max_seconds
        replay = Replay(list(dict.fromkeys(f"{one.owner.label}.{one.selector}" for one in found)))
        before = txn.savepoint()
        try:
            history.install(txn, target, method)
            failed = await self._failed(txn, found, replay, deadline)
        finally:
            before.rollback()
        for caller, verdict in failed:
            present = await self._verdict(txn, caller, deadline)
            if present is None or not present.findings:  # what there is no time to excuse counts
                replay.broken.append(_sentence(caller, verdict))
        return replay

    async def _failed(
        self, txn: Txn, found: list[Caller], replay: Replay, deadline: float
    ) -> list[tuple[Caller, Verdict]]:
        failed = []
        for caller in found[: self._max_trials]:
            verdict = await self._verdict(txn, caller, deadline)
            if verdict is None:
                break
            replay.ran += 1
            if verdict.findings:
                failed.append((caller, verdict))
        replay.left_out = len(found) - replay.ran
        return failed

    async def _verdict(self, txn: Txn, caller: Caller, deadline: float) -> Verdict | None:
        """Returns the verdict of a caller's trial, or None where the time is up."""
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                return await self._trials.run(txn, caller.owner, caller.selector, None, caller.trial)
        except TimeoutError:
            return None


def _callers(txn: Txn, target: UvmObject, selector: str) -> Iterator[Caller]:
    """Yields the trials of the methods that name a selector, then those of the methods that name these."""
    methods = [
        (owner, name, method)
        for owner in _holders(txn)
        for name, method in owner.methods().items()
        if not (owner is target and name == selector)
    ]
    wanted, seen = [selector], {selector}
    taken: set[tuple[str, str]] = set()
    while wanted:
        called = re.compile(rf"\.\s*({'|'.join(map(re.escape, wanted))})\b")
        wanted = []
        for owner, name, method in methods:
            if (owner.oid, name) in taken or not called.search(method.source):
                continue
            taken.add((owner.oid, name))
            if name not in seen:
                seen.add(name)
                wanted.append(name)
            for stored in history.trials(method):
                yield Caller(owner, name, Trial.of(stored, stored["origin"]))


def _holders(txn: Txn) -> Iterator[UvmObject]:
    """Yields the objects that may hold methods."""
    for oid in txn.root["holders"]:
        try:
            yield txn.find(oid)
        except BatosError:  # packed away, or no object any more: it calls nothing
            continue


def _sentence(caller: Caller, verdict: Verdict) -> str:
    told = verdict.findings[0].message.replace("self.", f"{caller.owner.label}.", 1)
    return f"{caller.owner.label}.{caller.selector} relies on this method, and with it {told}"[:600]
