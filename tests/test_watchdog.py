"""The watchdog over real processes: stand-in kernels of a few lines, and its table of moves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from min_watchdog_service import MOVES, State, Watchdog

SERVICE = Path(__file__).parent.parent / "min_watchdog_service.py"
QUICK = {"--startsecs": "0.3", "--retries": "2", "--backoff": "0.05", "--stop-timeout": "20"}
SAYS_PID = "import os; print('pid', os.getpid(), flush=True)"
LIVES = (
    "import signal, time; print('live', flush=True); signal.signal(15, lambda *_: exit(0)); time.sleep(600)"
)


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

    def start(self, kernel: str, *arguments: str, **options: str) -> subprocess.Popen[str]:
        path = self.home / "batos.py"
        path.write_text(textwrap.dedent(kernel))
        chosen = QUICK | {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        flags = [word for option in chosen.items() for word in option]
        command = [sys.executable, str(SERVICE), "--kernel", str(path), *flags, *arguments]
        environment = os.environ | {"BATOS_HOME": str(self.home)}
        process = subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def running_pid(self) -> str:
        """What `--pid` prints: the watchdog of this home, or nothing."""
        command = [sys.executable, str(SERVICE), "--pid"]
        environment = os.environ | {"BATOS_HOME": str(self.home)}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()

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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# The table


def test_every_state_has_a_row() -> None:
    assert set(MOVES) == set(State)
    assert set().union(*MOVES.values()) <= set(State)


def test_the_documented_table_is_this_table() -> None:
    text = (SERVICE.parent / "docs" / "OPERATIONS.md").read_text("utf-8")
    rows = re.findall(r"^\| ([A-Z]+) \| .* \| (.*) \|$", text, re.MULTILINE)
    assert {state: set(re.findall("[A-Z]+", moves)) for state, moves in rows} == MOVES


@pytest.mark.parametrize(("state", "to"), [(state, to) for state in State for to in State])
def test_only_the_moves_of_the_table_are_possible(state: State, to: State, tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, tmp_path / "batos.py", (), 1, 1, 1, 1)
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
def test_starts_that_fail_again_and_again_end_in_fatal(service: Service) -> None:
    status, output = finish(service.start("raise SystemExit('out of luck')", retries="2"))
    assert status == 1
    assert output.count("Starting batos.py...\n") == 3
    assert moves(output) == [
        "STOPPED -> STARTING",
        *["STARTING -> BACKOFF", "BACKOFF -> STARTING"] * 2,
        "STARTING -> BACKOFF",
        "BACKOFF -> FATAL",
    ]
    assert f"3 starts in a row failed; mend what {service.home}/run/kernel.log ends with" in output


@pytest.mark.slow
def test_only_failures_in_a_row_are_counted(service: Service) -> None:
    kernel = f"""
        import pathlib, sys, time
        starts = pathlib.Path(__file__).with_name("starts")
        number = len(starts.read_text()) if starts.exists() else 0
        starts.write_text("x" * (number + 1))
        if number == 1:
            time.sleep(1)  # long enough to count as started
        if number < 3:
            sys.exit("out of luck")
        {LIVES}
    """
    process = service.start(kernel, retries="1", startsecs="0.2")
    wait_until(lambda: "live" in service.log() or process.poll() is not None)
    process.terminate()
    status, output = finish(process)
    assert status == 0
    assert output.count("STARTING -> BACKOFF") == 2
    assert output.count("RUNNING -> BACKOFF") == 1


@pytest.mark.slow
def test_pauses_double(service: Service) -> None:
    _, output = finish(service.start("raise SystemExit(1)", retries="3", backoff="0.01"))
    assert re.findall(r"again after (\S+) s", output) == ["0.01", "0.02", "0.04"]


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
    wait_until(lambda: "out of luck" in service.log())
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
