"""`python -m evals torture --kills N`: nothing that was acknowledged is lost, whatever is killed.

A real watchdog keeps a real kernel; several clients teach it, send messages and make objects, and write down
every acknowledgement. Meanwhile kernel, watchdog, zygote and hands get SIGKILL at random moments, also in the
middle of a start. When all is quiet again, the books are held against the kernel's answers and against the
stopped image. Linux only: it needs `/proc`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from evals.report import Case, Report
from evals.torture import script, wire
from evals.torture.books import Book
from evals.torture.house import House, until
from evals.torture.image import Findings, interrupted
from evals.torture.killer import BIRTHS, Killed, kill, kill_births, plan
from evals.torture.load import Client, prepare
from uvm.errors import BatosError

CLIENTS = 6
SETTLE_S = 180.0  # until all missions are over
GONE_S = 10.0  # until no process is left after a stop
TOLD = 5  # faults that a reason names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this evaluation."""
    parser.add_argument("--kills", type=int, default=20, help="how many kills (20)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn at random (1)")
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"how many clients ({CLIENTS})")
    parser.add_argument("--home", type=Path, metavar="DIR", help="keep the home here, to look into it later")


def run(args: argparse.Namespace) -> Report:
    """Runs the evaluation and returns its report.

    Raises:
        ValueError: this system has no `/proc`, or the home is not empty.
    """
    if sys.platform != "linux":
        raise ValueError("torture needs Linux: it tells processes apart by /proc")
    if args.home is not None:
        args.home.mkdir(parents=True, exist_ok=True)
        if any(args.home.iterdir()):
            raise ValueError(f"{args.home} is not empty; name a new folder")
        return asyncio.run(tortured(args.home, args.kills, args.seed, args.clients))
    with tempfile.TemporaryDirectory(prefix="batos-torture-") as folder:
        return asyncio.run(tortured(Path(folder), args.kills, args.seed, args.clients))


async def tortured(folder: Path, kills: int, seed: int, clients: int) -> Report:
    """Returns what a run comes to, in a home below `folder`."""
    report = Report("torture", must_pass=True)
    books = [Book(str(number)) for number in range(clients)]
    began = time.monotonic()
    house = House(folder / "home", script.settings(folder))
    killed = Killed()
    async with house:
        births = round(kills * BIRTHS)
        await kill_births(house, births, random.Random(f"{seed} births"), killed)
        async with house.client() as kernel:
            await prepare(kernel, books)
        await _kill(house, books, kills - births, seed, killed)
        found = await _asked(house, books)
        found["a stop is in good order"] = _ended(await house.stop())
        await until(lambda: not house.census.leftover(), GONE_S)
        left = [f"{process.kind} {process.pid}" for process in house.census.leftover()]
        found["no process is left after the stop"] = left
    image = Findings(house.home, books)
    image.look()
    found |= _told_of_image(image, books) | _told_of_run(house, killed, books)
    seconds = (time.monotonic() - began) / len(found)
    for name, faults in found.items():
        report.add(Case(name, not faults, seconds, _reason(faults), {"faults": faults}))
    report.summary |= _summary(house, killed, books, image)
    return report


async def _kill(house: House, books: list[Book], kills: int, seed: int, killed: Killed) -> None:
    """Puts the load on, kills, and takes the load off again."""
    stop = asyncio.Event()
    clients = [Client(book, house.client, random.Random(f"{seed} {book.name}"), stop).run() for book in books]
    working = [asyncio.create_task(client) for client in clients]
    began = time.monotonic()

    def tell(number: int) -> None:
        if number % 10 == 0 or number == kills:
            errors = sum((book.errors for book in books), Counter()).total()
            print(
                f"{number} of {kills} kills, {time.monotonic() - began:.0f} s: {_answered(books)} answered, "
                f"{errors} errors, {sum(len(book.missions) for book in books)} missions acknowledged",
                flush=True,
            )

    try:
        rng = random.Random(seed)
        await kill(house, plan(kills, rng), lambda: _answered(books), tell, killed, rng)
    finally:
        stop.set()
        await asyncio.gather(*working)


