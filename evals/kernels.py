"""Real kernels for evaluations, benchmarks and tests: a process of its own, in a home of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from uvm.client import Kernel

PROJECT = Path(__file__).resolve().parent.parent
LIVE = "[UVM] System is live. Awaiting Architect's command..."


def free_endpoint() -> str:
    """Returns a loopback address that nothing listens at right now."""
    return free_endpoints(1)[0]


def free_endpoints(number: int) -> list[str]:
    """Returns different loopback addresses that nothing listens at right now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [f"tcp://127.0.0.1:{probe.getsockname()[1]}" for probe in probes]


class KernelProcess:
    """One `batos.py` process.

    Args:
        home: its `BATOS_HOME`; the same home again is the same image.
        settings: further settings by name, without the prefix `BATOS_`.

    Attributes:
        command: what is run; a wrapper in front of it must end by becoming the kernel.
    """

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None) -> None:
        self.home = home
        commands, events = free_endpoints(2)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "BATOS_WATCHDOG_FD"},
            "BATOS_HOME": str(home),
            "BATOS_ZMQ_ENDPOINT": commands,
            "BATOS_ZMQ_EVENTS_ENDPOINT": events,
            "PYTHONUNBUFFERED": "1",
            **{f"BATOS_{name}": value for name, value in (settings or {}).items()},
        }
        self.command = [sys.executable, str(PROJECT / "batos.py")]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """Everything that the kernel printed so far, over all its starts."""
        path = self.home / "kernel.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        """The kernel's process id."""
        assert self.process is not None
        return self.process.pid

    def start(self, timeout_s: float = 60.0) -> None:
        """Starts the kernel and waits until it says that it is live.

        Raises:
            RuntimeError: it ended, or was not live in time; the text holds what it printed.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        printed = len(self.log)
        with (self.home / "kernel.out").open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while LIVE not in self.log[printed:]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the kernel is not live: {self.log[printed:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends the kernel as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self, timeout_s: float = 30.0) -> int:
        """Ends the kernel with SIGTERM and returns its exit status."""
        return self._end(signal.SIGTERM, timeout_s)

    def _end(self, number: signal.Signals, timeout_s: float = 30.0) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def client(self) -> Kernel:
        """Returns a client for this kernel, not yet connected."""
        return Kernel(
            self.environment["BATOS_ZMQ_ENDPOINT"],
            self.environment["BATOS_ZMQ_EVENTS_ENDPOINT"],
            self.home / "keys",
            connect_timeout_s=20.0,
        )


@asynccontextmanager
async def running(home: Path, settings: Mapping[str, str] | None = None) -> AsyncIterator[Kernel]:
    """Gives a client of a fresh kernel, and stops the kernel in the end."""
    process = KernelProcess(home, settings)
    await asyncio.to_thread(process.start)
    try:
        async with process.client() as kernel:
            yield kernel
    finally:
        await asyncio.to_thread(process.stop)
