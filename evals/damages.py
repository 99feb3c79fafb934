"""`python -m evals damages [--count N] [--seed N]`: damaged images, and what the next start makes of them.

A real image is damaged in one of many ways, beside an index that is fresh, stale, missing, garbage or lying,
and opened by the kernel's own code in a process of its own. It must come back with every transaction before
the damage and the rest kept aside bit for bit, or be refused untouched where whole transactions follow. What
is right is computed from where the undamaged file's transactions end, which was noted as they were written.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import logging
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.report import Case, Report
from uvm.errors import BatosError
from uvm.image import history, journal
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.storage import index_of, write_index

LIMIT_S = 60.0
UNITS = 60
NAME = "live_image.fs"
INDEXES = ("fresh", "stale", "none", "garbage", "lying")


@dataclass(frozen=True)
class Story:
    """An undamaged image and what is known of it.

    Attributes:
        data: the file.
        ends: offsets at which its transactions end, the first of them those of a new image together.
        states: digest of all that can be read, after each of them.
        indexes: the index file by its kind; None where there is none.
        reach: how much of the file each index knows, where it can be relied on.
        proven: how many transactions each index knows of, and up to where, even where it can't be relied on.
    """

    data: bytes
    ends: tuple[int, ...]
    states: tuple[str, ...]
    indexes: dict[str, bytes | None]
    reach: dict[str, int]
    proven: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Damaged:
    """A damaged file.

    Attributes:
        first: offset of the first byte that differs; the length of the file where only the end is missing.
        follows: whether whole transactions come after the damage.
        kept: whether the cut tail must be kept aside.
    """

    data: bytes
    first: int
    follows: bool = False
    kept: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this evaluation."""
    parser.add_argument("--count", type=int, default=200, help="damaged images (200)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn at random (1)")


def run(args: argparse.Namespace) -> Report:
    """Runs the evaluation and returns its report."""
    report = Report("damages")
    with tempfile.TemporaryDirectory(prefix="batos-damages-") as folder:
        damage_many(Path(folder), args.count, args.seed, report)
    return report


