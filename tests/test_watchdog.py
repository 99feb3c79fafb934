"""The watchdog over real processes: stand-in kernels of a few lines, and its table of moves.

Real kernels under it: `test_heartbeat.py`.
"""

from __future__ import annotations

import configparser
import json
import os
import plistlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import pytest

from min_watchdog_service import MOVES, State, Watchdog, rotate

SERVICE = Path(__file__).parent.parent / "min_watchdog_service.py"
OPERATIONS = (SERVICE.parent / "docs" / "OPERATIONS.md").read_text("utf-8")
WIDE = {"COLUMNS": "200"}  # no help is wrapped
QUICK = {"--startsecs": "0.3", "--retries": "0", "--backoff": "0.05", "--stop-timeout": "20"}
SAYS_PID = "import os; print('pid', os.getpid(), flush=True)"
LIVES = (
    "import signal, time; print('live', flush=True); signal.signal(15, lambda *_: exit(0)); time.sleep(600)"
)


# Beats on `beat()`, prints "live", ends on SIGTERM; ends too when its watchdog is gone.
BEATS = """
    import os, signal, socket, sys, time
    lifeline = socket.socket(fileno=int(os.environ["BATOS_WATCHDOG_FD"]))
    def beat(sign=b"."):
        lifeline.send(sign)
    def keep_on(beating=lambda: True):
        while True:
            if beating():
                beat()
            time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("live pid", os.getpid(), flush=True)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited 60 s"
        time.sleep(0.01)


class Service:
    """Starts watchdogs in a home of their own, each over a kernel given as source."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self,
        kernel: str,
        *arguments: str,
        stdout: IO[bytes] | int = subprocess.PIPE,
        under: str | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        **options: str,
    ) -> subprocess.Popen[str]:
        path = self.home / "batos.py"
        path.write_text(textwrap.dedent(kernel))
        chosen = QUICK | {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        flags = [word for option in chosen.items() for word in option]
        command = [sys.executable, str(SERVICE), "--kernel", str(path), *flags, *arguments]
        command = [under, *command] if under else command
        process = subprocess.Popen(
            command,
            env=os.environ | {"BATOS_HOME": str(self.home)} | dict(environment),
            text=True,
            stdout=stdout,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def running_pid(self) -> str:
        """What `--pid` prints: the watchdog of this home, or nothing."""
        command = [sys.executable, str(SERVICE), "--pid"]
        environment = os.environ | {"BATOS_HOME": str(self.home)}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

    def events(self) -> list[dict[str, Any]]:
        """What `run/watchdog.jsonl` has, in order."""
        path = self.home / "run" / "watchdog.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def state(self) -> str:
        """Where the last move led."""
        return str([{"to": ""}, *self.events()][-1]["to"])

    def log(self) -> str:
        path = self.home / "run" / "kernel.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    for process in service.started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def moves(output: str) -> list[str]:
    """The moves that a watchdog has written, in order."""
    return re.findall(r"^\[WATCHDOG\] \S+Z (\w+ -> \w+): ", output, re.MULTILINE)


def pid_in(log: str) -> int:
    return int(re.findall(r"pid (\d+)", log)[-1])


def is_alive(pid: int) -> bool:
    """Whether it runs; an orphan that has ended may wait for a while to be buried."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in "ZX")
    except (ProcessLookupError, FileNotFoundError):
        return False


def watchdog_in(folder: Path, **changed: Any) -> Watchdog:
    """A watchdog that was never run."""
    chosen: dict[str, Any] = {
        "startsecs": 1, "steady": 1, "retries": 1, "backoff": 1, "stop_timeout": 1, "start_timeout": 1,
        "hang_timeout": 1, "log_mib": 1,
    }  # fmt: skip
    return Watchdog(folder, folder / "batos.py", (), **chosen | changed)


# The table


def test_every_state_has_a_row() -> None:
    assert set(MOVES) == set(State)
    assert set().union(*MOVES.values()) <= set(State)


def test_the_documented_table_is_this_table() -> None:
    rows = re.findall(r"^\| ([A-Z]+) \| .* \| (.*) \|$", OPERATIONS, re.MULTILINE)
    assert {state: set(re.findall("[A-Z]+", moves)) for state, moves in rows} == MOVES


def test_the_documented_options_are_these_options() -> None:
    command = [sys.executable, str(SERVICE), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | WIDE).stdout
    told = {}
    for entry in re.findall(r"^  (--[a-z].*?)(?=^  --|\Z)", text, re.MULTILINE | re.DOTALL):
        default = re.search(r"\(default: ([\d.]+)\)", entry)
        told[entry.split()[0]] = default[1] if default else ""
    rows = re.findall(r"^\| `(--[a-z-]+)(?: \w+)?` \| .* \| ([\d.]+|.*) \|$", OPERATIONS, re.MULTILINE)
    documented = {name: default if default[0].isdigit() else "" for name, default in rows}
    assert "--hang-timeout" in told
    assert documented == told


def snippet(language: str, mark: str) -> str:
    """The block of code of the operator's manual that contains `mark`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", OPERATIONS, re.MULTILINE | re.DOTALL)
    return str(next(block for block in blocks if mark in block))


def test_the_systemd_unit_says_what_the_watchdog_needs(tmp_path: Path) -> None:
    text = snippet("ini", "[Service]")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    service = unit["Service"]
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > 20  # the watchdog's own --stop-timeout
    assert service["RestartPreventExitStatus"] == "1"
    taken = {"RestrictNamespaces", "SystemCallFilter", "PrivateUsers", "MemoryDenyWriteExecute"}
    assert not taken & service.keys()  # hands need these
    if shutil.which("systemd-analyze"):
        here = text.replace("/opt/batos", str(SERVICE.parent)).replace("User=batos", "User=root")
        path = tmp_path / "batos.service"
        path.write_text(here)
        found = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60
        )
        assert (found.returncode, [line for line in found.stderr.splitlines() if path.name in line]) == (
            0,
            [],
        )


def test_the_launchd_plist_says_what_the_watchdog_needs() -> None:
    plist = plistlib.loads(snippet("xml", "<plist").encode())
    assert plist["ProgramArguments"] == ["/opt/batos/puter.sh", "kernel"]
    assert plist["KeepAlive"] is False
    assert plist["ExitTimeOut"] > 20
    assert plist["Umask"] == 0o077


@pytest.mark.parametrize(("state", "to"), [(state, to) for state in State for to in State])
def test_only_the_moves_of_the_table_are_possible(state: State, to: State, tmp_path: Path) -> None:
    watchdog = watchdog_in(tmp_path)
    watchdog.state = state
    if to in MOVES[state]:
        watchdog.move(to, "a test")
        assert watchdog.state is to
    else:
        with pytest.raises(ValueError, match=f"{state} -> {to} is no move"):
            watchdog.move(to, "a test")
        assert watchdog.state is state


# The service


@pytest.mark.slow
def test_a_crash_is_followed_by_a_restart_and_a_stop_by_an_end(service: Service) -> None:
    kernel = f"""
        import pathlib
        mark = pathlib.Path(__file__).with_name("crashed")
        if not mark.exists():
            mark.touch()
            raise SystemExit("out of luck")
        {LIVES}
    """
    process = service.start(kernel)
    wait_until(lambda: "live" in service.log())
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert output.count("Starting batos.py...\n") == 2
    assert "out of luck" in output
    assert moves(output)[:3] == ["STOPPED -> STARTING", "STARTING -> BACKOFF", "BACKOFF -> STARTING"]
    assert moves(output)[-1] == "STOPPING -> STOPPED"


@pytest.mark.slow
def test_a_running_kernel_that_is_killed_comes_back(service: Service) -> None:
    kernel = f"{SAYS_PID}; {LIVES}"
    process = service.start(kernel, retries="0", startsecs="0")
    wait_until(lambda: service.log().count("live") == 1)
    os.kill(pid_in(service.log()), signal.SIGKILL)
    wait_until(lambda: service.log().count("live") == 2)
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert "RUNNING -> BACKOFF" in moves(output)


@pytest.mark.slow
def test_fast_crashes_lead_to_safe_mode_and_then_to_fatal(service: Service) -> None:
    kernel = "import os; print('safe', os.environ.get('BATOS_SAFE_MODE'), flush=True); raise SystemExit(1)"
    status, output = finish(service.start(kernel, retries="2"))
    assert status == 1
    assert re.findall(r"^safe (\w+)$", service.log(), re.MULTILINE) == ["None"] * 3 + ["true"] * 2
    assert moves(output) == [
        "STOPPED -> STARTING",
        *["STARTING -> BACKOFF", "BACKOFF -> STARTING"] * 4,
        "STARTING -> BACKOFF",
        "BACKOFF -> FATAL",
    ]
    assert output.count(", in safe mode") == 2
    last = output.splitlines()[-1]
    assert f"5 starts in a row failed; see the end of {service.home}/run/kernel.log" in last
    for hint in ("./puter.sh verify", "./puter.sh restore", "./puter.sh kernel"):
        assert hint in last


@pytest.mark.slow
def test_only_fast_crashes_in_a_row_are_counted(service: Service) -> None:
    """The third of four crashes comes late: three in a row are never there, and safe mode neither."""
    kernel = f"""
        import os, pathlib, sys, time
        print("safe", os.environ.get("BATOS_SAFE_MODE"), flush=True)
        starts = pathlib.Path(__file__).with_name("starts")
        number = len(starts.read_text()) if starts.exists() else 0
        starts.write_text("x" * (number + 1))
        if number == 2:
            time.sleep(2)  # long enough to count as a life
        if number < 4:
            sys.exit("out of luck")
        {LIVES}
    """
    process = service.start(kernel, retries="0", steady="1.5", startsecs="0.2")
    wait_until(lambda: "live" in service.log() or process.poll() is not None)
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert service.log().count("safe None") == 5
    assert output.count("RUNNING -> BACKOFF") >= 1


@pytest.mark.slow
def test_safe_mode_outlasts_a_late_crash_and_ends_with_the_watchdog(service: Service) -> None:
    kernel = f"""
        import os, pathlib, sys, time
        safe = os.environ.get("BATOS_SAFE_MODE")
        print("safe", safe, flush=True)
        if pathlib.Path(__file__).with_name("mended").exists():
            {LIVES}
        if safe:
            time.sleep(1.5)
            pathlib.Path(__file__).with_name("mended").touch()
        sys.exit("out of luck")
    """
    process = service.start(kernel, retries="1", steady="1")
    wait_until(lambda: "live" in service.log())
    process.terminate()
    assert finish(process)[0] == 0
    assert service.log().count("safe None") == 3
    assert service.log().count("safe true") == 2
    again = service.start(kernel)
    wait_until(lambda: service.log().count("live") == 2)
    again.terminate()
    assert finish(again)[0] == 0
    assert service.log().count("safe None") == 4


@pytest.mark.slow
def test_a_kernel_that_was_shut_down_in_safe_mode_stays_down(service: Service) -> None:
    kernel = "import os, sys; sys.exit(0 if os.environ.get('BATOS_SAFE_MODE') else 1)"
    status, output = finish(service.start(kernel, retries="3"))
    assert status == 0
    assert moves(output)[-1] == "STARTING -> STOPPED"
    assert output.count("Starting batos.py...") == 4


@pytest.mark.slow
def test_pauses_double_within_a_fifth(service: Service) -> None:
    _, output = finish(service.start("raise SystemExit(1)", retries="1", backoff="0.1"))
    pauses = [float(text) for text in re.findall(r"again after (\S+) s", output)]
    assert len(pauses) == 3
    for pause, wanted in zip(pauses, (0.1, 0.2, 0.4), strict=True):
        assert 0.79 * wanted <= pause <= 1.21 * wanted


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_lets_the_kernel_end_in_good_order(service: Service, number: signal.Signals) -> None:
    kernel = """
        import signal, time
        def end(*_):
            print("closed the image", flush=True)
            raise SystemExit(0)
        signal.signal(signal.SIGTERM, end)
        print("live", flush=True)
        time.sleep(600)
    """
    process = service.start(kernel)
    wait_until(lambda: "live" in service.log())
    process.send_signal(number)
    status, output = finish(process)
    assert status == 0
    lines = [line for line in output.splitlines() if "STOPP" in line or "closed" in line]
    assert "-> STOPPING: asked to stop" in lines[-3]
    assert lines[-2] == "closed the image"
    assert "STOPPING -> STOPPED: the kernel ended (exit status 0)" in lines[-1]


@pytest.mark.slow
def test_a_kernel_that_ignores_the_signal_is_killed(service: Service) -> None:
    kernel = f"import signal; signal.signal(15, signal.SIG_IGN); {SAYS_PID}; import time; time.sleep(600)"
    process = service.start(kernel, stop_timeout="0.3")
    wait_until(lambda: "pid" in service.log())
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert "STOPPING -> STOPPED: killed: it had not ended after 0.3 s" in output
    assert not is_alive(pid_in(service.log()))


@pytest.mark.slow
def test_a_stop_during_a_pause_ends_it(service: Service) -> None:
    process = service.start("raise SystemExit('out of luck')", backoff="600")
    wait_until(lambda: service.state() == "BACKOFF")
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert moves(output)[-1] == "BACKOFF -> STOPPED"


@pytest.mark.slow
@pytest.mark.parametrize(("startsecs", "last"), [("60", "STARTING -> STOPPED"), ("0", "RUNNING -> STOPPED")])
def test_a_kernel_that_was_shut_down_stays_down(service: Service, startsecs: str, last: str) -> None:
    status, output = finish(service.start("raise SystemExit(0)", startsecs=startsecs))
    assert status == 0
    assert moves(output)[-1] == last
    assert output.count("Starting batos.py...") == 1


@pytest.mark.slow
def test_a_kernel_that_cannot_start_is_not_tried_again(service: Service) -> None:
    kernel = "print('[UVM] BATOS_WORKER_COUNT: -1 is less than 1'); raise SystemExit(2)"
    status, output = finish(service.start(kernel))
    assert status == 1
    assert moves(output) == ["STOPPED -> STARTING", "STARTING -> FATAL"]
    assert "FATAL: the kernel can't start: [UVM] BATOS_WORKER_COUNT: -1 is less than 1" in output


@pytest.mark.slow
def test_a_kernel_that_lacks_something_is_tried_again_and_never_given_up(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = f"""
        import pathlib, sys
        starts = pathlib.Path(__file__).with_name("starts")
        number = len(starts.read_text()) if starts.exists() else 0
        starts.write_text("x" * (number + 1))
        if number < 8:
            print("[UVM] can't start: the disk is full")
            sys.exit(75)
        {LIVES}
    """
    source = SERVICE.read_text("utf-8").replace("TRY_LATER_S = 30.0", "TRY_LATER_S = 0.05")
    assert "TRY_LATER_S = 0.05" in source
    impatient = service.home / "impatient_watchdog.py"
    impatient.write_text(source, "utf-8")
    monkeypatch.setattr("tests.test_watchdog.SERVICE", impatient)
    process = service.start(kernel, retries="0")
    wait_until(lambda: "live" in service.log() or process.poll() is not None)
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert output.count("BACKOFF: the kernel can't start yet: [UVM] can't start: the disk is") == 8
    assert "safe mode" not in output


@pytest.mark.slow
def test_an_end_that_hangs_keeps_its_exit_status() -> None:
    code = (
        "import threading, time\nfrom uvm import process\n"
        "process.end_within(0.1, print, lambda: 3)\ntime.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SERVICE.parent, capture_output=True, timeout=60)
    assert done.returncode == 3


@pytest.mark.slow
def test_a_home_has_one_watchdog(service: Service) -> None:
    assert service.running_pid() == ""
    process = service.start(LIVES)
    wait_until(lambda: "live" in service.log())
    assert service.running_pid() == str(process.pid)
    status, output = finish(service.start(LIVES))
    assert status == 1
    assert output == f"Another watchdog (pid {process.pid}) keeps the kernel of {service.home}.\n"
    process.terminate()
    assert finish(process)[0] == 0
    assert service.running_pid() == ""


@pytest.mark.slow
def test_a_killed_watchdog_leaves_no_orphan_and_no_lock(service: Service) -> None:
    kernel = f"{SAYS_PID}; os.read(int(os.environ['BATOS_WATCHDOG_FD']), 1); print('alone', flush=True)"
    process = service.start(kernel)
    wait_until(lambda: "pid" in service.log())
    process.kill()
    process.wait()
    wait_until(lambda: "alone" in service.log().splitlines())
    assert (service.home / "run" / "watchdog.pid").read_text().strip() == str(process.pid)
    assert service.running_pid() == ""
    again = service.start(LIVES)
    wait_until(lambda: "live" in service.log())
    again.terminate()
    assert finish(again)[0] == 0


@pytest.mark.slow
def test_a_closed_window_does_not_keep_it_from_stopping_the_kernel(service: Service) -> None:
    process = service.start(f"{SAYS_PID}; {LIVES}")
    wait_until(lambda: "live" in service.log())
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert not is_alive(pid_in(service.log()))


@pytest.mark.slow
def test_arguments_behind_the_dashes_go_to_the_kernel(service: Service) -> None:
    status, output = finish(service.start("import sys; print(sys.argv[1:])", "--", "--safe", "1"))
    assert status == 0
    assert "['--safe', '1']" in output


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    environment = os.environ | {"BATOS_HOME": str(tmp_path / "home")}
    told = subprocess.run([sys.executable, str(SERVICE)], env=environment, capture_output=True, text=True)
    assert told.returncode == 1
    assert re.fullmatch(r"The watchdog can't work in \S+ \(.*\); make room .*\n", told.stdout)
    assert told.stderr == ""


@pytest.mark.slow
def test_letters_that_its_output_does_not_know_do_not_end_it(service: Service) -> None:
    kernel = r"import sys; sys.stdout.buffer.write(b'gr\xc3\xbc\xc3\x9fe \xff')"
    status, output = finish(service.start(kernel, environment={"PYTHONIOENCODING": "ascii"}))
    assert status == 0
    assert "gr??e ?" in output


# Events, hangs, orphans, logs


@pytest.mark.slow
def test_every_move_is_an_event(service: Service) -> None:
    process = service.start(LIVES, startsecs="0.1")
    wait_until(lambda: service.state() == "RUNNING")
    process.terminate()
    _, output = finish(process)
    events = service.events()
    assert [f"{event['from']} -> {event['to']}" for event in events] == moves(output)
    assert events[0].keys() == {"ts", "from", "to", "why", "pid"}
    assert events[0]["pid"] is None
    assert all(f"pid {events[1]['pid']} has lasted" in event["why"] for event in events[1:2])
    assert sorted(event["ts"] for event in events) == [event["ts"] for event in events]


@pytest.mark.slow
def test_a_kernel_whose_heart_stops_is_killed_and_comes_back(service: Service) -> None:
    kernel = f"""{BEATS}
    import faulthandler, pathlib
    faulthandler.enable()
    mark = pathlib.Path(__file__).with_name("hung")
    beat()
    def wedged():
        time.sleep(600)
    if not mark.exists():
        mark.touch()
        wedged()
    keep_on()
    """
    process = service.start(kernel, hang_timeout="3")
    wait_until(lambda: service.log().count("live") == 2)
    first, second = (int(pid) for pid in re.findall(r"live pid (\d+)", service.log()))
    assert not is_alive(first)
    assert "in wedged" in service.log()  # where it stood
    wait_until(lambda: service.state() == "RUNNING")
    assert is_alive(second)
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert re.search(r"(STARTING|RUNNING) -> BACKOFF: the kernel hung \(no heartbeat for \d s\)", output)
    assert output.count("Starting batos.py...") == 2


@pytest.mark.slow
def test_a_stopped_process_is_hung_too(service: Service) -> None:
    process = service.start(f"{BEATS}\n    keep_on()", hang_timeout="3")
    wait_until(lambda: service.state() == "RUNNING")
    first = pid_in(service.log())
    os.kill(first, signal.SIGSTOP)
    wait_until(
        lambda: service.log().count("live") == 2
    )  # SIGABRT waits while it is stopped, SIGKILL does not
    assert not is_alive(first)
    process.terminate()
    assert finish(process)[0] == 0


@pytest.mark.slow
def test_a_start_may_be_silent_as_long_as_its_own_limit_says(service: Service) -> None:
    """Lines are signs of life before the first heartbeat; silence after them is none."""
    kernel = """
        import time
        for number in range(20):
            print("recovering", number, flush=True)
            time.sleep(0.2)
        print("falls silent", flush=True)
        time.sleep(600)
    """
    process = service.start(kernel, start_timeout="3", hang_timeout="0.1", startsecs="60")
    wait_until(lambda: service.log().count("recovering 0") == 2)
    assert service.log().count("falls silent") == 1
    process.kill()
    _, output = finish(process)
    assert re.search(r"no sign of life since its start for \d s", output)
    os.kill(int((service.home / "run" / "kernel.pid").read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_a_machine_that_stood_still_is_no_hang(service: Service) -> None:
    process = service.start(f"{BEATS}\n    keep_on()", hang_timeout="4")
    wait_until(lambda: service.state() == "RUNNING")
    pid = pid_in(service.log())
    for each in (process.pid, pid):
        os.kill(each, signal.SIGSTOP)
    woken = time.monotonic() + 5  # longer than the hang timeout: the time itself is what is tried
    wait_until(lambda: time.monotonic() > woken)
    os.kill(process.pid, signal.SIGCONT)
    os.kill(pid, signal.SIGCONT)
    seen = len(service.log())
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert "hung" not in output
    assert service.log()[seen:].count("live") == 0
    assert moves(output)[-2:] == ["RUNNING -> STOPPING", "STOPPING -> STOPPED"]


@pytest.mark.slow
def test_silence_counts_only_while_the_watchdog_runs(tmp_path: Path) -> None:
    watchdog = watchdog_in(tmp_path, hang_timeout=60)
    ours, theirs = socket.socketpair()
    (tmp_path / "kernel.log").touch()
    with ours, theirs, (tmp_path / "kernel.log").open("rb") as watchdog.log:
        ours.setblocking(False)
        watchdog.heart = ours
        watchdog.silence, watchdog.beaten, watchdog.leaving, watchdog.log_start = 59.0, True, False, 0
        watchdog.looked = time.monotonic() - 3600
        watchdog.look()
        assert 0 <= watchdog.patience() < 1
        theirs.send(b"..")
        watchdog.look()
        assert watchdog.patience() == 60


@pytest.mark.slow
def test_a_kernel_that_was_told_to_shut_down_and_hangs_stays_down(service: Service) -> None:
    kernel = f"""{BEATS}
    beat(b".q")
    time.sleep(600)
    """
    status, output = finish(service.start(kernel, stop_timeout="1", hang_timeout="600"))
    assert status == 0
    assert "STOPPED: killed: told to shut down, it had not ended after 1 s" in output
    assert not is_alive(pid_in(service.log()))


@pytest.mark.slow
def test_a_second_ctrl_c_kills_at_once(service: Service) -> None:
    kernel = f"import signal; signal.signal(15, lambda *_: print('asked', flush=True)); {SAYS_PID}; " + (
        "[signal.pause() for _ in iter(int, 1)]"
    )
    process = service.start(kernel, stop_timeout="600")
    wait_until(lambda: "pid" in service.log())
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "asked" in service.log())
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 0
    assert "STOPPING -> STOPPED: killed: asked again" in output
    assert not is_alive(pid_in(service.log()))


@pytest.mark.slow
def test_nohup_is_heeded(service: Service) -> None:
    process = service.start(LIVES, under="nohup")
    wait_until(lambda: "live" in service.log())
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, output = finish(process)
    assert "STOPPING -> STOPPED" in output


SLOW_TO_STOP = f"""{BEATS}
    import pathlib
    go = pathlib.Path(__file__).with_name("go")
    alone = False
    lifeline.setblocking(False)
    while not (alone and go.exists()):
        try:
            alone = alone or not lifeline.recv(1)
        except BlockingIOError:
            pass
        if alone:
            print("alone", flush=True)
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_new_watchdog_waits_for_the_kernel_of_one_that_was_killed(service: Service) -> None:
    first = service.start(SLOW_TO_STOP)
    wait_until(lambda: "live" in service.log())
    orphan = pid_in(service.log())
    first.kill()
    first.wait()
    second = service.start(SLOW_TO_STOP)
    wait_until(lambda: service.state() == "STOPPING" and "alone" in service.log())
    assert f"the kernel (pid {orphan}) of a watchdog that was killed" in service.events()[-1]["why"]
    assert is_alive(orphan)
    assert service.log().count("live") == 1  # never two at once
    (service.home / "go").touch()
    wait_until(lambda: service.log().count("live") == 2)
    assert not is_alive(orphan)
    second.terminate()
    status, output = finish(second)
    assert status == 0
    assert moves(output)[:3] == ["STOPPED -> STOPPING", "STOPPING -> STOPPED", "STOPPED -> STARTING"]


@pytest.mark.slow
def test_an_orphan_that_does_not_end_is_killed(service: Service) -> None:
    first = service.start(SLOW_TO_STOP)
    wait_until(lambda: "live" in service.log())
    orphan = pid_in(service.log())
    first.kill()
    first.wait()
    second = service.start(SLOW_TO_STOP, stop_timeout="1")
    wait_until(lambda: service.log().count("live") == 2)
    assert not is_alive(orphan)
    second.terminate()
    assert finish(second)[0] == 0


@pytest.mark.slow
def test_a_pid_that_somebody_else_has_by_now_is_left_alone(service: Service) -> None:
    """The file survives its kernel; without the lock its number means nothing."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (service.home / "run").mkdir()
        (service.home / "run" / "kernel.pid").write_text(f"{bystander.pid}\n")
        process = service.start(LIVES)
        wait_until(lambda: "live" in service.log())
        process.terminate()
        status, output = finish(process)
        assert status == 0
        assert moves(output)[0] == "STOPPED -> STARTING"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.slow
def test_logs_are_moved_aside(service: Service) -> None:
    """Each line is shown once and in order, whatever was moved; the instant of the emptying may cost one."""
    kernel = """
        import time
        for number in range(3000):
            print("line", number, "x" * 80, flush=True)
            time.sleep(0.001)
        raise SystemExit(0)
    """
    status, output = finish(service.start(kernel, log_mib="0.05"))
    assert status == 0
    run = service.home / "run"
    files = [run / f"kernel.log{end}" for end in (".3", ".2", ".1", "")]
    assert sorted(run.glob("kernel.log*")) == sorted(files)
    kept = "".join(path.read_text() for path in files)
    for text in (output, kept):
        numbers = [int(number) for number in re.findall(r"^line (\d+) x{80}$", text, re.MULTILINE)]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == 2999
        assert 2999 - numbers[0] + 1 - len(numbers) <= 5
    assert "line 0 " in output


@pytest.mark.slow
def test_the_watchdogs_own_log_is_moved_aside_too(service: Service) -> None:
    """As the launcher starts it: its output goes to a file that was opened without appending."""
    run = service.home / "run"
    run.mkdir()
    kernel = """
        import time
        for number in range(3000):
            print("line", number, "x" * 80, flush=True)
            time.sleep(0.001)
    """
    with (run / "watchdog.log").open("wb") as out:
        process = service.start(kernel, log_mib="0.05", stdout=out)
        assert process.wait(60) == 0
    files = [path.read_bytes() for path in run.glob("watchdog.log*")]
    assert len(files) == 4
    assert not any(b"\0" in content for content in files)
    assert b"the kernel was shut down" in (run / "watchdog.log").read_bytes()


def test_a_log_that_can_not_be_moved_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kernel.log"
    path.write_bytes(b"a line\n")
    (tmp_path / "kernel.log.new").mkdir()  # in the way
    with path.open("rb") as log:
        log.seek(2)
        with pytest.raises(OSError, match=r"kernel\.log\.new"):
            rotate(log)
        assert log.tell() == 2
    assert path.read_bytes() == b"a line\n"
