"""The watchdog: keeps the kernel alive, and gives up loudly when that is hopeless.

It starts `batos.py`, restarts it with growing pauses when it crashes or hangs, in safe mode after three fast
crashes, and ends it in good order on SIGTERM. The states are Supervisor's; every change goes through
`Watchdog.move` and writes one line. The kernel writes to `run/kernel.log`, a file that outlives the watchdog,
and the watchdog repeats it; heartbeats come through a socket pair. Standard library only; imports nothing of
BAT OS, so that no fault of the kernel's can reach it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import stat
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
LONGEST_STEP_S = 1.0  # more than this between two polls: this process, or the machine, stood still
DUMP_S = 5.0  # for a hung kernel to write where its threads stand
BACKOFF_MAX_S = 60.0
FAST_CRASHES = 3  # so many in a row, and the next start is in safe mode
ROTATED, KEPT = ("kernel.log", "watchdog.log", "watchdog.jsonl"), 3
LOCK_TRIES = 10  # `--pid` holds the lock for a moment
STOP_SIGNALS = {"SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"}  # as far as this system has them
LEAVING = b"q"  # in place of a heartbeat: the kernel was told to shut down
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process by either
EXIT_SHUT_DOWN = 0
EXIT_CANNOT_START = 2  # wrong settings, a missing model, a locked image: trying again changes nothing
EXIT_TRY_LATER = 75  # a full disk, a server that is down: it passes, and is never a reason to give up
TRY_LATER_S = 30.0


class State(StrEnum):
    """A state of the kernel's process as the watchdog sees it."""

    STOPPED = "STOPPED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    BACKOFF = "BACKOFF"
    STOPPING = "STOPPING"
    FATAL = "FATAL"


MOVES: dict[State, frozenset[State]] = {
    State.STOPPED: frozenset({State.STARTING, State.STOPPING}),
    State.STARTING: frozenset({State.RUNNING, State.BACKOFF, State.STOPPING, State.STOPPED, State.FATAL}),
    State.RUNNING: frozenset({State.BACKOFF, State.STOPPING, State.STOPPED, State.FATAL}),
    State.BACKOFF: frozenset({State.STARTING, State.STOPPED, State.FATAL}),
    State.STOPPING: frozenset({State.STOPPED, State.FATAL}),
    State.FATAL: frozenset(),
}


