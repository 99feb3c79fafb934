#!/usr/bin/env python3
"""The kernel: wires the organs and keeps their lifecycle.

Alone in knowing everybody; builds from the image upwards to the bridge and closes in the opposite order.
The heavy libraries are imported by the organs when they are first needed, so the kernel is live at once.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from config import PROJECT, Settings
from uvm import messages as m
from uvm import process
from uvm.awakening import CATALOG, ROOT, awaken, primordial
from uvm.bridge import Bridge
from uvm.broker.broker import Broker
from uvm.commands import Commands
from uvm.errors import BatosError, HomeError, ImageUnreachable, ResourceExhausted, ShuttingDown
from uvm.granting import Granting
from uvm.hands.pool import HandPool
from uvm.heartbeat import Heartbeat, Lifeline
from uvm.image.image import LivingImage
from uvm.keys import ensure_keys
from uvm.lanes import Lane
from uvm.listening import reaches_beyond
from uvm.memory.embedder import Embedder, Hashing, MiniLM
from uvm.memory.fractal import FractalMemory
from uvm.messenger import Messenger
from uvm.metacognition import MetacognitionLog
from uvm.mind.assets import locate
from uvm.mind.mind import Mind
from uvm.mind.personas import load_personas
from uvm.missions import Missions
from uvm.objects import Objects
from uvm.pressure import Room, exhausted, started
from uvm.psm import PrototypalStateMachine
from uvm.replays import Replays
from uvm.trials import TrialRunner
from uvm.undoing import Undoing
from uvm.upkeep.keeper import Keeper
from uvm.versions import Versions

CODEX = PROJECT / "codex"
CODE = ("uvm", "terminal", "codex", "evals", "bench", "tests", "docs", ".git", ".venv")
EXIT_CANNOT_START = 2
EXIT_IMAGE_CLOSED = 3  # a new start is needed, and helps
EXIT_TRY_LATER = 75  # what is lacking may come back: sysexits.h calls it EX_TEMPFAIL
EXIT_INTERRUPTED = 130
THREADS = 8  # for the log, the past and the like; all started with the kernel
GRACE_S = 3.0
SHUTDOWN_S = 15.0  # the watchdog kills 20 s after SIGTERM


def say(line: str) -> None:
    """Prints one line as the kernel; a terminal that was closed must not disturb it."""
    with suppress(OSError):
        print(f"[UVM] {line}", flush=True)


class Kernel:
    """One kernel on one image.

    Args:
        lifeline: leads to its watchdog, if it has one.
        on_stop: called once, when it is told to stop.
    """

    def __init__(
        self, settings: Settings, lifeline: Lifeline | None = None, on_stop: Callable[[], None] = lambda: None
    ) -> None:
        self._settings = settings
        self._lifeline = lifeline
        self._on_stop = on_stop
        self._started = time.monotonic()
        _versions()
        self._stop = asyncio.Event()
        self.exit_status = 0
        self._taken_up = asyncio.Event()  # the journal, as the kernel before left it
        self._message_lane = Lane("messages", settings.HAND_COUNT, settings.QUEUE_LIMIT)
        self._mission_lane = Lane("missions", settings.WORKER_COUNT, settings.QUEUE_LIMIT)

    # Lifecycle

    async def run(self) -> None:
        """Starts, serves until told to stop, and closes cleanly.

        Raises:
            HomeError: it can't start with what it found; the text says what to do.
        """
        closing: list[Callable[[], Any]] = []
        try:
            asyncio.get_running_loop().set_default_executor(started(ThreadPoolExecutor(THREADS), THREADS))
            await self._start(closing)
            warming = asyncio.create_task(self._memory.warm())  # takes seconds; the first mission needs it
            closing.append(warming.cancel)
            await self._stop.wait()
            say("Shutting down...")
        finally:
            for close in reversed(closing):
                closed = close()
                if isinstance(closed, Awaitable):
                    await closed

    def stop(self) -> None:
        """Asks the kernel to stop; safe to call from a signal handler of the loop."""
        if not self._stop.is_set():
            self._stop.set()
            self._on_stop()

    async def _start(self, closing: list[Callable[[], Any]]) -> None:
        """Starts organ after organ; `closing` receives what ends each, for whoever unwinds."""
        settings = self._settings
        self._hands = HandPool(
            count=settings.HAND_COUNT,
            timeout_s=settings.HAND_TIMEOUT_S,
            memory_mib=settings.HAND_MEMORY_MIB,
            allow_weak=settings.ALLOW_WEAK_SANDBOX,
        )
        closing.append(self._hands.close)
        await self._hands.start()  # before any key is read: a hand must not inherit one
        self._tell_of_hands()
        self._log = MetacognitionLog(
            settings.METACOGNITION_LOG_FILE,
            max_mib=settings.METACOGNITION_LOG_MAX_MIB,
            report=self._fault,
        )
        closing.append(self._log.close)
        self._image = LivingImage(
            settings.DB_FILE,
            settings.BLOB_DIR,
            self._committed,
            self._image_closed,
            cache_objects=settings.CACHE_OBJECTS,
            cache_mib=settings.CACHE_MIB,
        )
        self._image.open(say)
        closing.append(self._image.close)
        say(f"Living image: {settings.DB_FILE}")
        self._build_organs()
        closing.append(self._mind.close)
        if await awaken(self._image):
            say("Prototypal awakening: the primordial objects are born")
        for line in await self._broker.finish_moves():
            say(f"Files of a commit that was cut short: {line}")
        process.admit_many_connections()
        for line in ensure_keys(settings.KEYS_DIR):
            say(line)
        await self._bridge.start()
        closing.append(self._upkeep.close)  # after the missions: a pack can't be interrupted, and takes long
        closing.append(lambda: self._bridge.close(GRACE_S))
        closing.append(self._missions.close)
        self._start_heartbeat(closing)
        self._log.listen(self._bridge.publish)
        await self._log.record("kernel", change="live", pid=os.getpid())
        resumed = 0 if settings.SAFE_MODE else await self._missions.resume()
        self._taken_up.set()
        if not settings.SAFE_MODE:
            self._upkeep.start()
        endpoints = (settings.ZMQ_ENDPOINT, settings.ZMQ_EVENTS_ENDPOINT)
        if beyond := ", ".join(filter(reaches_beyond, endpoints)):
            say(f"Listening beyond this machine at {beyond}; whoever holds an admitted key may do everything")
        say(f"Listening at {settings.ZMQ_ENDPOINT}, events at {settings.ZMQ_EVENTS_ENDPOINT}")
        if resumed:
            say(f"Missions taken up from the journal: {resumed}")
        if settings.SAFE_MODE:
            say(
                f"Safe mode: nothing starts by itself; missions that wait in the journal: "
                f"{await self._missions.open()}. To leave it: ./puter.sh stop, then ./puter.sh "
                "(without BATOS_SAFE_MODE)"
            )
        if self._missions.quarantined:
            say(f"Missions put into quarantine: {self._missions.quarantined}; see /missions quarantined")
        say("System is live. Awaiting Architect's command...")

    def _start_heartbeat(self, closing: list[Callable[[], Any]]) -> None:
        if self._lifeline is None:
            return
        heartbeat = Heartbeat(self._bridge.address, self._settings.KEYS_DIR, self._lifeline.tell)
        closing.append(lambda: heartbeat.close(leaving=self.exit_status == 0))
        self._bridge.admit(heartbeat.public_key)
        heartbeat.start()

    def _tell_of_hands(self) -> None:
        tier, layers = self._hands.tier, self._hands.layers
        missing = ", ".join(name for name, holds in layers.items() if not holds)
        walls = f"{sum(layers.values())} of {len(layers)} layers hold"
        say(f"Hands: {self._settings.HAND_COUNT}, tier {tier}: {walls}" + f"; not: {missing}" * bool(missing))
        if tier == "C":
            allowed = self._settings.ALLOW_WEAK_SANDBOX
            say(
                "Without seccomp there is no sandbox: generated code "
                + (
                    "runs all the same, as ALLOW_WEAK_SANDBOX says"
                    if allowed
                    else "is refused (ALLOW_WEAK_SANDBOX)"
                )
            )

    def _build_organs(self) -> None:
        settings = self._settings
        self._mind = Mind.of_assets(
            load_personas(CODEX, settings.PERSONA_MODELS),
            models_dir=settings.MODELS_DIR,
            context_tokens=settings.CONTEXT_TOKENS,
            threads=settings.INFERENCE_THREADS,
            memory_budget_mib=settings.MEMORY_BUDGET_MIB,
            on_event=self._log.record,
        )
        self._memory = FractalMemory(_embedder(settings))
        self._broker = broker = Broker(
            image=self._image,
            mind=self._mind,
            memory=self._memory,
            catalog=CATALOG,
            log=self._log,
            default_persona=settings.DEFAULT_PERSONA_MODEL,
            moves_dir=settings.HOME / "run" / "moves",
            protected=_protected(settings),
        )
        messenger = Messenger(self._hands, broker)
        psm = PrototypalStateMachine(
            image=self._image,
            mind=self._mind,
            memory=self._memory,
            catalog=CATALOG,
            hands=self._hands,
            messenger=messenger,
            log=self._log,
            covenants=(CODEX / "covenants.md").read_text(encoding="utf-8"),
            max_attempts=settings.MAX_SYNTHESIS_ATTEMPTS,
            max_tokens=settings.MAX_SYNTHESIS_TOKENS,
            default_persona=settings.DEFAULT_PERSONA_MODEL,
        )
        self._missions = Missions(self._image, psm, self._mission_lane, self._fault)
        room = Room(_disk_of(settings), settings.MIN_FREE_MIB)
        self._commands = Commands(
            image=self._image,
            messenger=messenger,
            missions=self._missions,
            objects=Objects(self._image, ROOT),
            versions=Versions(
                image=self._image,
                memory=self._memory,
                catalog=CATALOG,
                replays=Replays(TrialRunner(messenger)),
                undoing=Undoing(self._image, CATALOG, frozenset(primordial())),
                log=self._log,
            ),
            granting=Granting(self._image, broker.settled),
            memory=self._memory,
            catalog=CATALOG,
            log=self._log,
            lane=self._message_lane,
            max_miss_depth=settings.MAX_MISS_DEPTH,
            room=room.check,
            control={
                "ping": self._ping,
                "status": self._status,
                "shutdown": self._shutdown,
                "upkeep": lambda c: self._upkeep.do(c.what, c.days),
            },
        )
        self._upkeep = Keeper(
            image=self._image,
            blob_dir=settings.BLOB_DIR,
            backup_dir=settings.BACKUP_DIR,
            ledger=settings.HOME / "run" / "upkeep.json",
            command=(sys.executable, str(PROJECT / "upkeep.py")),
            intervals={"backup": settings.BACKUP_INTERVAL_S, "pack": settings.PACK_INTERVAL_S},
            keep_days=settings.PACK_KEEP_DAYS,
            room=room.check,
            record=self._log.record,
            say=say,
        )
        self._bridge = Bridge(
            endpoint=settings.ZMQ_ENDPOINT,
            events_endpoint=settings.ZMQ_EVENTS_ENDPOINT,
            keys_dir=settings.KEYS_DIR,
            max_message_bytes=settings.MAX_MESSAGE_BYTES,
            handler=self._handle,
            report=self._fault,
        )

    async def _committed(self, transaction_id: str, note: str, user: str) -> None:
        try:
            await self._log.record("commit", transaction_id=transaction_id, note=note, user=user)
        except (
            OSError,
            MemoryError,
        ) as error:  # the commit stands; a log that can't be written must not deny it
            self._fault(error)

    def _fault(self, error: BaseException) -> None:
        """Tells of a fault of the kernel's own, with all that is needed to mend it."""
        error = exhausted(error) or error
        if isinstance(error, (HomeError, ResourceExhausted)):  # it says what to do
            say(_told(error))
            return
        with suppress(OSError, MemoryError):
            traceback.print_exception(error, file=sys.stderr)

    def _image_closed(self) -> None:
        """Ends the kernel: its image can neither be read nor written before it is opened again."""
        say("The living image has closed itself: a commit failed in its last step. Ending, to start again")
        self.exit_status = EXIT_IMAGE_CLOSED
        self.stop()

    # Commands about the kernel itself

    async def _handle(self, command: m.Command) -> Any:
        if self._stop.is_set():
            raise ShuttingDown("the kernel is shutting down")
        await self._taken_up.wait()  # a mission that begins before would be taken up too, and run twice
        return await self._commands.handle(command)

    async def _ping(self, _: m.Ping) -> Any:
        return {"pid": os.getpid(), "uptime_s": round(time.monotonic() - self._started, 3)}

    async def _status(self, _: m.Status) -> Any:
        image = self._image
        return {
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "home": str(self._settings.HOME),
            "safe_mode": self._settings.SAFE_MODE,
            "open_missions": await self._missions.open(),
            "image": {"location": image.location, "bytes": image.size(), "records": image.records()},
            "models": self._mind.resident(),
            "queue": {lane.name: lane.told() for lane in (self._message_lane, self._mission_lane)},
            "sandbox": {"tier": self._hands.tier, "layers": self._hands.layers},
            "upkeep": await asyncio.to_thread(self._upkeep.told),
            "versions": _versions(),
        }

    async def _shutdown(self, _: m.Shutdown) -> Any:
        asyncio.get_running_loop().call_later(0.05, self.stop)  # the reply first
        return {"pid": os.getpid()}


