"""The heartbeat, and real kernels under a real watchdog: hangs, kills, stops, safe mode, what is left."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from evals.kernels import LIVE, PROJECT, KernelProcess, free_endpoint
from tests.conftest import PERSONAS, Start, scripted, writes
from tests.test_watchdog import is_alive, wait_until
from uvm import heartbeat as heartbeats
from uvm import keys
from uvm.admission import Admission, Share
from uvm.bridge import Bridge
from uvm.client import Kernel
from uvm.errors import ConfigError, KernelRefused, QueueFull
from uvm.heartbeat import BEAT, LEAVING, Heartbeat, Lifeline
from uvm.image import journal
from uvm.image.image import LivingImage
from uvm.listening import reachable
from uvm.messages import Command

STALLS = {"pattern": "Write `def slow", "stall": True}
SLOW_SQUARE = "def slow_square(self, x):\n    return x * x"
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

# A real kernel that does something of its own when it gets SIGUSR2.
KERNEL = """
import sys
sys.path.insert(0, {project!r})
import asyncio, os, signal, threading, time
import batos
def wedge(*_):
    {wedge}
signal.signal(signal.SIGUSR2, wedge)
{before}
status = batos.main()
os._exit(status)
"""
SLEEPS = "time.sleep(600)"  # in the main thread, where the event loop runs
GROWS_DEAF = "[task.cancel() for task in asyncio.all_tasks() if '_read_requests' in repr(task)]"
LEAVES_A_THREAD = (
    "asyncio.get_running_loop().run_in_executor(None, time.sleep, 600); print('begun', flush=True)"
)


def kernel_file(folder: Path, wedge: str = "pass", before: str = "") -> Path:
    path = folder / "wedged.py"
    path.write_text(KERNEL.format(project=str(PROJECT), wedge=wedge, before=before))
    return path


class Kept:
    """A real kernel in a home of its own, and the watchdogs that keep it one after the other."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        self.kernel = KernelProcess(home, settings)
        self.run = home / "run"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, file: Path = PROJECT / "batos.py", **options: str) -> subprocess.Popen[bytes]:
        flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        self.kernel.home.mkdir(exist_ok=True)
        with (self.kernel.home / "watchdog.out").open("ab") as out:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, str(PROJECT / "min_watchdog_service.py"), "--kernel", str(file), *flags],
                    env=self.kernel.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
        return self.started[-1]

    @property
    def log(self) -> str:
        path = self.run / "kernel.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def moves(self) -> list[dict[str, Any]]:
        path = self.run / "watchdog.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def pid(self) -> int:
        return int((self.run / "kernel.pid").read_text())

    def live(self, times: int = 1) -> int:
        """Waits until so many kernels were live, one after the other; returns the pid of the last."""
        wait_until(lambda: self.log.count(LIVE) == times)
        return self.pid

    def running(self) -> int:
        """Waits until the watchdog says so of a live kernel, whose heart then beats; returns its pid."""
        wait_until(lambda: LIVE in self.log and self.moves[-1]["to"] == "RUNNING")
        return self.pid

    def stop(self) -> list[str]:
        """Stops it in good order; returns why each move was made."""
        self.started[-1].terminate()
        assert self.started[-1].wait(60) == 0
        return [move["why"] for move in self.moves]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    settings = scripted(tmp_path, [STALLS, *writes("square", "def square(self, x):\n    return x * x")])
    made = Kept(tmp_path / "home", settings)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
    pid_file = made.run / "kernel.pid"
    if pid_file.exists() and (text := pid_file.read_text().strip()) and is_alive(int(text)):
        wait_until(lambda: not is_alive(int(text)))


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that these have."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in {pid, *found}} - found:
        found |= more
    return found


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (what it waits for happens elsewhere)
            await asyncio.sleep(0.01)


def thoughts(kernel: KernelProcess, event: str) -> list[dict[str, Any]]:
    path = kernel.home / "metacognition.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["event"] == event]


async def open_missions(kernel: KernelProcess) -> list[tuple[str, int]]:
    """State and starts of the missions that the image of a kernel that has ended keeps open."""
    image = LivingImage(str(kernel.home / "live_image.fs"), kernel.home / "live_image.fs.blob")
    image.open()
    try:
        async with image.reading() as txn:
            return [(row.state, row.starts) for row in journal.unfinished(txn)]
    finally:
        image.close()