@dataclass
class Watchdog:
    """One kernel: how to keep it (times in seconds; `main` says what each is), its state and its process."""

    run_dir: Path
    kernel: Path
    arguments: Sequence[str]
    startsecs: float
    steady: float
    retries: int
    backoff: float
    stop_timeout: float
    start_timeout: float
    hang_timeout: float
    log_mib: float
    state: State = State.STOPPED
    stop_asked: bool = False
    kill_asked: bool = False
    failures: int = 0  # starts in a row that did not last; in safe mode never below FAST_CRASHES
    pid: int | None = None
    heart: socket.socket | None = None  # where heartbeats come in; none on Windows
    pause: float = 0.0  # before the next start, where it is not that after a crash
    rotate_at: float = 0.0

    @property
    def safe(self) -> bool:
        return self.failures >= FAST_CRASHES

    def run(self) -> int:
        """Watches until the kernel is stopped for good; returns the exit status."""
        steps = {
            State.STARTING: self.start,
            State.RUNNING: self.watch,
            State.BACKOFF: self.back_off,
            State.STOPPING: self.stop,
        }
        log, owner = self.run_dir / "kernel.log", self.run_dir / "kernel.pid"
        with log.open("ab") as self.sink, log.open("rb") as self.log, owner.open("a+") as self.owner:
            self.outlive_orphan()
            if self.state is State.STOPPED and not self.stop_asked:
                self.move(State.STARTING, f"home {self.run_dir.parent}")
            while step := steps.get(self.state):
                step()
        return 1 if self.state is State.FATAL else 0

    def move(self, to: State, why: str) -> None:
        """Changes the state and says so, in a line and in a record of `run/watchdog.jsonl`.

        Raises:
            ValueError: the table does not have this move.
        """
        if to not in MOVES[self.state]:
            raise ValueError(f"{self.state} -> {to} is no move of the watchdog")
        now = datetime.now(UTC)
        say(f"[WATCHDOG] {now:%Y-%m-%dT%H:%M:%SZ} {self.state} -> {to}: {why}")
        stamp = now.isoformat(timespec="milliseconds")
        event = {"ts": stamp, "from": self.state, "to": to, "why": why, "pid": self.pid}
        with suppress(OSError), (self.run_dir / "watchdog.jsonl").open("a", encoding="utf-8") as events:
            events.write(json.dumps(event) + "\n")
        self.state = to

    def ask_to_stop(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler; whichever step runs sees the flags."""
        self.kill_asked |= self.stop_asked and number == signal.SIGINT
        self.stop_asked = True

    def outlive_orphan(self) -> None:
        """Waits for the kernel of a watchdog that was killed, which holds the lock on `kernel.pid`."""
        free = lock(self.owner)
        if free:
            return
        pid = read_pid(self.owner)
        self.move(State.STOPPING, f"the kernel (pid {pid}) of a watchdog that was killed has to end first")
        deadline = time.monotonic() + self.stop_timeout
        while not (free or self.stop_asked) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            free = lock(self.owner)
        if not (free or self.stop_asked) and pid.isdigit() and int(pid) > 1:
            with suppress(OSError):  # it has just ended
                os.kill(int(pid), KILL)  # it is that process: nobody else has inherited the lock
            free = lock(self.owner, 10 * LOCK_TRIES)
        if free or self.stop_asked:
            self.move(State.STOPPED, "it has ended" if free else "asked to stop")
        else:
            self.move(State.FATAL, f"it does not end; end what has {self.owner.name} open, then start again")

    def start(self) -> None:
        say(f"Starting {self.kernel.name}...")
        try:
            self.spawn()
        except OSError as error:  # no memory, no process left
            self.crashed(f"the kernel can't be started ({error})", 0.0)
        else:
            self.watch(self.startsecs)

    def watch(self, seconds: float = float("inf")) -> None:
        status = self.wait_for_end(seconds)
        if status is not None:
            self.judge(status)
        elif self.stop_asked:
            self.move(State.STOPPING, "asked to stop; Ctrl-C again kills it")
        elif self.patience() < 0:
            self.end_hung()
        else:
            self.move(State.RUNNING, f"pid {self.pid} has lasted {seconds:g} s")

    def judge(self, status: int) -> None:
        """Decides what the end of a kernel that nobody stopped means."""
        if status == EXIT_SHUT_DOWN:
            self.move(State.STOPPED, "the kernel was shut down")
        elif status == EXIT_CANNOT_START:
            self.move(State.FATAL, f"the kernel can't start: {self.last_line()}")
        elif status == EXIT_TRY_LATER:
            self.pause = TRY_LATER_S
            self.move(State.BACKOFF, f"the kernel can't start yet: {self.last_line()}")
        else:
            self.crashed(f"the kernel crashed (exit status {status})", time.monotonic() - self.started)

    def end_hung(self) -> None:
        """Has a kernel that gives no sign of life write where its threads stand, and kills it."""
        silence, lasted = self.silence, time.monotonic() - self.started - self.silence
        self.process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DUMP_S)
        self.kill()
        self.look()
        what = "no heartbeat" if self.beaten else "no sign of life since its start"
        if self.leaving:
            self.move(State.STOPPED, f"killed: told to shut down, it had not ended after {silence:.0f} s")
        else:
            self.crashed(f"the kernel hung ({what} for {silence:.0f} s)", lasted)

    def crashed(self, why: str, lasted: float) -> None:
        """Counts a crash soon after the start; one after a long life begins anew, but safe mode stays."""
        self.failures = self.failures + 1 if lasted < self.steady else FAST_CRASHES * self.safe
        self.move(State.BACKOFF, why)

    def back_off(self) -> None:
        if self.failures >= FAST_CRASHES + self.retries:
            self.move(
                State.FATAL,
                f"{self.failures} starts in a row failed; see the end of {self.log.name}, then try "
                "./puter.sh verify (is the image whole?), ./puter.sh restore (a backup of it), "
                "./puter.sh kernel (again)",
            )
            return
        pause = self.pause or self.backoff * 2 ** min(max(self.failures - 1, 0), 30)
        pause, self.pause = min(pause * random.uniform(0.8, 1.2), BACKOFF_MAX_S), 0.0
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not self.stop_asked:
            time.sleep(POLL_S)
        if self.stop_asked:
            self.move(State.STOPPED, "asked to stop")
        else:
            self.move(State.STARTING, f"again after {pause:.2g} s" + ", in safe mode" * self.safe)

    def stop(self) -> None:
        self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        status = self.wait_for_end(self.stop_timeout)
        if status is not None:
            self.move(State.STOPPED, f"the kernel ended (exit status {status})")
            return
        self.kill()
        why = "asked again" if self.kill_asked else f"it had not ended after {self.stop_timeout:g} s"
        self.move(State.STOPPED, f"killed: {why}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def spawn(self) -> None:
        """Starts the kernel in a session of its own: a Ctrl-C in this terminal reaches it through us only."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.safe:
            environment["BATOS_SAFE_MODE"] = "true"
        how: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        theirs = None
        if sys.platform == "win32":
            how["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            if self.heart is not None:
                self.heart.close()
            # EOF on the kernel's end says that this process, sole owner of the other, is gone.
            self.heart, theirs = socket.socketpair()
            self.heart.setblocking(False)
            how |= {"start_new_session": True, "pass_fds": [theirs.fileno(), self.owner.fileno()]}
            environment["BATOS_WATCHDOG_FD"] = str(theirs.fileno())
        self.log_start = self.log.seek(0, os.SEEK_END)  # where the lines of this kernel begin, in bytes
        write_pid(self.owner, None)  # until the new one is in it, there is none
        command = [sys.executable, str(self.kernel), *self.arguments]
        try:
            self.process = subprocess.Popen(command, stdout=self.sink, **how)
        finally:
            if theirs is not None:
                theirs.close()
        self.pid = self.process.pid
        write_pid(self.owner, self.pid)
        self.started = self.looked = time.monotonic()
        self.silence, self.beaten, self.leaving = 0.0, False, False

    def wait_for_end(self, seconds: float) -> int | None:
        """Returns the kernel's exit status, or None: after `seconds`, or when it is to be ended."""
        deadline = time.monotonic() + seconds
        status = None
        while status is None and time.monotonic() < deadline:
            if self.kill_asked if self.state is State.STOPPING else self.stop_asked or self.patience() < 0:
                break
            with suppress(subprocess.TimeoutExpired):
                status = self.process.wait(POLL_S)
            self.look()
        return status

    def patience(self) -> float:
        """Returns how many more seconds the kernel may be silent."""
        if self.heart is None:
            return float("inf")
        if self.leaving:
            return self.stop_timeout - self.silence
        return (self.hang_timeout if self.beaten else self.start_timeout) - self.silence

    def look(self) -> None:
        """Repeats what the kernel printed, takes its heartbeats, and counts how long it has been silent."""
        now = time.monotonic()
        self.silence += min(now - self.looked, LONGEST_STEP_S)
        self.looked = now
        if self.log.tell() > os.fstat(self.log.fileno()).st_size:  # somebody emptied it
            self.log_start = self.log.seek(0)
        text, beats = self.log.read(), b""
        with suppress(BlockingIOError, ConnectionError):
            beats = self.heart.recv(4096) if self.heart is not None else b""
        self.beaten = self.beaten or bool(beats)
        self.leaving = self.leaving or LEAVING in beats
        if beats or (text and not self.beaten):
            self.silence = 0.0
        say(text.decode("utf-8", "replace"), end="")
        if now >= self.rotate_at and sys.platform != "win32":
            self.rotate_at = now + 1.0
            self.rotate_logs()

    def rotate_logs(self) -> None:
        """Keeps each log below its size; what can't be done now, on a full disk say, is tried again."""
        for path in (self.run_dir / name for name in ROTATED):
            try:
                if path.stat().st_size <= self.log_mib * (1 << 20):
                    continue
                if path.name == "kernel.log":
                    say(rotate(self.log).decode("utf-8", "replace"), end="")
                    self.log_start = self.log.seek(0)
                else:
                    with path.open("rb") as log:
                        rotate(log)
            except FileNotFoundError:
                continue
            except OSError:
                self.rotate_at = time.monotonic() + TRY_LATER_S

    def last_line(self) -> str:
        self.log.seek(self.log_start)
        return (self.log.read().decode("utf-8", "replace").strip() or "it said nothing").splitlines()[-1]


def rotate(log: IO[bytes]) -> bytes:
    """Copies a log to `.1` and empties it, since its writer holds it open; returns what had not been read.

    Only what is written in the instant between the last look and the emptying is lost.
    """
    path, read = Path(log.name), log.tell()
    copy = path.with_name(f"{path.name}.new")
    try:
        with copy.open("wb", buffering=0) as target:
            log.seek(0)
            shutil.copyfileobj(log, target)
            for number in range(KEPT, 0, -1):
                newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else copy
                with suppress(FileNotFoundError):
                    newer.replace(path.with_name(f"{path.name}.{number}"))
            log.seek(read)
            unread = log.read()
            target.write(unread[target.tell() - read :])
            os.truncate(path, 0)
    except OSError:
        log.seek(read)
        copy.unlink(missing_ok=True)
        raise
    return unread


def say(text: str, end: str = "\n") -> None:
    """Prints; a window that was closed, or knows few letters, must not keep the watchdog from its work."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)
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


def read_pid(pid_file: IO[str]) -> str:
    pid_file.seek(0)
    return pid_file.read().strip()


def write_pid(pid_file: IO[str], pid: int | None) -> None:
    with suppress(OSError):  # a full disk: the lock is what counts
        pid_file.truncate(0)
        os.write(pid_file.fileno(), b"" if pid is None else b"%d\n" % pid)


def keep(watchdog: Watchdog, pid_file: IO[str]) -> int:
    """Runs the one watchdog of a home; returns the exit status."""
    if not lock(pid_file, LOCK_TRIES):
        say(f"Another watchdog (pid {read_pid(pid_file)}) keeps the kernel of {watchdog.run_dir.parent}.")
        return 1
    write_pid(pid_file, os.getpid())
    with suppress(OSError):  # our output may be `watchdog.log`, which is emptied at times
        if sys.platform != "win32" and stat.S_ISREG(os.fstat(1).st_mode):
            fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_APPEND)
    for number in filter(lambda known: known.name in STOP_SIGNALS, signal.Signals):
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, watchdog.ask_to_stop)
    return watchdog.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps the kernel of BATOS_HOME, or says which watchdog does; returns the exit status."""
    parser = argparse.ArgumentParser(description="Keeps the BAT OS kernel alive.", allow_abbrev=False)
    parser.add_argument("--kernel", type=Path, default=PROJECT / "batos.py", help="default: %(default)s")
    numbers: list[tuple[str, type, float, str]] = [
        ("--startsecs", float, 5, "a start that lasts this long succeeded"),
        ("--steady", float, 60, "a crash before this many s counts as one soon after the start"),
        ("--retries", int, 3, "starts in safe mode, after three such crashes in a row"),
        ("--backoff", float, 1, "first pause in s; each next one is doubled"),
        ("--stop-timeout", float, 20, "s from SIGTERM to SIGKILL"),
        ("--start-timeout", float, 600, "s without a line or a heartbeat that a start may take"),
        ("--hang-timeout", float, 60, "s without a heartbeat, after the first, that mean a hang"),
        ("--log-mib", float, 10, "a log that is larger is moved aside; three are kept"),
    ]
    for name, kind, default, text in numbers:
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--pid", action="store_true", help="print this home's watchdog, if any (1: none)")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="given to the kernel")
    options = vars(parser.parse_args(arguments))
    run_dir = Path(os.environ.get("BATOS_HOME") or PROJECT).expanduser().resolve() / "run"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "watchdog.pid").open("a+") as pid_file:
            if not options.pop("pid"):
                return keep(Watchdog(run_dir, **options), pid_file)
            if lock(pid_file):
                return 1
            print(read_pid(pid_file))
            return 0
    except OSError as error:
        say(f"The watchdog can't work in {run_dir} ({error}); make room or give it the right to write there.")
        return 1


if __name__ == "__main__":
    sys.exit(main())