def _embedder(settings: Settings) -> Embedder:
    """Returns the memory's embedder; `hashing` names the one that needs no model."""
    model = settings.SENTENCE_TRANSFORMER_MODEL
    return Hashing() if model == "hashing" else MiniLM(locate(model, settings.MODELS_DIR))


def _protected(settings: Settings) -> tuple[Path, ...]:
    """Returns what no grant may open: data, keys, models and code of BAT OS itself."""
    data = [settings.KEYS_DIR, settings.BLOB_DIR, settings.METACOGNITION_LOG_FILE, settings.MODELS_DIR]
    data += [settings.BACKUP_DIR]
    image = _image_paths(settings.DB_FILE)
    code = [*(PROJECT / name for name in CODE), Path(sys.prefix)]
    return (*data, *image, settings.LORA_STAGING_DIR, settings.HOME / "run", *code)


def _image_paths(location: str) -> list[Path]:
    """Returns the file, and the folder of blobs, that a place of an image names; none of a remote one."""
    if "://" not in location:
        return [Path(location)]
    if not location.startswith("file://"):
        return []
    path, _, options = location.removeprefix("file://").partition("?")
    return [Path(path), *(Path(value) for name, value in parse_qsl(options) if name == "blobstorage_dir")]


def _disk_of(settings: Settings) -> Path:
    """Returns a folder on the disk that the image grows on; that of the log where the image is elsewhere."""
    return next(iter(_image_paths(settings.DB_FILE)), settings.METACOGNITION_LOG_FILE).parent


