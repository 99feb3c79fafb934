"""The watchdog: keeps the kernel alive, and gives up loudly when that is hopeless.

It starts `batos.py`, restarts it with growing pauses when it crashes, and ends it in good order on SIGTERM.
The states are Supervisor's; every change goes through `Watchdog.move` and writes one line. The kernel writes
to `run/kernel.log`, a file that outlives the watchdog, and the watchdog repeats it. Standard library only;
imports nothing of BAT OS, so that no fault of the kernel's can reach it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PROJECT = Path(__file__).resolve().parent
POLL_S = 0.05
BACKOFF_MAX_S = 60.0
LOCK_TRIES = 10  # `--pid` holds the lock for a moment
STOP_SIGNALS = {"SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"}  # as far as this system has them
EXIT_SHUT_DOWN = 0
EXIT_CANNOT_START = 2  # wrong settings, a missing model, a locked image: trying again changes nothing


class State(StrEnum):
    """A state of the kernel's process as the watchdog sees it."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    FATAL = "FATAL"


MOVES: dict[State, frozenset[State]] = {
    State.STOPPED: frozenset({State.STARTING}),
    State.STARTING: frozenset({State.RUNNING, State.BACKOFF, State.STOPPING, State.STOPPED, State.FATAL}),
    State.RUNNING: frozenset({State.BACKOFF, State.STOPPING, State.STOPPED, State.FATAL}),
    State.BACKOFF: frozenset({State.STARTING, State.STOPPED, State.FATAL}),
    State.STOPPING: frozenset({State.STOPPED}),
    State.FATAL: frozenset(),
}


@dataclass
class Watchdog:
    """One kernel: how to keep it (times in seconds), its state, its process and its log."""

    run_dir: Path
    kernel: Path
    arguments: Sequence[str]
    startsecs: float
    retries: int
    backoff: float
    stop_timeout: float
    state: State = State.STOPPED
    stop_asked: bool = False
    failures: int = 0  # starts in a row that did not last

    def run(self) -> int:
        """Watches until the kernel is stopped for good; returns the exit status."""
        steps = {
            State.STARTING: self.start,
            State.RUNNING: self.watch,
            State.BACKOFF: self.back_off,
            State.STOPPING: self.stop,
        }
        # The kernel inherits one end; EOF there says that this process, sole owner of the other, is gone.
        self.lifeline, self.held_end = os.pipe()
        path = self.run_dir / "kernel.log"
        with path.open("ab") as self.sink, path.open("rb") as self.log:
            self.move(State.STARTING, f"home {self.run_dir.parent}")
            while step := steps.get(self.state):
                step()
        return 1 if self.state is State.FATAL else 0

    def move(self, to: State, why: str) -> None:
        """Changes the state and says so.

        Raises:
            ValueError: the table does not have this move.
        """
        if to not in MOVES[self.state]:
            raise ValueError(f"{self.state} -> {to} is no move of the watchdog")
        say(f"[WATCHDOG] {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {self.state} -> {to}: {why}")
        self.state = to

    def ask_to_stop(self, _signal: int, _frame: FrameType | None) -> None:
        """The signal handler; whichever step runs sees the flag."""
        self.stop_asked = True

    def start(self) -> None:
        say(f"Starting {self.kernel.name}...")
        self.spawn()
        self.watch(self.startsecs)

    def watch(self, seconds: float = float("inf")) -> None:
        status = self.wait_for_end(seconds)
        if status is not None:
            self.judge(status)
        elif self.stop_asked:
            self.move(State.STOPPING, "asked to stop")
        else:
            self.failures = 0
            self.move(State.RUNNING, f"pid {self.process.pid} has lasted {seconds:g} s")

    def judge(self, status: int) -> None:
        """Decides what the end of a kernel that nobody stopped means."""
        if status == EXIT_SHUT_DOWN:
            self.move(State.STOPPED, "the kernel was shut down")
        elif status == EXIT_CANNOT_START:
            self.move(State.FATAL, f"the kernel can't start: {self.last_line()}")
        else:
            self.failures += self.state is State.STARTING
            self.move(State.BACKOFF, f"the kernel crashed (exit status {status})")

    def back_off(self) -> None:
        if self.failures > self.retries:
            self.move(
                State.FATAL, f"{self.failures} starts in a row failed; mend what {self.log.name} ends with"
            )
            return
        pause = min(self.backoff * 2 ** max(self.failures - 1, 0), BACKOFF_MAX_S)
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not self.stop_asked:
            time.sleep(POLL_S)
        if self.stop_asked:
            self.move(State.STOPPED, "asked to stop")
        else:
            self.move(State.STARTING, f"again after {pause:g} s")

    def stop(self) -> None:
        self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        status = self.wait_for_end(self.stop_timeout)
        if status is None:
            self.process.kill()
            self.process.wait()
            self.move(State.STOPPED, f"killed: it had not ended after {self.stop_timeout:g} s")
        else:
            self.move(State.STOPPED, f"the kernel ended (exit status {status})")

    def spawn(self) -> None:
        """Starts the kernel in a session of its own: a Ctrl-C in this terminal reaches it through us only."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        how: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        if sys.platform == "win32":
            how["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            how |= {"start_new_session": True, "pass_fds": [self.lifeline]}
            environment["BATOS_WATCHDOG_FD"] = str(self.lifeline)
        self.log_start = self.log.seek(0, os.SEEK_END)  # where the lines of this kernel begin, in bytes
        command = [sys.executable, str(self.kernel), *self.arguments]
        self.process = subprocess.Popen(command, stdout=self.sink, **how)

    def wait_for_end(self, seconds: float) -> int | None:
        """Returns the kernel's exit status, or None after `seconds` or when it is to be stopped."""
        deadline = time.monotonic() + seconds
        status = None
        while status is None and time.monotonic() < deadline:
            if self.stop_asked and self.state is not State.STOPPING:
                break
            with suppress(subprocess.TimeoutExpired):
                status = self.process.wait(POLL_S)
            say(self.log.read().decode("utf-8", "replace"), end="")
        return status

    def last_line(self) -> str:
        self.log.seek(self.log_start)
        return (self.log.read().decode("utf-8", "replace").strip() or "it said nothing").splitlines()[-1]