# The lifeline


@pytest.mark.parametrize("text", ["-1", "none", "99999999999999999999", "0"])
def test_a_lifeline_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BATOS_WATCHDOG_FD", text)
    with pytest.raises(ConfigError, match="BATOS_WATCHDOG_FD is set by the watchdog alone"):
        Lifeline.inherited()


@pytest.mark.slow
def test_a_kernel_with_such_a_lifeline_says_so(tmp_path: Path) -> None:
    kernel = KernelProcess(tmp_path, scripted(tmp_path, []))
    kernel.environment["BATOS_WATCHDOG_FD"] = "77"
    with pytest.raises(RuntimeError, match="can't start: BATOS_WATCHDOG_FD is set by the watchdog alone"):
        kernel.start()


def test_without_a_watchdog_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATOS_WATCHDOG_FD", raising=False)
    assert Lifeline.inherited() is None


async def test_a_lifeline_never_blocks_and_tells_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setenv("BATOS_WATCHDOG_FD", str(theirs.detach()))
    lifeline = Lifeline.inherited()
    assert lifeline is not None
    assert "BATOS_WATCHDOG_FD" not in os.environ  # for no child
    gone: list[bool] = []
    lifeline.watch(lambda: gone.append(True))
    for _ in range(100_000):  # nobody reads
        lifeline.tell(BEAT)
    assert ours.recv(10) == BEAT * 10
    ours.send(b"what a watchdog never says")
    await asyncio.sleep(0)
    assert not gone
    ours.close()
    await until(lambda: gone)
    lifeline.tell(BEAT)  # to nobody
    assert gone == [True]
    lifeline.close()


# The heartbeat over a real bridge


class House:
    """A bridge; `status` waits behind it, and everything else is answered."""

    def __init__(self, keys_dir: Path, endpoint: str) -> None:
        keys.ensure_keys(keys_dir)
        self.keys_dir = keys_dir
        self.faults: list[BaseException] = []
        self.beats: list[bytes] = []
        self.waiting = 0
        self.events = free_endpoint()
        self.bridge = Bridge(
            endpoint=endpoint,
            events_endpoint=self.events,
            keys_dir=keys_dir,
            max_message_bytes=100_000,
            handler=self.handle,
            report=self.faults.append,
        )

    async def handle(self, command: Command) -> Any:
        if command.command == "status":
            self.waiting += 1
            await asyncio.Event().wait()

    async def start(self) -> None:
        await self.bridge.start()
        self.heartbeat = Heartbeat(self.bridge.address, self.keys_dir, self.beats.append)
        self.bridge.admit(self.heartbeat.public_key)
        self.heartbeat.start()

    async def more_beats(self) -> None:
        seen = len(self.beats)
        await until(lambda: len(self.beats) >= seen + 3)  # one may have been on its way

    def client(self) -> Kernel:
        return Kernel(self.bridge.address, self.events, self.keys_dir, 20.0)