@cache  # reads files, which a kernel without descriptors can't
def _versions() -> dict[str, str]:
    packages = ("ZODB", "pyzmq", "ormsgpack", "pydantic", "llama-cpp-python")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"protocol": str(m.PROTOCOL_VERSION), "python": sys.version.split()[0], **versions}


async def serve(settings: Settings) -> int:
    """Runs a kernel until a signal, a shutdown command, or its watchdog's end; returns the exit status.

    Raises:
        HomeError: it can't start with what it found; the text says what to do.
    """
    lifeline = Lifeline.inherited()
    kernel = Kernel(
        settings, lifeline, lambda: process.end_within(SHUTDOWN_S, say, lambda: kernel.exit_status)
    )
    process.heed_signals(kernel.stop, say)
    if lifeline is not None:
        lifeline.watch(kernel.stop)
    await kernel.run()
    return kernel.exit_status


def main() -> int:
    """Runs the kernel; returns the exit status: 0 after a clean stop, or one of those above."""
    argparse.ArgumentParser(
        description="The kernel of BAT OS. Its settings: python config.py", allow_abbrev=False
    ).parse_args()
    if sys.platform == "win32":  # pyzmq needs a loop with add_reader
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    process.tell_where_it_stands()
    try:
        settings = Settings()
        settings.HOME.mkdir(parents=True, exist_ok=True)
        return asyncio.run(serve(settings))
    except Exception as error:
        reason = error if isinstance(error, (HomeError, ImageUnreachable)) else exhausted(error)
        if reason is None:
            raise
        with suppress(OSError):
            print(f"[UVM] can't start: {_told(reason)}", file=sys.stderr, flush=True)
        return EXIT_CANNOT_START if isinstance(reason, HomeError) else EXIT_TRY_LATER
    except KeyboardInterrupt:  # before there was anything to stop
        return EXIT_INTERRUPTED


def _told(error: BatosError) -> str:
    path = error.details.get("path")
    return f"{error} ({path})" if isinstance(error, ResourceExhausted) and path else str(error)


if __name__ == "__main__":
    status = main()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # all is closed; a library that is still loading in a thread must not delay or disturb
