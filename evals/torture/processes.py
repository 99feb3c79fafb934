"""The processes of one home, as `/proc` shows them, and how to end exactly one of them. Linux only.

A watchdog and a kernel are known by the home in their environment, a zygote and its hands by their kernel's
pid in their command line. A process is a pid with its time of birth: a pid alone may come again.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
WATCHDOG, KERNEL, ZYGOTE, HAND = "watchdog", "kernel", "zygote", "hand"
_SERVICES = {b"min_watchdog_service.py": WATCHDOG, b"batos.py": KERNEL}
_HANDS = b"uvm.hands.worker"


@dataclass(frozen=True)
class Process:
    """A living process.

    Attributes:
        born: clock ticks since the system's start.
        kernel: pid of the kernel that it is, or works for; 0 for a watchdog.
        busy: whether it was running when it was seen.
    """

    pid: int
    born: int
    parent: int
    kind: str
    kernel: int
    busy: bool = False

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process shares."""
        return self.pid, self.born


class Census:
    """All processes of a home.

    Attributes:
        seen: identity -> kind, of every process that was ever seen.
    """

    def __init__(self, home: Path) -> None:
        self.seen: dict[tuple[int, int], str] = {}
        self._home = b"BATOS_HOME=" + os.fsencode(home)
        self._kernels: set[int] = set()

    def take(self) -> list[Process]:
        """Returns the living processes of the home."""
        found = [*self._services()]
        self._kernels |= {process.pid for process in found if process.kind == KERNEL}
        found += self._hands()
        self.seen |= {process.identity: process.kind for process in found}
        return found

    def _services(self) -> Iterator[Process]:
        for pid, words in _commands():
            name = words[1].rpartition(b"/")[2] if len(words) > 1 else b""
            kind = _SERVICES.get(name)
            if kind is not None and self._home in _read(pid, "environ").split(b"\0"):
                yield from _process(pid, kind, pid if kind == KERNEL else 0)

    def _hands(self) -> list[Process]:
        """Returns zygotes and hands; a hand is the child of a zygote."""
        found: list[Process] = []
        for pid, words in _commands():
            if any(_HANDS in word for word in words) and words[-1].isdigit():
                kernel = int(words[-1])
                if kernel in self._kernels:
                    found += _process(pid, HAND, kernel)
        pids = {process.pid for process in found}
        return [_as(process, HAND if process.parent in pids else ZYGOTE) for process in found]

    def leftover(self) -> list[Process]:
        """Returns what still lives, and also whoever was once seen under whatever name he has now."""
        living = {process.identity: process for process in self.take()}
        for (pid, born), kind in self.seen.items():
            for process in _process(pid, kind, 0):
                if process.born == born:
                    living.setdefault(process.identity, process)
        return [*living.values()]


def strike(process: Process) -> bool:
    """Sends SIGKILL to exactly this process; returns whether it was still there."""
    if sys.platform != "linux":
        raise ValueError("processes are told apart by /proc, which this system has not")
    if process.pid <= 1:
        raise ValueError(f"{process.pid} is no process of ours")
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        still = [found for found in _process(process.pid, process.kind, 0) if found.born == process.born]
        with suppress(ProcessLookupError):
            if still:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        return bool(still)
    finally:
        os.close(handle)


def _as(process: Process, kind: str) -> Process:
    return Process(process.pid, process.born, process.parent, kind, process.kernel, process.busy)


def _commands() -> Iterator[tuple[int, list[bytes]]]:
    for entry in os.scandir(PROC):
        if entry.name.isdigit() and (command := _read(int(entry.name), "cmdline")):
            yield int(entry.name), command.rstrip(b"\0").split(b"\0")


def _process(pid: int, kind: str, kernel: int) -> Iterator[Process]:
    """Yields the process of this pid, unless it has ended."""
    state, *fields = _read(pid, "stat").rpartition(b")")[2].split() or [b"Z"]
    if state not in (b"Z", b"X"):
        yield Process(pid, int(fields[18]), int(fields[0]), kind, kernel, state == b"R")


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:  # it has ended, or it is somebody else's
        return b""