@pytest.fixture(params=["tcp://127.0.0.1:*", "tcp://0.0.0.0:*", "ipc"])
async def house(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[House]:
    monkeypatch.setattr(heartbeats, "INTERVAL_S", 0.01)
    endpoint = f"ipc://{tmp_path}/sock" if request.param == "ipc" else request.param
    made = House(tmp_path / "keys", endpoint)
    await made.start()
    yield made
    await made.heartbeat.close()
    await made.bridge.close(0.0)
    assert made.beats[-1] == LEAVING
    assert made.faults == []


async def test_a_kernel_that_answers_beats(house: House) -> None:
    await house.more_beats()
    assert set(house.beats) == {BEAT}


async def test_revoking_all_clients_does_not_stop_it(house: House) -> None:
    async with house.client() as kernel:
        for path in (house.keys_dir / "clients").iterdir():
            path.unlink()
        with pytest.raises(KernelRefused):
            await kernel.request("ping", timeout_s=20)
        await house.more_beats()


async def test_others_that_have_too_much_under_way_do_not_stop_it(house: House) -> None:
    async with house.client() as kernel:
        house.bridge._admission = Admission(all=Share(requests=1, size=1 << 20))
        stuck = asyncio.ensure_future(kernel.request("status"))
        await until(lambda: house.waiting)
        with pytest.raises(QueueFull):
            await kernel.request("ping", timeout_s=20)
        await house.more_beats()
        stuck.cancel()


async def test_a_bridge_that_does_not_read_is_silence(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "PATIENCE_S", 0.2)
    await house.more_beats()
    house.bridge._reader.cancel()
    await asyncio.gather(house.bridge._reader, return_exceptions=True)
    sent = len(house.beats)
    await asyncio.sleep(0.5)  # several pings: the silence itself is what is tried
    assert len(house.beats) <= sent + 1
    house.bridge._reader = asyncio.create_task(house.bridge._read_requests())
    await house.more_beats()  # and it goes on by itself


async def test_its_key_is_in_no_file(house: House) -> None:
    await house.more_beats()
    assert not any(
        house.heartbeat.public_key in path.read_text() for path in house.keys_dir.rglob("*") if path.is_file()
    )


def test_an_address_of_all_is_reached_by_loopback() -> None:
    assert reachable("tcp://0.0.0.0:5555") == "tcp://127.0.0.1:5555"
    assert reachable("tcp://[::]:5555") == "tcp://[::1]:5555"
    assert reachable("tcp://10.0.0.1:5555") == "tcp://10.0.0.1:5555"


# Real kernels: hangs


@pytest.mark.slow
@pytest.mark.parametrize(("wedge", "stands"), [(SLEEPS, "in wedge"), (GROWS_DEAF, "in select")])
async def test_a_kernel_that_answers_no_more_is_started_again(
    kept: Kept, tmp_path: Path, wedge: str, stands: str
) -> None:
    """A blocked event loop, and a bridge that nobody reads from while the loop goes on."""
    kept.start(kernel_file(tmp_path, wedge), hang_timeout="6", startsecs="1", start_timeout="30")
    first = kept.running()
    os.kill(first, signal.SIGUSR2)
    second = await asyncio.to_thread(kept.live, 2)
    assert second != first
    assert not is_alive(first)
    assert re.search(rf"Fatal Python error: Aborted[^ψ]*{stands}", kept.log)  # where its threads stood
    async with kept.kernel.client() as kernel:
        assert await kernel.send("genesis_obj", "square", 4) == 16
    assert any(re.fullmatch(r"the kernel hung \(no heartbeat for \d s\)", why) for why in kept.stop())


@pytest.mark.slow
@linux
async def test_a_stopped_kernel_is_killed_and_comes_back(kept: Kept) -> None:
    kept.start(hang_timeout="6", startsecs="1", start_timeout="30")
    first = kept.running()
    theirs = descendants(first)
    assert theirs
    os.kill(first, signal.SIGSTOP)
    await asyncio.to_thread(kept.live, 2)
    wait_until(lambda: not any(map(is_alive, {first, *theirs})))
    assert kept.stop()[-1] == "the kernel ended (exit status 0)"


# Real kernels: kills, and what is left


@pytest.mark.slow
@linux
@pytest.mark.parametrize("victim", ["kernel", "watchdog"])
async def test_nothing_is_left_of_what_was_killed_and_the_mission_goes_on(kept: Kept, victim: str) -> None:
    """In the middle of a generation; after the watchdog's death the next one is started at once."""
    watchdog = kept.start()
    first = kept.live()
    async with kept.kernel.client() as kernel:
        await kernel.teach("genesis_obj", "slow_square", ["x"], wait=False)
    await until(lambda: len(thoughts(kept.kernel, "prompt")) == 2)
    before = {first, *descendants(first)}
    assert len(before) > 1
    os.kill(first if victim == "kernel" else watchdog.pid, signal.SIGKILL)
    if victim == "watchdog":
        watchdog.wait()
        kept.start()
    await asyncio.to_thread(kept.live, 2)
    wait_until(lambda: not any(map(is_alive, before)))
    assert "Missions taken up from the journal: 1" in kept.log
    assert "FATAL" not in [move["to"] for move in kept.moves]
    second = kept.pid
    theirs = descendants(second)
    assert kept.stop()[-1] == "the kernel ended (exit status 0)"
    wait_until(lambda: not any(map(is_alive, {second, *theirs})))


@pytest.mark.slow
@linux
def test_no_hand_has_the_lifeline_or_the_lock(kept: Kept) -> None:
    kept.start()
    pid = kept.live()
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    number = next(line.partition("=")[2] for line in variables if line.startswith("BATOS_WATCHDOG_FD="))
    held = {os.readlink(f"/proc/{pid}/fd/{number}"), str(kept.run / "kernel.pid")}
    assert held <= links(pid)
    theirs = descendants(pid)
    assert len(theirs) > 1  # the zygote and its spares
    try:
        assert all(not held & links(child) for child in theirs)
    except PermissionError:
        pytest.skip("only root may look into hands")
    kept.stop()


def links(pid: int) -> set[str]:
    """What the descriptors of a process lead to; none of one that has just ended."""
    found: set[str] = set()
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            found.add(os.readlink(descriptor))
    except FileNotFoundError:
        pass
    return found


# Real kernels: stops


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_bare_kernel_ends_in_good_order_in_the_middle_of_a_generation(
    start_kernel: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS]))
    async with process.client() as kernel:
        await kernel.teach("genesis_obj", "slow_square", ["x"], wait=False)
    await until(lambda: len(thoughts(process, "prompt")) == 2)
    assert process.process is not None
    process.process.send_signal(number)
    assert await asyncio.to_thread(process.process.wait, 60) == 0
    assert process.log.count("[UVM] Shutting down...") == 1
    assert process.log.count("Ctrl-C again") == (number is signal.SIGINT)
    assert "Not everything ended" not in process.log
    assert "Traceback" not in process.log
    assert await open_missions(process) == [("queued", 1)]


