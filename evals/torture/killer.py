"""Who kills in a torture run: SIGKILL at random moments, to what the weights choose.

Most kills come while clients are being answered, the others during a start or a recovery.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evals.torture.house import House, until
from evals.torture.processes import HAND, KERNEL, WATCHDOG, ZYGOTE, Process, strike

TARGETS = {
    (KERNEL,): 8,
    (WATCHDOG,): 4,
    (ZYGOTE,): 3,
    (HAND,): 6,
    (WATCHDOG, KERNEL): 2,
    (KERNEL, ZYGOTE): 1,
    (HAND, KERNEL): 1,
}
BIRTHS = 0.1  # share of the kills that come during the very first start, while keys and image are made
EARLY = 0.35  # share of the kills that come soon after the one before
EARLY_S, LATE_S = 1.2, 0.9  # the longest pause after the kill before, and after the first answer
APPEARS_S = 30.0  # until there is what is to be killed
ANSWERS_S = 60.0  # until a client is answered again
ORPHANS_S = 5.0  # until the zygote and the hands of a killed kernel are gone


@dataclass(frozen=True)
class Blow:
    """One kill to be.

    Attributes:
        kinds: of the processes to be killed at once.
        early: whether it comes soon after the one before, and not when a client is answered again.
        pause_s: until it falls.
    """

    kinds: tuple[str, ...]
    early: bool
    pause_s: float


def plan(kills: int, rng: random.Random) -> list[Blow]:
    """Returns what is killed and when; the same for the same seed."""
    blows = []
    for _ in range(kills):
        early = rng.random() < EARLY
        (kinds,) = rng.choices([*TARGETS], [*TARGETS.values()])
        blows.append(Blow(kinds, early, rng.uniform(0, EARLY_S if early else LATE_S)))
    return blows


@dataclass
class Killed:
    """What was killed.

    Attributes:
        kinds: kinds of the processes of each kill, joined by `+`.
        orphans: why, where zygote or hands of a killed kernel outlived it for too long.
        orphaned_s: the longest time until they were gone.
        stuck: why, where nothing was answered, or nothing to kill appeared, for too long.
    """

    kinds: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    orphaned_s: float = 0.0
    stuck: list[str] = field(default_factory=list)


async def kill_births(house: House, kills: int, rng: random.Random, done: Killed) -> None:
    """Kills a kernel that has never been live before, so many times; then waits until one is live."""
    printed = 0
    for _ in range(kills):
        await until(lambda: bool(house.living(KERNEL)), APPEARS_S)
        await asyncio.sleep(rng.uniform(0, EARLY_S))
        printed = len(house.log)
        await _strike_all(house, (KERNEL,), done, rng)
        done.kinds.append("kernel at its birth")
    await house.live(printed)


async def kill(
    house: House,
    blows: Sequence[Blow],
    answered: Callable[[], int],
    tell: Callable[[int], None],
    done: Killed,
    rng: random.Random,
) -> None:
    """Kills as planned, and writes into `done` what that was.

    Args:
        answered: how many requests of clients were answered so far.
        tell: told after each kill how many there were.
        rng: decides which of several hands is killed.
    """
    watches = []
    for number, blow in enumerate(blows, 1):
        if not blow.early:
            await _wait_for_answers(done, answered)
        await asyncio.sleep(blow.pause_s)
        struck = await _strike_all(house, blow.kinds, done, rng)
        done.kinds.append("+".join(blow.kinds))
        watches += [
            asyncio.create_task(_watch_orphans(house, process, done))
            for process in struck
            if process.kind == KERNEL
        ]
        tell(number)
    await asyncio.gather(*watches)


async def _wait_for_answers(done: Killed, answered: Callable[[], int]) -> None:
    before = answered()
    if not await until(lambda: answered() > before + 3, ANSWERS_S):
        done.stuck.append(f"no client was answered for {ANSWERS_S:g} s after kill {len(done.kinds)}")


async def _strike_all(
    house: House, kinds: tuple[str, ...], done: Killed, rng: random.Random
) -> list[Process]:
    """Kills one process of each kind, a hand that runs before one that waits; returns whom."""
    struck: list[Process] = []
    deadline = time.monotonic() + APPEARS_S
    for kind in kinds:
        while kind not in [process.kind for process in struck]:
            found = house.living(kind)
            chosen = rng.choice([hand for hand in found if hand.busy] or found) if found else None
            if chosen is not None and strike(chosen):
                struck.append(chosen)
            elif time.monotonic() > deadline or struck:  # the second of two may have gone with the first
                break
            else:
                await asyncio.sleep(0.01)
    if not struck:
        done.stuck.append(f"no {kinds[0]} for {APPEARS_S:g} s")
    return struck


async def _watch_orphans(house: House, kernel: Process, done: Killed) -> None:
    began = time.monotonic()

    def left() -> list[Process]:
        return [p for p in house.census.take() if p.kernel == kernel.pid and p.pid != kernel.pid]

    if not await until(lambda: not left(), ORPHANS_S):
        told = ", ".join(f"{process.kind} {process.pid}" for process in left())
        done.orphans.append(f"{told} of kernel {kernel.pid} lived on for {ORPHANS_S:g} s")
    done.orphaned_s = max(done.orphaned_s, time.monotonic() - began)