def damage_many(folder: Path, count: int, seed: int, report: Report) -> None:
    """Damages an image `count` times, each time anew, and adds a case for each to the report."""
    draw = random.Random(seed)
    story = asyncio.run(_tell_story(folder / "whole", draw))
    outcomes: Counter[tuple[str, str]] = Counter()
    kinds = list(_DAMAGES)
    for number in range(count):
        kind, index = kinds[number % len(kinds)], INDEXES[number // len(kinds) % len(INDEXES)]
        began = time.monotonic()
        home = folder / str(number)
        outcome, reason = _try(home, story, _DAMAGES[kind](story, draw), index)
        outcomes[kind, outcome] += 1
        shutil.rmtree(home)
        took = time.monotonic() - began
        report.add(Case(f"{kind}, index {index}: {outcome}", not reason, took, reason))
    names = ("recovered", "refused", "unseen", "lost")
    for kind in kinds:
        told = (f"{outcomes[kind, name]} {name}" for name in names if outcomes[kind, name])
        report.summary[kind] = ", ".join(told)
    report.summary["all"] = ", ".join(
        f"{sum(outcomes[kind, name] for kind in kinds)} {name}" for name in names
    )


# The story


async def _tell_story(folder: Path, draw: random.Random) -> Story:
    path = folder / NAME
    ends: list[int] = []
    states: list[str] = []
    indexes: dict[str, bytes | None] = {"none": None, "garbage": draw.randbytes(2000)}
    reach, proven = dict.fromkeys(INDEXES, 0), dict.fromkeys(INDEXES, (0, 0))

    async def note(image: LivingImage) -> None:
        ends.append(path.stat().st_size)
        states.append(await _digest(image))

    image = _opened(folder)
    await note(image)
    for number in range(UNITS):
        if number == UNITS // 2:
            image.close()
            indexes["stale"], reach["stale"] = index_of(path).read_bytes(), ends[-1]
            proven["stale"] = len(ends), ends[-1]
            image = _opened(folder)
        await _work(image, number, draw)
        await note(image)
    last = bytes.fromhex(image.last_transaction())
    parts = [(prefix, bucket.toString()) for prefix, bucket in image._db.storage._index._data.items()]
    image.close()
    indexes["fresh"], reach["fresh"] = index_of(path).read_bytes(), ends[-1]
    proven["fresh"], proven["lying"] = (len(ends), ends[-1]), (len(ends), draw.randrange(ends[0], ends[-1]))
    write_index(path, proven["lying"][1], last, parts)
    indexes["lying"] = index_of(path).read_bytes()
    return Story(path.read_bytes(), tuple(ends), tuple(states), indexes, reach, proven)


async def _work(image: LivingImage, number: int, draw: random.Random) -> None:
    """Commits one transaction of those that a kernel commits."""
    if number % 12 == 2:
        async with image.transaction(f"undo {number}") as txn:
            image._db.undo(base64.encodebytes(bytes.fromhex(txn.newest)).rstrip(), txn._manager.get())
        return
    async with image.transaction(f"unit {number}") as txn:
        if number % 3 == 0:
            txn.create(f"thing_{number}", (), {"n": number, "raw": draw.randbytes(draw.randrange(20_000))})
        elif number % 3 == 1:
            thing = txn.find(f"thing_{number - 1}")
            source = f"def f(self):\n    return {number}\n"
            history.install(txn, thing, UvmMethod("f", (), source, "Doc.", {"mission_id": str(number)}, []))
        else:
            txn.find(f"thing_{number - 2}").n = -number
            journal.add(txn, "0" * 16, {"selector": f"f{number}"}, "architect")


def _opened(folder: Path, tell: Callable[[str], None] = lambda line: None) -> LivingImage:
    image = LivingImage(str(folder / NAME), folder / "blobs")
    image.open(tell)
    return image


async def _digest(image: LivingImage) -> str:
    """Returns a digest of all that an image says: objects with slots and methods, missions, order and all."""
    async with image.reading() as txn:
        objects = {
            name: [
                {key: repr(value) for key, value in found.data().items()},
                {key: history.versions(method) for key, method in found.methods().items()},
            ]
            for name, found in txn.names.items()
        }
        missions = [row.record() for row in txn.missions.values()]
        told = [objects, missions, list(txn.root["open_missions"]), list(txn.root["holders"])]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# The damages


def _place(story: Story, draw: random.Random) -> int:
    """Returns an offset behind the foundations, as often near the end as anywhere."""
    first = story.ends[0] if draw.random() < 0.5 else story.ends[-4]
    return draw.randrange(first, len(story.data))


def _differing(story: Story, data: bytes) -> Damaged:
    """Returns the damaged file of a damage that reaches to the end."""
    pairs = zip(data, story.data, strict=False)
    common = min(len(data), len(story.data))
    first = next((at for at, (one, other) in enumerate(pairs) if one != other), common)
    return Damaged(data, first)


def _cut(story: Story, draw: random.Random) -> Damaged:
    return _differing(story, story.data[: _place(story, draw)])


def _cut_between(story: Story, draw: random.Random) -> Damaged:
    """A cut that leaves whole transactions alone: only an index can tell that others are gone."""
    return _differing(story, story.data[: draw.choice(story.ends[:-1])])


def _zeros_from(story: Story, draw: random.Random) -> Damaged:
    place = _place(story, draw)
    return _differing(story, story.data[:place] + bytes(len(story.data) - place))


def _garbage_from(story: Story, draw: random.Random) -> Damaged:
    place = _place(story, draw)
    return _differing(story, story.data[:place] + draw.randbytes(len(story.data) - place))


def _zeros_behind(story: Story, draw: random.Random) -> Damaged:
    return _differing(story, story.data + bytes(draw.choice([1, 22, 23, 4096, 300_000])))


def _garbage_behind(story: Story, draw: random.Random) -> Damaged:
    return _differing(story, story.data + draw.randbytes(draw.choice([1, 22, 23, 4096, 300_000])))


def _cut_then_garbage(story: Story, draw: random.Random) -> Damaged:
    return _differing(story, story.data[: _place(story, draw)] + draw.randbytes(draw.randrange(1, 9000)))


def _flip(data: bytes, place: int, draw: random.Random) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


def _last_length_flipped(story: Story, draw: random.Random) -> Damaged:
    place = draw.choice([story.ends[-2] + 8, story.ends[-1] - 8]) + draw.randrange(8)
    return _differing(story, _flip(story.data, place, draw))


def _unfinished(story: Story, draw: random.Random) -> Damaged:
    """What a kill in the middle of a commit leaves: all, or the beginning, of a transaction marked so."""
    begin = story.ends[-2]
    marked = story.data[: begin + 16] + b"c" + story.data[begin + 17 :]
    end = len(marked) if draw.random() < 0.3 else draw.randrange(begin + 17, len(marked))
    return Damaged(marked[:end], begin, kept=False)


def _inner(story: Story, draw: random.Random) -> tuple[int, int]:
    """Returns start and end of a transaction that others follow."""
    number = draw.randrange(1, len(story.ends) - 1)
    return story.ends[number - 1], story.ends[number]


def _field_in_front(story: Story, draw: random.Random) -> Damaged:
    """A field flipped by which a transaction says twice how long it is, which it is, or where."""
    start, end = _inner(story, draw)
    head = start + 23 + int.from_bytes(story.data[start + 17 : start + 19])
    head += int.from_bytes(story.data[start + 19 : start + 21])
    head += int.from_bytes(story.data[start + 21 : start + 23])
    fields = [(start, 8), (start + 8, 8), (end - 8, 8), (head + 8, 8), (head + 24, 8), (head + 32, 10)]
    place, width = draw.choice(fields)
    place += draw.randrange(width)
    return Damaged(_flip(story.data, place, draw), place, follows=True)


def _status_in_front(story: Story, draw: random.Random) -> Damaged:
    place = _inner(story, draw)[0] + 16
    status = draw.choice([b"c", b"\0", b"x"])
    return Damaged(story.data[:place] + status + story.data[place + 1 :], place, follows=True)


def _burst_in_front(story: Story, draw: random.Random) -> Damaged:
    start, end = _inner(story, draw)
    size = draw.randrange(9, end - start)
    new = draw.choice([bytes(size), draw.randbytes(size)])
    return Damaged(story.data[:start] + new + story.data[start + size :], start, follows=True)


def _bytes_missing_in_front(story: Story, draw: random.Random) -> Damaged:
    start, end = _inner(story, draw)
    place = draw.randrange(start, end - 1)
    gone = draw.randrange(1, end - place)
    return Damaged(story.data[:place] + story.data[place + gone :], place, follows=True)


def _bytes_between_in_front(story: Story, draw: random.Random) -> Damaged:
    place = draw.randrange(*_inner(story, draw))
    return Damaged(
        story.data[:place] + draw.randbytes(draw.randrange(1, 5000)) + story.data[place:], place, follows=True
    )


def _first_transaction(story: Story, draw: random.Random) -> Damaged:
    data = story.data[:4] + draw.randbytes(40) + story.data[44:]
    return Damaged(data, 4, follows=True)


_DAMAGES: dict[str, Callable[[Story, random.Random], Damaged]] = {
    "cut": _cut,
    "cut between transactions": _cut_between,
    "zeros to the end": _zeros_from,
    "garbage to the end": _garbage_from,
    "zeros behind": _zeros_behind,
    "garbage behind": _garbage_behind,
    "cut, then garbage": _cut_then_garbage,
    "a length of the last flipped": _last_length_flipped,
    "unfinished, as a kill leaves it": _unfinished,
    "in front: a field flipped": _field_in_front,
    "in front: status changed": _status_in_front,
    "in front: a burst": _burst_in_front,
    "in front: bytes missing": _bytes_missing_in_front,
    "in front: bytes put in": _bytes_between_in_front,
    "in front: the first transaction": _first_transaction,
}


# The opening


def _try(home: Path, story: Story, damaged: Damaged, index: str) -> tuple[str, str]:
    """Opens a damaged image; returns what became of it, and what is wrong with that."""
    home.mkdir()
    (home / NAME).write_bytes(damaged.data)
    if (content := story.indexes[index]) is not None:
        index_of(home / NAME).write_bytes(content)
    done = _in_a_process(home)
    left = (home / NAME).read_bytes()
    if done["outcome"] == "refused":
        wrong = "" if damaged.follows else f"refused although nothing follows: {done['told']}"
        return ("refused" if not wrong else "lost"), wrong or _unlike(left, damaged.data, "the file")
    if done["outcome"] != "opened":
        return "lost", f"{done['outcome']}: {done['told']}"
    if damaged.follows:
        return _unseen(story, damaged, index, left)
    return _recovered(home, story, damaged, index, done, left)


def _unseen(story: Story, damaged: Damaged, index: str, left: bytes) -> tuple[str, str]:
    """Judges an image that was opened with damage inside: right only where an index vouches for the rest."""
    reach = story.reach[index]
    vouched = damaged.first < reach and damaged.data[:reach][-200:] == story.data[:reach][-200:]
    if not vouched:
        return "lost", "opened although whole transactions follow the damage"
    return "unseen", _unlike(left, damaged.data, "the file")


def _recovered(
    home: Path, story: Story, damaged: Damaged, index: str, done: dict[str, Any], left: bytes
) -> tuple[str, str]:
    good = sum(end <= damaged.first for end in story.ends)
    end = story.ends[good - 1]
    tail = damaged.data[end:]
    kept = sorted(home.glob(f"{NAME}.tail*"))
    wrong = _unlike(left, story.data[:end], "the file")
    if not wrong and done["state"] != story.states[good - 1]:
        wrong = f"what is read is not what {good} transactions left ({done['told']})"
    known, claimed = story.proven[index]
    lost = known > good and claimed > end
    if not wrong and (damaged.kept or lost) and [path.read_bytes() for path in kept] != [tail] * bool(tail):
        wrong = f"the tail of {len(tail)} bytes is not kept as it was"
    if not wrong and ["MISSING" in line for line in done["told"]] != [True] * lost + [False] * bool(tail):
        wrong = f"said {done['told']}"
    if not wrong and done["again"]:
        wrong = f"a second start had something to say: {done['again']}"
    return ("recovered" if not wrong else "lost"), wrong


def _unlike(one: bytes, other: bytes, what: str) -> str:
    return "" if one == other else f"{what} has {len(one)} bytes and should have {len(other)}, or others"


def _in_a_process(home: Path) -> dict[str, Any]:
    """Opens an image in a process of its own, with a time limit."""
    context = multiprocessing.get_context()
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_open_and_read, args=(home, there))
    child.start()
    there.close()
    try:
        done = here.recv() if here.poll(LIMIT_S) else {"outcome": "hung", "told": f"after {LIMIT_S} s"}
    except EOFError:
        done = {"outcome": "died", "told": "without a word"}
    child.kill()
    child.join()
    here.close()
    return dict(done)


def _open_and_read(home: Path, answer: Any) -> None:
    logging.disable(logging.CRITICAL)  # ZODB logs each record that it can't read
    answer.send(asyncio.run(_opening(home)))


async def _opening(home: Path) -> dict[str, Any]:
    told: list[str] = []
    again: list[str] = []
    try:
        image = _opened(home, told.append)
    except BatosError as error:
        return {"outcome": "refused", "told": str(error)}
    except Exception as error:
        return {"outcome": "crashed", "told": repr(error)}
    try:
        state = await _digest(image)
    except Exception as error:
        state = repr(error)
    image.close()
    _opened(home, again.append).close()
    return {"outcome": "opened", "told": told, "state": state, "again": again}