@pytest.mark.slow
@linux
def test_a_kernel_whose_terminal_is_closed_ends_in_good_order(tmp_path: Path) -> None:
    """It hears SIGHUP, and every line that it prints from then on is an error."""
    kernel = KernelProcess(tmp_path / "home", scripted(tmp_path, []))
    command = [sys.executable, str(PROJECT / "batos.py")]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, kernel.environment)
    shown = b""
    while LIVE.encode() not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    ended = [0, 0]

    def has_ended() -> bool:
        ended[:] = os.waitpid(pid, os.WNOHANG)
        return ended[0] == pid

    wait_until(has_ended)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    asyncio.run(open_missions(kernel))  # nobody has the image open


def bare(kept: Kept, file: Path) -> subprocess.Popen[bytes]:
    """Starts a kernel without a watchdog; it prints where a watchdog would have it print."""
    kept.run.mkdir(parents=True)
    with (kept.run / "kernel.log").open("ab") as out:
        kept.started.append(
            subprocess.Popen([sys.executable, file], env=kept.kernel.environment, stdout=out, stderr=out)
        )
    wait_until(lambda: LIVE in kept.log)
    return kept.started[-1]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_bare_kernel_at_once(kept: Kept, tmp_path: Path) -> None:
    """The first can't be obeyed to the end: a thread of the default executor does not return."""
    process = bare(kept, kernel_file(tmp_path, LEAVES_A_THREAD))
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "begun" in kept.log)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "Shutting down..." in kept.log)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert "Not everything ended" not in kept.log


@pytest.mark.slow
def test_a_thread_that_does_not_return_can_not_delay_the_end_for_ever(kept: Kept, tmp_path: Path) -> None:
    file = kernel_file(tmp_path, LEAVES_A_THREAD, before="batos.SHUTDOWN_S = 1.0")
    process = bare(kept, file)
    process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "begun" in kept.log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Not everything ended within 1 s; the kernel ends without it" in kept.log


