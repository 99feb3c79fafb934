"""The schedule of upkeep in a running kernel: backups and packs when they are due, one at a time.

A backup, and each verification, is a process of its own, so that messages go on; a pack is a thread, since
only the process that has an image open can pack it. What fails is logged, told once, and tried again later.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uvm.errors import BatosError, NotVerified, UpkeepBusy, UpkeepError, from_wire
from uvm.image.image import LivingImage, blocking
from uvm.upkeep import files, packs
from uvm.upkeep.backups import Backups
from uvm.upkeep.ledger import Ledger
from uvm.upkeep.manifests import Backup

KINDS = ("backup", "pack")
PAUSE_S = 60.0  # at least so long after the start, and between two tries
END_S = 5.0  # from SIGTERM to SIGKILL

Record = Callable[..., Awaitable[None]]


class Keeper:
    """Keeps the upkeep of one image.

    Args:
        backup_dir: the folder of backups; what is in it counts for when the next one is due.
        ledger: file of what was done last.
        command: the command line of upkeep, to which `backup` or `verify` is added.
        intervals: kind -> seconds from one to the next; 0 is never.
        keep_days: what a pack keeps of the history.
        room: refuses with `ResourceExhausted` where the image's disk has no room for so many MiB more.
        record: writes a record of the log.
        say: prints a line.
    """

    def __init__(
        self,
        *,
        image: LivingImage,
        blob_dir: Path,
        backup_dir: Path,
        ledger: Path,
        command: Sequence[str],
        intervals: Mapping[str, float],
        keep_days: float,
        room: Callable[[int], None],
        record: Record,
        say: Callable[[str], None],
    ) -> None:
        self._image = image
        self._blob_dir = blob_dir
        self._backups = Backups(backup_dir)
        self._ledger = Ledger(ledger)
        self._command = command
        self._intervals = intervals
        self._keep_days = keep_days
        self._room = room
        self._record = record
        self._say = say
        self._tasks: list[asyncio.Task[None]] = []
        self._under_way = asyncio.Lock()
        self._told: dict[str, str] = {}

    def start(self) -> None:
        """Begins the schedule, where the image is a file."""
        if self._supported:
            self._tasks = [
                asyncio.create_task(self._keep(what, interval))
                for what, interval in self._intervals.items()
                if interval
            ]

    async def close(self) -> None:
        """Ends the schedule; a process under way is ended, a pack is waited for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def told(self) -> dict[str, Any]:
        """Returns what `status` tells: kind -> `{last, bytes?, verified?, error?}`, times in Unix seconds."""
        shown = ("last", "verified", "bytes", "error")
        entries = {what: self._ledger.told(what) for what in KINDS}
        newest = self._newest()
        if newest is not None and newest.verified > (entries["backup"]["last"] or 0.0):  # made on command
            entries["backup"] |= {"last": newest.verified, "verified": newest.verified, "bytes": newest.bytes}
            if newest.verified > entries["backup"]["tried"]:
                entries["backup"].pop("error", None)
        return {
            what: {name: entry[name] for name in shown if name in entry} for what, entry in entries.items()
        }

    async def do(self, what: str, days: float | None = None) -> dict[str, Any]:
        """Makes a backup, or packs, now; returns what came of it.

        Args:
            days: for a pack: what it keeps of the history, in place of the setting.

        Raises:
            UpkeepBusy: one is under way.
            UpkeepError, ResourceExhausted: it failed; what was there is whole.
        """
        if not self._supported:
            raise UpkeepError(f"{self._image.location} is no image file; use the tools of its server")
        if self._under_way.locked():
            raise UpkeepBusy("a backup or a pack is under way; try again when it is done")
        async with self._under_way:
            began = time.monotonic()
            try:
                with files.typed_errors(what):
                    result = await (self._backup() if what == "backup" else self._pack(days))
            except UpkeepBusy:
                raise
            except BatosError as error:
                await self._failed(what, error)
                raise
            except Exception as error:  # nobody thought of it; the schedule goes on all the same
                strange = UpkeepError(f"{type(error).__name__}: {error!s:.300}; see ./puter.sh verify")
                await self._failed(what, strange)
                raise strange from error
            seconds = round(time.monotonic() - began, 3)
            self._told.pop(what, None)
            await self._note(lambda: self._ledger.done(what, result))
            await self._record("upkeep", what=what, outcome="done", seconds=seconds, **result)
            return {"what": what, "seconds": seconds, **result}

    @property
    def _supported(self) -> bool:
        return "://" not in self._image.location

    async def _failed(self, what: str, error: BatosError) -> None:
        text = str(error)
        if self._told.get(what) != text:
            self._told[what] = text
            self._say(f"The {what} failed: {text}")
        await self._note(lambda: self._ledger.failed(what, text))
        await self._record("upkeep", what=what, outcome="failed", error=text)

    async def _note(self, write: Callable[[], None]) -> None:
        """Writes the ledger; where the disk has no room for it, the log still tells."""
        with suppress(OSError):
            await asyncio.to_thread(write)

    async def _keep(self, what: str, interval: float) -> None:
        while True:
            await asyncio.sleep(await self._pause(what, interval))
            with suppress(Exception):  # it was told and logged, unless it is the log itself that fails
                await self.do(what)

    async def _pause(self, what: str, interval: float) -> float:
        """Returns the seconds to wait; where due times can't be told, the whole interval."""
        about = f"when the next {what} is due"
        try:
            pause = await asyncio.to_thread(self._wait, what, interval)
        except Exception as error:
            text = f"{type(error).__name__}: {error!s:.300}"
            if self._told.get(about) != text:
                self._told[about] = text
                self._say(f"It can't be told {about} ({text}): in {interval:g} s")
            return interval
        self._told.pop(about, None)
        return pause

    def _wait(self, what: str, interval: float) -> float:
        """Returns the seconds until the next one is due, some more so that several kernels do not meet."""
        entry = self._ledger.told(what)
        last = entry["last"] or 0.0
        if what == "backup":
            newest = self._newest()
            last = max(last, newest.verified if newest is not None else 0.0)
        due = last + interval
        if entry["failures"]:
            due = min(due, entry["tried"]) + min(interval, PAUSE_S * 2 ** min(entry["failures"], 20))
        now = time.time()
        wait = min(max(due - now, PAUSE_S), interval)  # also where the clock was set back
        return wait + random.uniform(0, min(wait, PAUSE_S) / 10)

    def _newest(self) -> Backup | None:
        """Returns the newest backup; None for a folder that can't be read, which the next one will tell."""
        with suppress(OSError):
            return next(reversed(self._backups.kept()), None)
        return None

    async def _backup(self) -> dict[str, Any]:
        result = await self._run("backup")
        return {"bytes": result["bytes"], "verified": result["verified"], "stamp": result["stamp"]}

    async def _pack(self, days: float | None) -> dict[str, Any]:
        image = Path(self._image.location)
        with files.alone(files.image_lock(image), "upkeep of this image"):
            if packs.left(image):
                await self._verify(image)
            self._room(self._image.size() >> 20)  # the packed image is written beside this one
            keep = self._keep_days if days is None else days
            packed = await blocking(lambda: packs.pack(self._image, keep))
            await self._verify(image)
            return {**asdict(packed), "verified": time.time()}

    async def _verify(self, image: Path) -> None:
        """Verifies the image, and lets go of the file before the pack."""
        try:
            await self._run("verify")
        except NotVerified as error:
            raise packs.unverified(image, error) from None
        await asyncio.to_thread(packs.forget, image, self._blob_dir)

    async def _run(self, verb: str) -> dict[str, Any]:
        """Runs a verb in a process of its own, which gives way to everybody else; returns its result."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            verb,
            "--json",
            "--nice",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await process.communicate()
        finally:
            await _end(process)
        try:
            answer = json.loads(out)
        except ValueError:
            last = (err.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
            raise UpkeepError(f"its process ended with status {process.returncode}: {last:.300}") from None
        if not answer["ok"]:
            raise from_wire(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends a process that is still there, in good order if it can."""
    with suppress(ProcessLookupError):
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), END_S)
            except TimeoutError:
                process.kill()
                await process.wait()
