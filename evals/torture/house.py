"""The watchdog over a kernel of a torture run, started again at once whenever it ends. Linux only."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from evals.kernels import LIVE, PROJECT, free_endpoint
from evals.torture.processes import Census, Process, strike
from uvm.client import Kernel

SERVICE = PROJECT / "min_watchdog_service.py"
# So that it never gives up, and never thinks that the kernel crashes by itself.
OPTIONS = {"--startsecs": "0.2", "--retries": "100000", "--backoff": "0.05", "--stop-timeout": "30"}
OPTIONS |= {"--steady": "0.05"}
POLL_S = 0.05
LIVE_S = 60.0  # until a kernel is live
KERNEL_LOGS = ("kernel.log.3", "kernel.log.2", "kernel.log.1", "kernel.log")  # the watchdog moves them aside


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Returns whether `condition` came to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not (held := condition()) and time.monotonic() < deadline:  # noqa: ASYNC110 (another process's)
        await asyncio.sleep(POLL_S)
    return held


class House:
    """A home with a watchdog.

    Args:
        home: its `BATOS_HOME`.
        settings: further settings by name, without the prefix `BATOS_`.

    Attributes:
        census: the home's processes.
        watchdogs: how many were started.
        gave_up: last lines of watchdogs that ended by themselves.
    """

    def __init__(self, home: Path, settings: Mapping[str, str]) -> None:
        self.home = home.resolve()
        self.census = Census(self.home)
        self.watchdogs = 0
        self.gave_up: list[str] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("BATOS_")},
            "BATOS_HOME": str(self.home),
            "BATOS_ZMQ_ENDPOINT": free_endpoint(),
            "BATOS_ZMQ_EVENTS_ENDPOINT": free_endpoint(),
            "PYTHONUNBUFFERED": "1",
            **{f"BATOS_{name}": value for name, value in settings.items()},
        }
        self._options = _known_options()
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Starts the watchdog."""
        self.home.mkdir(parents=True, exist_ok=True)
        self._start()
        self._keeping = asyncio.create_task(self._keep())
        self._counting = asyncio.create_task(self._count())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def live(self, printed: int = 0) -> None:
        """Waits until a kernel says that it is live, beyond the first `printed` characters of its log.

        Raises:
            ValueError: none is live in time; the text holds what it printed.
        """
        if not await until(lambda: LIVE in self.log[printed:], LIVE_S):
            raise ValueError(f"no kernel is live after {LIVE_S:g} s: {self.log[-2000:]}")

    @property
    def log(self) -> str:
        """Everything that the kernels printed so far."""
        paths = [self.home / "run" / name for name in KERNEL_LOGS]
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths if path.exists())

    def faults(self) -> list[str]:
        """Returns what the kernels printed as faults of their own: the last line of each traceback."""
        return re.findall(r"^Traceback .*\n(?:[ \t].*\n)*(\S.*)$", self.log, re.MULTILINE)

    def client(self) -> Kernel:
        """Returns a client of this home's kernel, not yet connected."""
        return Kernel(
            self._environment["BATOS_ZMQ_ENDPOINT"],
            self._environment["BATOS_ZMQ_EVENTS_ENDPOINT"],
            self.home / "keys",
            connect_timeout_s=3.0,
        )

    def living(self, kind: str) -> list[Process]:
        """Returns the living processes of a kind; of watchdogs only the one that was started last."""
        found = [process for process in self.census.take() if process.kind == kind]
        own = self._watchdog.pid if self._watchdog else 0
        return [process for process in found if kind != "watchdog" or process.pid == own]

    async def restart(self) -> None:
        """Ends the watchdog in good order and starts another."""
        await self.stop()
        self._start()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> int:
        """Ends the watchdog, and with it the kernel, in good order; returns its exit status."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._watchdog is None:
            return 0
        self._watchdog.terminate()
        return await asyncio.to_thread(self._watchdog.wait, 60.0)

    async def close(self) -> None:
        """Ends whatever is left."""
        tasks = [task for task in (self._keeping, self._counting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
        for process in self.census.leftover():
            strike(process)

    def _start(self) -> None:
        self.watchdogs += 1
        with (self.home / "watchdog.out").open("ab") as out:
            self._watchdog = subprocess.Popen(
                [sys.executable, str(SERVICE), *self._options],
                env=self._environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    async def _count(self) -> None:
        """Sees as many processes as possible, so that none is forgotten in the end."""
        while True:
            self.census.take()
            await asyncio.sleep(2 * POLL_S)

    async def _keep(self) -> None:
        """Starts another watchdog whenever this one has ended, as a user or a service manager would."""
        while True:
            assert self._watchdog is not None
            while (status := self._watchdog.poll()) is None:  # noqa: ASYNC110 (another process's end)
                await asyncio.sleep(POLL_S)
            if status >= 0:  # not killed
                self._given_up(status)
            self._start()

    def _given_up(self, status: int) -> None:
        out = (self.home / "watchdog.out").read_text(encoding="utf-8", errors="replace")
        last = (out.splitlines() or ["it said nothing"])[-1]
        self.gave_up.append(f"exit status {status}: {last}")


def _known_options() -> list[str]:
    """Returns the options that this watchdog knows."""
    told = subprocess.run(
        [sys.executable, str(SERVICE), "--help"], capture_output=True, text=True, check=True
    ).stdout
    return [word for name, value in OPTIONS.items() if name in told for word in (name, value)]