@pytest.mark.slow
def test_sigusr1_shows_where_a_kernel_stands(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    os.kill(process.pid, signal.SIGUSR1)
    wait_until(lambda: 'File "' in process.log and "in main" in process.log)
    assert process.stop() == 0


@pytest.mark.slow
async def test_a_shut_down_kernel_stays_down(kept: Kept) -> None:
    watchdog = kept.start()
    kept.live()
    async with kept.kernel.client() as kernel:
        await kernel.request("shutdown")
    assert await asyncio.to_thread(watchdog.wait, 60) == 0
    assert kept.moves[-1]["why"] == "the kernel was shut down"


# Safe mode


@pytest.mark.slow
async def test_in_safe_mode_missions_wait_and_everything_else_works(
    start_kernel: Start, tmp_path: Path
) -> None:
    lines = [
        STALLS,
        *writes("slow_square", SLOW_SQUARE),
        *writes("square", "def square(self, x): return x * x"),
    ]
    process = start_kernel(scripted(tmp_path, lines))
    async with process.client() as kernel:
        assert (await kernel.request("status"))["safe_mode"] is False
        await kernel.teach("genesis_obj", "slow_square", ["x"], wait=False)
    await until(lambda: len(thoughts(process, "prompt")) == 2)
    process.kill()
    scripted(tmp_path, lines[1:])  # from now on the model answers
    process.environment["BATOS_SAFE_MODE"] = "true"
    process.start()
    told = [line for line in process.log.splitlines() if "Safe mode" in line]
    assert told == [
        "[UVM] Safe mode: nothing starts by itself; missions that wait in the journal: 1. To leave it: "
        "./puter.sh stop, then ./puter.sh (without BATOS_SAFE_MODE)"
    ]
    async with process.client() as kernel:
        status = await kernel.request("status")
        assert (status["safe_mode"], status["open_missions"]) == (True, 1)
        assert await kernel.send("genesis_obj", "square", 4) == 16
        assert (await kernel.request("status"))["open_missions"] == 1
    assert process.stop() == 0
    del process.environment["BATOS_SAFE_MODE"]
    process.start()
    assert "Missions taken up from the journal: 1" in process.log
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "slow_square", 4) == 16


@pytest.mark.slow
async def test_three_fast_crashes_lead_to_a_kernel_in_safe_mode(kept: Kept, tmp_path: Path) -> None:
    file = kernel_file(tmp_path, before="if not os.environ.get('BATOS_SAFE_MODE'): os._exit(3)")
    kept.start(file, backoff="0.05")
    await asyncio.to_thread(kept.live)
    async with kept.kernel.client() as kernel:
        assert (await kernel.request("status"))["safe_mode"] is True
    whys = kept.stop()
    assert whys.count("the kernel crashed (exit status 3)") == 3


# A real model


def began(record: dict[str, Any]) -> float:
    """When a record of the log was written, in Unix seconds."""
    return datetime.fromisoformat(record["ts"]).timestamp()


@pytest.mark.slow
@pytest.mark.model
async def test_a_long_generation_is_no_hang_and_a_stop_in_it_is_orderly(tmp_path: Path) -> None:
    hang_s = 6
    model = "qwen2.5-coder-1.5b-instruct-q4_k_m"
    kept = Kept(
        tmp_path / "home",
        {
            "PERSONA_MODELS": json.dumps(dict.fromkeys(PERSONAS, model)),
            "SENTENCE_TRANSFORMER_MODEL": "hashing",
            "MAX_SYNTHESIS_TOKENS": "3000",
        },
    )
    watchdog = kept.start(hang_timeout=str(hang_s))
    try:
        pid = await asyncio.to_thread(kept.live)
        async with kept.kernel.client() as kernel:
            await kernel.teach(
                "genesis_obj",
                "essay",
                type="task",
                description="Write the numbers from one to one thousand as words, each on a line of its own, "
                "and stop only after one thousand.",
                wait=False,
            )
        await until(lambda: thoughts(kept.kernel, "prompt"))
        async with asyncio.timeout(300):
            while True:  # until one single generation has lasted longer than three hang timeouts
                prompts, replies = (thoughts(kept.kernel, event) for event in ("prompt", "reply"))
                writing = len(prompts) > len(replies)
                if writing and time.time() - began(prompts[-1]) > 3 * hang_s + 1:
                    break
                await asyncio.sleep(0.1)
        assert kept.pid == pid
        assert is_alive(pid)
        watchdog.terminate()
        assert await asyncio.to_thread(watchdog.wait, 60) == 0
        assert kept.moves[-1]["why"] == "the kernel ended (exit status 0)"
        assert [move["to"] for move in kept.moves] == ["STARTING", "RUNNING", "STOPPING", "STOPPED"]
        assert "Not everything ended" not in kept.log
        assert await open_missions(kept.kernel) == [("queued", 1)]
    finally:
        watchdog.kill()
        watchdog.wait()
