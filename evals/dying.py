"""A completing commit that dies: in a process without threads, which may fork.

    python -m evals.dying FOLDER KIND STRIDE

Each case is a fork: it opens a copy of an image, runs the state machine's own COMPLETE on it and kills itself
with SIGKILL at one point: at the n-th line of Python that ZODB, transaction and BAT OS execute, before the
n-th write to the file, or in the middle of it. Then the image is opened as a kernel opens it. Last, a
finished file is cut at many places within its last transaction. Prints a JSON object a line:
`{way, at, place, found, again}`; `found` is all, none or what else it is, `again` what the next run makes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import transaction
import ZODB

import uvm
from uvm.awakening import CATALOG, awaken
from uvm.cycle import Cycle
from uvm.hands.pool import HandPool
from uvm.image import history, journal
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.steady import WholeFile
from uvm.image.txn import Txn
from uvm.memory.catalog import KnowledgeCatalog
from uvm.memory.embedder import Hashing
from uvm.memory.fractal import FractalMemory
from uvm.messages import MissionBrief
from uvm.messenger import Messenger
from uvm.metacognition import MetacognitionLog
from uvm.mind.backends import Message
from uvm.mind.mind import Mind, Reply
from uvm.psm import PrototypalStateMachine
from uvm.trials import Trial

TARGET, SELECTOR = "genesis_obj", "add"
SOURCES = {
    "old": "def add(self, a, b):\n    return b + a\n",
    "new": "def add(self, a, b):\n    return a + b\n",
}
WATCHED = tuple(str(Path(str(package.__file__)).parent) for package in (ZODB, transaction, uvm))
CUTS = 200  # places at which the last transaction is cut, at stride 1

Snapshot = dict[str, Any]
Arm = Callable[[LivingImage, "Countdown"], None]


class Countdown:
    """Counts points and kills the process at the n-th; 0 never does."""

    def __init__(self, at: int, half: bool = False) -> None:
        self.at = at
        self.half = half
        self._points = itertools.count(1)
        self.counted = 0

    def reached(self) -> bool:
        """Counts one point and returns whether it is the one to die at."""
        self.counted = next(self._points)
        return self.counted == self.at


def die(place: str) -> None:
    """Ends this process as a power cut would, having said where."""
    os.write(1, place.encode())
    signal.raise_signal(signal.SIGKILL)


def at_lines(image: LivingImage, countdown: Countdown) -> None:
    """Makes each line of watched code a point, in this thread and in the one that commits."""

    def enter(frame: FrameType, _event: str, _arg: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(WATCHED) else None

    def line(frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line" and countdown.reached():
            die(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return line

    threading.settrace(enter)
    image._committer = ThreadPoolExecutor(1)  # whose thread begins from now on
    sys.settrace(enter)


class _DeadlyFile(WholeFile):
    """The image's file, with each write as a point."""

    def __init__(self, path: str, countdown: Countdown) -> None:
        super().__init__(path, "r+")
        self._countdown = countdown

    def write(self, data: Any) -> int:
        if self._countdown.reached():
            if self._countdown.half:
                super().write(bytes(data)[: len(data) // 2])
            die(f"a write of {len(data)} bytes")
        return super().write(data)


def at_writes(image: LivingImage, countdown: Countdown) -> None:
    """Makes each write to the image's file a point."""
    storage = image._db.storage
    storage._file.close()
    storage._file = _DeadlyFile(image.location, countdown)


def opened(folder: Path) -> LivingImage:
    """Returns the image in this folder, opened as the kernel does."""
    image = LivingImage(str(folder / "live_image.fs"), folder / "blobs")
    image.open()
    return image


def begin(txn: Txn, kind: str) -> str:
    """Puts a mission into the journal and marks it as running; returns its id."""
    brief = {"selector": SELECTOR, "parameters": ["a", "b"], "type": kind}
    row = journal.add(txn, txn.find(TARGET).oid, brief, "architect")
    journal.start(txn, row.mission_id)
    return row.mission_id


async def complete(
    image: LivingImage, folder: Path, source: str, arm: Callable[[], None] = lambda: None
) -> None:
    """Runs COMPLETE of the state machine for the mission that runs: the commit that is looked at."""
    log = MetacognitionLog(folder / "log")
    psm = PrototypalStateMachine(
        image=image,
        mind=Mind({}, {}),
        memory=FractalMemory(Hashing()),
        catalog=CATALOG,
        hands=(hands := HandPool(count=1, timeout_s=1, memory_mib=128)),
        messenger=Messenger(hands),
        log=log,
        covenants="",
        max_attempts=1,
        max_tokens=1,
        default_persona="ALFRED",
    )
    with image.view() as txn:
        (row,) = journal.unfinished(txn)
        cycle = _verified(row.record(), source)
        cycle.base = history.installed(txn.find(TARGET), SELECTOR)
    arm()
    await psm._psm_complete_process(cycle)


def _verified(row: dict[str, Any], source: str) -> Cycle:
    brief = MissionBrief.model_validate(row["brief"])
    cycle = Cycle(f"{row['mission_id']}.1", row["mission_id"], row["target"], brief, row["origin"])
    cycle.persona, cycle.attempts = "ALFRED", 1
    cycle.source, cycle.parameters, cycle.doc = source, ("a", "b"), "Add."
    cycle.conversation = [Message("user", f"Write `def {SELECTOR}`. " + "A long prompt. " * 3000)]
    cycle.trials = [Trial([1, 2], {}, "call")]
    cycle.reply = Reply(source, 9, 9, 9, 0.1, "stop", "a-model", "0" * 64, None, "ALFRED")
    return cycle


def snapshot(folder: Path) -> Snapshot:
    """Opens the image and returns what belongs together: method, version, provenance, memory, row."""
    image = opened(folder)
    try:
        with image.view() as txn:
            return _told(txn)
    finally:
        image.close()


def _told(txn: Txn) -> Snapshot:
    method = txn.find(TARGET)._slots.get(SELECTOR)
    catalog = txn.find(CATALOG)
    assert isinstance(catalog, KnowledgeCatalog)
    (row, *_) = journal.backwards(txn)
    is_open = row.mission_id in txn.root["open_missions"]
    held = method if isinstance(method, UvmMethod) else None
    return {
        "method": held and held.source,
        "version": len(history.versions(held)) if held else 0,
        "provenance": held and held.provenance["mission_id"],
        "memory": sorted((chunk.subject, chunk.text) for chunk in catalog.chunks().values()),
        "row": (row.state, is_open, sorted(row.outcome)),
    }


def prepare(folder: Path, kind: str) -> None:
    """Makes an image with a mission that runs; for a revision, there is a method to replace."""

    async def make() -> None:
        await awaken(image)
        if kind == "revision":
            await image.attempt("first mission", lambda txn: begin(txn, "unhandled_message"))
            await complete(image, folder, SOURCES["old"])
        await image.attempt("mission", lambda txn: begin(txn, kind))

    image = opened(folder)
    asyncio.run(make())
    image.close()


def forked(work: Callable[[], None]) -> tuple[bool, str]:
    """Runs `work` in a fork; returns whether it died as it was to, and what it wrote to its output.

    Raises:
        RuntimeError: it ended in another way.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(writer, 1)
            work()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not died and status != 0:
        raise RuntimeError(f"a fork ended with status {status}: {told}")
    return died, told


class Deaths:
    """All deaths of one kind of mission.

    Args:
        folder: where images may be made.
        kind: the mission's type.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._base = folder / "base"
        self._work = folder / "work"
        self._base.mkdir(parents=True)
        forked(lambda: prepare(self._base, kind))
        self._before = snapshot(self._base)
        self._committed(self._copied())
        self._after = snapshot(self._work)
        assert all(self._before[part] != self._after[part] for part in self._before)

    def at_points(self, way: str, arm: Arm, stride: int, half: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the outcome of a death at every `stride`-th point."""
        _, counted = self._committed(self._copied(), arm)
        for at in range(1, int(counted) + 1, stride):
            died, place = self._committed(self._copied(), arm, at, half)
            yield {"way": way, "at": at, "place": place if died else "", **self._found()}

    def at_cuts(self, stride: int) -> Iterator[dict[str, Any]]:
        """Yields the outcome where the last transaction is cut short."""
        self._committed(self._copied())
        whole = (self._work / "live_image.fs").read_bytes()
        start = (self._base / "live_image.fs").stat().st_size
        step = max(1, (len(whole) - start) * stride // CUTS)
        near = {start + 1, start + 16, start + 17, start + 23, len(whole) - 8, len(whole) - 1, len(whole)}
        for at in sorted({*range(start, len(whole), step), *near}):
            (self._copied() / "live_image.fs").write_bytes(whole[:at])
            yield {"way": "cut", "at": at - start, "place": f"{at - start} bytes left", **self._found()}

    def _found(self) -> dict[str, Any]:
        """Returns what is there after a death; and where nothing is, what the next run makes of it."""
        found = self._judged()
        if found != "none":
            return {"found": found, "again": found}
        self._committed(self._work)
        return {"found": found, "again": self._judged()}

    def _judged(self) -> str:
        try:
            now = snapshot(self._work)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if now == self._before:
            return "none"
        return "all" if now == self._after else f"mixed: {now}"

    def _copied(self) -> Path:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._base, self._work)
        return self._work

    def _committed(self, folder: Path, arm: Arm | None = None, at: int = 0, half: bool = False) -> Any:
        """Runs the commit in a fork that dies at this point."""

        def work() -> None:
            image = opened(folder)
            countdown = Countdown(at, half)

            def armed() -> None:
                if arm is not None:
                    arm(image, countdown)

            asyncio.run(complete(image, folder, SOURCES["new"], armed))
            sys.settrace(None)
            os.write(1, str(countdown.counted).encode())

        return forked(work)


def main(folder: str, kind: str, stride: str) -> None:
    """Prints the outcome of each death."""
    deaths, step = Deaths(Path(folder), kind), int(stride)
    outcomes = itertools.chain(
        deaths.at_points("line", at_lines, step),
        deaths.at_points("write", at_writes, 1),
        deaths.at_points("half a write", at_writes, 1, half=True),
        deaths.at_cuts(step),
    )
    for outcome in outcomes:
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