def say(text: str, end: str = "\n") -> None:
    """Prints; a window that was closed must not keep the watchdog from its work."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lock(file: IO[str], tries: int = 1) -> bool:
    """Takes the lock on an open file; it is released when the process ends, however that happens."""
    for _ in range(tries):
        with suppress(OSError):
            if sys.platform == "win32":
                file.seek(1 << 20)  # a locked byte can't be read, so not one of the pid's
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(POLL_S)
    return False


def keep(watchdog: Watchdog, pid_file: IO[str]) -> int:
    """Runs the one watchdog of a home; returns the exit status."""
    if not lock(pid_file, LOCK_TRIES):
        say(f"Another watchdog (pid {read_pid(pid_file)}) keeps the kernel of {watchdog.run_dir.parent}.")
        return 1
    pid_file.truncate(0)
    print(os.getpid(), file=pid_file, flush=True)
    for number in filter(lambda known: known.name in STOP_SIGNALS, signal.Signals):
        signal.signal(number, watchdog.ask_to_stop)
    return watchdog.run()


def read_pid(pid_file: IO[str]) -> str:
    pid_file.seek(0)
    return pid_file.read().strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps the kernel of BATOS_HOME, or says which watchdog does; returns the exit status."""
    parser = argparse.ArgumentParser(description="Keeps the BAT OS kernel alive.")
    parser.add_argument("--kernel", type=Path, default=PROJECT / "batos.py", help="default: %(default)s")
    parser.add_argument("--startsecs", type=float, default=5, help="a start that lasts this long succeeded")
    parser.add_argument("--retries", type=int, default=3, help="restarts after crashes in a row")
    parser.add_argument("--backoff", type=float, default=1, help="first pause in s; each next one is doubled")
    parser.add_argument("--stop-timeout", type=float, default=20, help="s from SIGTERM to SIGKILL")
    parser.add_argument("--pid", action="store_true", help="print this home's watchdog, if any (1: none)")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="given to the kernel")
    options = vars(parser.parse_args(arguments))
    run_dir = Path(os.environ.get("BATOS_HOME") or PROJECT).expanduser().resolve() / "run"
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "watchdog.pid").open("a+") as pid_file:
        if not options.pop("pid"):
            return keep(Watchdog(run_dir, **options), pid_file)
        if lock(pid_file):
            return 1
        print(read_pid(pid_file))
        return 0


if __name__ == "__main__":
    sys.exit(main())