async def _asked(house: House, books: list[Book]) -> dict[str, list[str]]:
    """Waits until all missions are over, and returns what clients find."""
    stuck = await _settled(house)
    async with house.client() as kernel:
        return {
            "every acknowledged mission came to its end": stuck + await wire.lost_missions(kernel, books),
            "every method that was acknowledged answers": await wire.wrong_answers(kernel, books),
            "every method that was acknowledged is remembered": await wire.forgotten(kernel, books),
        }


async def _settled(house: House) -> list[str]:
    """Waits until all missions are over; cancels those that never end. Returns which went on."""
    deadline = time.monotonic() + SETTLE_S
    rows: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        try:
            async with house.client() as kernel:
                if (await kernel.request("status", timeout_s=10.0)).get("safe_mode"):
                    await house.restart()
                    continue
                while (rows := await wire.unfinished(kernel)) and time.monotonic() < deadline:
                    for row in rows:
                        if row["brief"]["selector"].startswith(script.STALLS):
                            mission_id = row["mission_id"]
                            await kernel.request("cancel_mission", mission_id=mission_id, timeout_s=10.0)
                    await asyncio.sleep(0.1)
            return [f"{row['mission_id']} is still {row['state']}" for row in rows]
        except BatosError:  # the kernel is just starting again
            await asyncio.sleep(0.1)
    return ["the kernel did not come to rest"]


def _ended(status: int) -> list[str]:
    return [f"exit status {status}"] if status else []


def _told_of_image(image: Findings, books: list[Book]) -> dict[str, list[str]]:
    return {
        "every mission of the journal is over": image.open,
        "missions failed for a reason only": image.unreasoned,
        "every acknowledged commit is there": image.lost,
        "what was read in between was right": [fault for book in books for fault in book.broken],
        "nothing was done twice": image.doubled,
        "nothing is there that nobody sent": image.uninvited,
        "mission, method, version and memory are one": image.half_installed,
        "each mission left one version": image.versions,
        "the image opens and every record loads": image.unreadable(),
    }


def _told_of_run(house: House, killed: Killed, books: list[Book]) -> dict[str, list[str]]:
    return {
        "clients saw typed errors only": [fault for book in books for fault in book.unexpected],
        "hands die with their kernel": killed.orphans,
        "the kernel came back each time": killed.stuck,
        "no watchdog gave up": house.gave_up,
        "the kernel told of no fault of its own": house.faults(),
    }


def _summary(house: House, killed: Killed, books: list[Book], image: Findings) -> dict[str, Any]:
    states = Counter(row["state"] for row in image.rows)
    return {
        "killed": _counted(Counter(killed.kinds)),
        "answered": _counted(sum((book.done for book in books), Counter())),
        "errors that clients saw": _counted(sum((book.errors for book in books), Counter())),
        "missions": _counted(states),
        "missions that failed": _counted(image.failed),
        "most starts of a mission": max((row["starts"] for row in image.rows), default=0),
        "missions interrupted in": _counted(interrupted(_thoughts(house.home / "metacognition.jsonl"))),
        "hands gone after their kernel": f"{killed.orphaned_s:.2f} s at most",
        "processes seen": _counted(Counter(house.census.seen.values())),
        "watchdogs": str(house.watchdogs),
        "image": f"{image.transactions} transactions, {image.records} records",
    }


def _thoughts(path: Path) -> list[dict[str, Any]]:
    """Returns the records of the log; lines that a kill cut short are none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _answered(books: list[Book]) -> int:
    return sum(book.done.total() for book in books)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


def _reason(faults: list[str]) -> str:
    more = f"; and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
    return "; ".join(faults[:TOLD]) + more
