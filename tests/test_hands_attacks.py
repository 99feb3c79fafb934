"""Hands under attack: limits, forged frames, killed processes; and what is told of a method that fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.garden import Garden, children, gone, state_of, until, zombies
from uvm.codec import encode
from uvm.errors import (
    DoesNotUnderstand,
    HandDied,
    HandOutOfMemory,
    HandOutputTooLarge,
    HandTimeout,
    HomeError,
    MethodRaised,
    QueueFull,
    SandboxTooWeak,
    ShuttingDown,
    ValueNotStorable,
)
from uvm.hands import sandbox, zygote
from uvm.hands.calls import Call, Outcome
from uvm.hands.frames import LENGTH, pack
from uvm.hands.pool import HandPool

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).resolve().parents[1]
OUTPUT_BYTES = 1 << 20
WALLS = ("seccomp", "landlock", "namespaces")
NO_NAMESPACES = (
    "import sys; sys.path.insert(0, sys.argv[1]); from uvm.hands import linux; "
    "linux.leave_namespaces = lambda: linux._demand(-1, 'unshare')"
)
FINE = "def fine(self):\n    return 'fine'"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[HandPool]:
    pool = HandPool(count=2, timeout_s=30.0, memory_mib=128, output_bytes=OUTPUT_BYTES)
    await pool.start()
    yield pool
    await pool.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def unwalled() -> AsyncIterator[Garden]:
    """Hands without the walls that would stop a method before it can do what a test wants to see ended."""
    without = (*WALLS, "descriptors", "processes")
    pool = HandPool(
        count=2,
        timeout_s=30.0,
        memory_mib=128,
        output_bytes=OUTPUT_BYTES,
        allow_weak=True,
        without=without,
    )
    await pool.start()
    yield Garden(pool)
    await pool.close()


@pytest.fixture
def garden(pool: HandPool) -> Garden:
    return Garden(pool)


# What goes wrong


def zygote_of(pool: HandPool) -> int:
    """Returns the pid of the process that makes the hands; any other number would hit strangers."""
    assert pool.zygote_pid is not None
    return pool.zygote_pid


ODD = """def f(self):
    class Odd(Exception):
        def __str__(self):
            raise ValueError
    raise Odd"""


async def test_an_exception_tells_the_lines_it_went_through(garden: Garden) -> None:
    parts = "def part(self, x):\n    # a comment\n    return [1 / i for i in x]"
    oid = garden.plant("it", "def whole(self, x):\n    return self.part(x)", parts)
    with pytest.raises(MethodRaised, match="whole raised ZeroDivisionError: division by zero") as caught:
        await garden.send(oid, "whole", [1, 0])
    assert caught.value.details == {
        "exception": "ZeroDivisionError",
        "selector": "whole",
        "traceback": [
            "whole line 2: return self.part(x)",
            "part line 3: return [1 / i for i in x] (2 times)",
        ],
    }


@pytest.mark.parametrize(
    ("source", "exception"),
    [
        ("def f(self):\n    return self.f()", "RecursionError"),
        ("def f(self, n=0):\n    return self.g(n)\n", "DoesNotUnderstand"),
        ("def f(self):\n    raise SystemExit(3)", "SystemExit"),
        ("def f(self):\n    raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(self):\n    raise ExceptionGroup('g', [ValueError(1)])", "ExceptionGroup"),
        ("def f(self):\n    return open('/etc/passwd').read()", "NameError"),
        ("def f(self):\n    return eval('1')", "NameError"),
        ("def f(self):\n    import os\n    return os.getpid()", "ImportError"),
        ("def f(self):\n    import uvm.errors", "ImportError"),
        ("def f(self, x):\n    pass", "TypeError"),
        ("def f(self:\n", "SyntaxError"),
        ("f = 1  # def f", "NameError"),
        (ODD, "Odd"),
        ("def f(self):\n    import random\n    random._os.open('/etc/passwd', 0)", "PermissionError"),
        ("def f(self):\n    import random\n    random._os.pipe()", "PermissionError"),
    ],
)
async def test_exceptions_are_told_by_name(garden: Garden, source: str, exception: str) -> None:
    with pytest.raises((MethodRaised, DoesNotUnderstand)) as caught:
        await garden.do(source)
    assert caught.value.details.get("exception", type(caught.value).__name__) == exception


@pytest.mark.parametrize(
    ("expression", "kind", "path"),
    [
        ("(i for i in [1])", "generator", "the result"),
        ("[1, {'a': lambda: 1}]", "function", "the result[1]['a']"),
        ("self.f", "method", "the result"),
        ("[self, self.f]", "method", "the result[1]"),
        ("__import__('collections').Counter('aa')", "Counter", "the result"),
        ("object()", "object", "the result"),
    ],
)
async def test_a_result_that_is_no_data(garden: Garden, expression: str, kind: str, path: str) -> None:
    with pytest.raises(ValueNotStorable, match=f"a {kind} is not plain data") as caught:
        await garden.do(f"def f(self):\n    return {expression}")
    assert caught.value.details == {"path": path, "type": kind}


async def test_a_kept_slot_that_is_no_data(garden: Garden) -> None:
    source = "def f(self):\n    self.items = [1, map(str, [1])]\n    self._p_changed = True"
    with pytest.raises(ValueNotStorable, match=r"it\.items\[1\]: a map is not plain data"):
        await garden.do(source)


async def test_a_value_that_holds_itself(garden: Garden) -> None:
    with pytest.raises(ValueNotStorable, match="deeper"):
        await garden.do("def f(self):\n    x = []\n    x.append(x)\n    return x")


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n        pass",
        "while True:\n        try:\n            self.f()\n        except BaseException:\n            pass",
        "import time\n    time.sleep(3600)",
        "import re\n    return re.match('(a+)+$', 'a' * 64 + 'b')",
        "return sum(range(10**12))",
        "import random\n    random._os.close(3)\n    while True:\n        pass",
    ],
)
async def test_what_takes_too_long_ends(pool: HandPool, garden: Garden, body: str) -> None:
    oid = garden.plant("it", f"def f(self):\n    {body}")
    with pytest.raises((HandTimeout, HandDied), match=r"f ran longer than 0\.3 s|killed by SIGKILL"):
        await pool.run(Call(oid, "f", [], {}), garden, timeout_s=0.3)


async def test_cpu_time_is_limited_too(unwalled: Garden) -> None:
    with pytest.raises(HandTimeout, match="CPU"):
        await unwalled.do("def f(self):\n    import random\n    random._os.kill(random._os.getpid(), 24)")


@pytest.mark.parametrize(
    "body",
    [
        "return bytearray(1 << 40)",
        "x = []\n    while True:\n        x.append(bytearray(1 << 20))",
        "x = 'x'\n    while True:\n        x += x",
        "x = {}\n    while True:\n        x[len(x)] = [len(x)]",
        "self.items = []\n    self._p_changed = True\n    while True:\n        self.items.append(object())",
        "return ['x' * 1000] * 100_000_000",
    ],
)
async def test_memory_bombs_end(garden: Garden, body: str) -> None:
    with pytest.raises(HandOutOfMemory, match="128 MiB"):
        await garden.do(f"def f(self):\n    {body}")


async def test_output_bombs_end(garden: Garden) -> None:
    with pytest.raises(HandOutputTooLarge):
        await garden.do(f"def f(self):\n    return 'x' * {2 * OUTPUT_BYTES}")
    assert (
        len((await garden.do(f"def f(self):\n    return 'x' * {OUTPUT_BYTES - 1000}")).result)
        == OUTPUT_BYTES - 1000
    )


@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("_exit(0)", "left with status 0"),
        ("_exit(7)", "left with status 7"),
        ("abort()", "killed by SIGABRT"),
        ("kill(random._os.getpid(), 9)", "killed by SIGKILL"),
        ("kill(random._os.getpid(), 40)", "killed by signal 40"),
        ("close(3)", "broke|left|killed"),
    ],
)
async def test_a_process_that_ends_without_an_answer(unwalled: Garden, act: str, told: str) -> None:
    with pytest.raises(HandDied, match=told):
        await unwalled.do(f"def f(self):\n    import random\n    random._os.{act}")


async def test_forks_do_not_outlive_the_call(unwalled: Garden) -> None:
    source = """def f(self):
    import random
    pid = random._os.fork()
    while pid == 0:
        pass
    return pid"""
    pid = (await unwalled.do(source)).result
    assert pid > 1
    await until(lambda: gone(pid), "the fork is gone")


# What a hand forges


EMPTY = {"result": encode(1), "writes": {}, "created": [], "discarded": {}, "printed": ""}
FORGERIES = {
    "noise": b"\x00\x00\x00\x04abcd",
    "a cut frame": pack("returned", EMPTY)[:-1],
    "a second frame": pack("returned", EMPTY) * 2,
    "no kind": LENGTH.pack(1) + encode({}),
    "two kinds": LENGTH.pack(len(encode({"a": 1, "b": 2}))) + encode({"a": 1, "b": 2}),
    "an unknown kind": pack("granted", None),
    "the answer to another job": pack("audited", {}),
    "ready again": pack("ready", None),
    "a key too few": pack("returned", {"result": encode(1)}),
    "a key too many": pack("returned", EMPTY | {"more": 1}),
    "a wrong type": pack("returned", EMPTY | {"printed": b""}),
    "a result that is no value": pack("returned", EMPTY | {"result": b"\xc1"}),
    "a write to an object it never saw": pack("returned", EMPTY | {"writes": {"00000000000000ff": [{}, []]}}),
    "a write to no object": pack("returned", EMPTY | {"writes": {"new:1": [{}, []]}}),
    "a private slot": pack("returned", EMPTY | {"writes": {f"{1:016x}": [{"_x": encode(1)}, []]}}),
    "a slot that is no value": pack("returned", EMPTY | {"writes": {f"{1:016x}": [{"x": 1}, []]}}),
    "a number as slot": pack("returned", EMPTY | {"writes": {f"{1:016x}": [{1: encode(1)}, []]}}),
    "an orphan": pack("returned", EMPTY | {"created": [["new:1", "x", []]]}),
    "a foundling": pack("returned", EMPTY | {"created": [["new:1", "x", ["00000000000000ff"]]]}),
    "an object out of order": pack("returned", EMPTY | {"created": [["new:2", "x", [f"{1:016x}"]]]}),
    "an object named like an oid": pack(
        "returned", EMPTY | {"created": [["new:1", "a" * 16, [f"{1:016x}"]]]}
    ),
    "too much print": pack("returned", EMPTY | {"printed": "x" * 70_000}),
    "a strange miss": pack(
        "missed",
        {"message": "", "target": "00000000000000ff", "selector": "x", "parameters": None, "call": None},
    ),
    "a strange exception": pack("raised", {"message": 1, "exception": "", "traceback": [], "selector": ""}),
    "a question for what it has": pack("view", f"{1:016x}"),
    "a question for nothing": pack("view", 7),
    "a question for no slot": pack("slot", [f"{1:016x}", "x"]),
    "a question for no name": pack("taken", 1),
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
async def test_a_forged_frame_is_the_end_of_the_call(garden: Garden, forgery: bytes) -> None:
    source = "def f(self, frame):\n    import random\n    random._os.write(3, frame)\n    random._os._exit(0)"
    with pytest.raises(HandDied):
        await garden.do(source, forgery)


async def test_an_announcement_larger_than_allowed_is_not_waited_for(garden: Garden) -> None:
    body = "import random\n    random._os.write(3, b'\\xff' * 4)\n    while True:\n        pass"
    with pytest.raises(HandOutputTooLarge):
        await garden.do(f"def f(self):\n    {body}")


async def test_endless_questions_end(garden: Garden) -> None:
    with pytest.raises(HandDied, match="10000 questions"):
        await garden.do("def f(self):\n    for n in range(20_000):\n        self.clone(f'n{n}')")


# What surrounds the hands


async def test_a_hand_holds_nothing_of_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATOS_SECRET", "open sesame")
    pool = HandPool(count=1, timeout_s=5.0, memory_mib=128, allow_weak=True, without=WALLS)
    source = """def f(self):
    import random
    os, modules = random._os, random._os.sys.modules
    held = {}
    for fd in range(1024):
        try:
            held[fd] = os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
        except OSError:
            pass
    tops = sorted({name.partition(".")[0] for name in modules})
    return dict(os.environ), held, os.getcwd(), tops"""
    with (tmp_path / "secret").open("w"):
        await pool.start()
        environment, held, folder, modules = (await Garden(pool).do(source)).result
        await pool.close()
    assert environment.keys() <= {"LC_CTYPE", "LD_BIND_NOW"}
    assert held == {0: "/dev/null", 1: "/dev/null", 2: "/dev/null", 3: "socket"}
    assert folder == "/"
    assert not {"ZODB", "torch", "pydantic", "asyncio", "zmq", "subprocess", "numpy"} & set(modules)


async def test_the_layers_are_tried_out_and_told(pool: HandPool) -> None:
    missing = {name for name, holds in pool.layers.items() if not holds}
    assert pool.layers.keys() == set(sandbox.NAMES)
    assert missing <= {"namespaces", "landlock"}  # which some systems forbid
    assert pool.tier == ("B" if missing else "A")


# Without `no_new_privileges` the system lets nobody install a filter.
@pytest.mark.parametrize("layer", [name for name in sandbox.NAMES if name != "no_new_privileges"])
async def test_a_layer_left_out_is_seen_to_be_missing(pool: HandPool, layer: str) -> None:
    lesser = HandPool(count=1, timeout_s=5.0, memory_mib=128, allow_weak=True, without=[layer])
    await lesser.start()
    try:
        missing = {name for name, holds in lesser.layers.items() if not holds}
        missing -= {name for name, holds in pool.layers.items() if not holds and name != layer}
        expected = {layer}
        if os.getuid() == 0:  # the limit on processes holds for no root; a change of user forbids to look
            expected = {"unprivileged": {layer, "processes"}, "not_dumpable": set()}.get(layer, {layer})
        assert missing == expected
        assert lesser.tier == sandbox.tier(lesser.layers)
        assert (await Garden(lesser).do(FINE)).result == "fine"
    finally:
        await lesser.close()


async def test_a_layer_that_held_must_hold_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HandPool(count=1, timeout_s=5.0, memory_mib=128)
    await pool.start()
    try:
        # What a zygote refuses when it is told to require what it can't have.
        pool._stock.limits = replace(pool._stock.limits, required=("namespaces", "landlock"))
        monkeypatch.setattr(zygote, "_BOOT", f"{NO_NAMESPACES}; {zygote._BOOT}")
        workers = children(zygote_of(pool))
        os.kill(zygote_of(pool), signal.SIGKILL)
        await until(lambda: all(map(gone, workers)), "the first workers are gone")
        with pytest.raises(HandDied, match="could not be locked down: OSError"):
            await Garden(pool).do(FINE)
        with pytest.raises(HandDied, match="could not be locked down: OSError"):
            await Garden(pool).do(FINE)
    finally:
        await pool.close()


async def test_without_a_sandbox_nothing_generated_runs() -> None:
    pool = HandPool(count=1, timeout_s=5.0, memory_mib=128, without=["seccomp"])
    await pool.start()
    try:
        with pytest.raises(SandboxTooWeak, match="ALLOW_WEAK_SANDBOX"):
            await Garden(pool).do(FINE)
        assert (await pool.audit(FINE, "fine", [])).ok
    finally:
        await pool.close()


async def test_the_guardian_works_in_a_hand(pool: HandPool) -> None:
    audit = await pool.audit("def f(self):\n    self.n = 1\n", "f", [])
    assert audit.ok
    assert "self._p_changed = True" in audit.source
    assert [finding.rule for finding in audit.findings] == ["covenant"]
    audit = await pool.audit("import os\ndef f(self, x):\n    return os\n", "f", ["x"])
    assert not audit.ok
    assert not (await pool.audit("-" * 50_000, "f", None)).ok


async def test_calls_wait_their_turn_and_too_many_are_refused() -> None:
    pool = HandPool(count=1, timeout_s=30.0, memory_mib=128, waiting=2)
    await pool.start()
    calls = [Garden(pool).do("def f(self):\n    return 1") for _ in range(5)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    await pool.close()
    assert sum(isinstance(outcome, Outcome) for outcome in outcomes) == 3
    assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 2


async def test_a_cancelled_call_kills_its_worker(pool: HandPool, garden: Garden) -> None:
    kills = pool.kills
    task, worker, _ = await garden.hang()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: gone(worker), "the worker is gone")
    assert pool.kills == kills + 1


async def test_a_zygote_that_dies_is_replaced(pool: HandPool, garden: Garden) -> None:
    restarts = pool.restarts
    task, worker, zygote = await garden.hang()
    workers = children(zygote)
    assert worker in workers
    os.kill(zygote, signal.SIGKILL)
    with pytest.raises(HandDied, match="the process that makes the hands died"):
        await task
    assert (await garden.do(FINE)).result == "fine"
    assert pool.zygote_pid != zygote
    assert pool.restarts == restarts + 1
    await until(lambda: all(map(gone, workers)), "its workers are gone")


async def test_a_zygote_that_dies_unseen_is_replaced(pool: HandPool, garden: Garden) -> None:
    zygote = zygote_of(pool)
    workers = children(zygote)
    os.kill(zygote, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not all(map(gone, workers)):  # without a turn for the loop, which would tell the pool
        assert time.monotonic() < deadline
    assert (await garden.do(FINE)).result == "fine"
    assert pool.zygote_pid != zygote


async def test_a_zygote_that_is_killed_during_the_start_is_replaced() -> None:
    pool = HandPool(count=1, timeout_s=30.0, memory_mib=128)
    start = asyncio.create_task(pool.start())
    await until(lambda: pool.zygote_pid is not None, "there is a zygote")
    zygote = zygote_of(pool)
    os.kill(zygote, signal.SIGKILL)
    await start
    assert pool.zygote_pid != zygote
    assert (await Garden(pool).do(FINE)).result == "fine"
    await pool.close()


async def test_an_audit_whose_hand_is_killed_is_done_again(pool: HandPool) -> None:
    source = "def long(self):\n" + "    x = [1, 2, (3, 4)]\n" * 2800 + "    return x\n"
    spares = children(zygote_of(pool))
    audit = asyncio.create_task(pool.audit(source, "long", []))
    running: set[int] = set()
    while not running and not audit.done():
        running = {pid for pid in spares if state_of(pid) == "R"}
        await asyncio.sleep(0)
    assert running
    for pid in running:
        assert pid > 1
        os.kill(pid, signal.SIGKILL)
    assert not (await audit).findings
    assert all(map(gone, running))


async def test_spares_that_die_are_given_no_call(pool: HandPool, garden: Garden) -> None:
    zygote = zygote_of(pool)
    for pid in children(zygote):
        os.kill(pid, signal.SIGKILL)
    assert (await garden.do(FINE)).result == "fine"
    assert pool.zygote_pid == zygote


async def test_closing_leaves_no_process_and_ends_calls() -> None:
    pool = HandPool(count=2, timeout_s=60.0, memory_mib=128)
    await pool.start()
    task, worker, zygote = await Garden(pool).hang()
    processes = children(zygote) | {zygote}
    assert worker in processes
    await pool.close()
    with pytest.raises(ShuttingDown):
        await task
    assert all(map(gone, processes))
    with pytest.raises(ShuttingDown):
        await Garden(pool).do(FINE)


KERNEL = """
import asyncio, sys
sys.path.insert(0, {root!r})
from tests.garden import Garden
from uvm.hands import sandbox, zygote
from uvm.hands.pool import HandPool

async def main():
    pool = HandPool(count=2, timeout_s=60.0, memory_mib=128)
    await pool.start()
    task, worker, zygote = await Garden(pool).hang()
    print(worker, zygote, flush=True)
    await task

asyncio.run(main())
"""


async def test_nothing_outlives_a_kernel_that_is_killed() -> None:
    script = KERNEL.format(root=str(ROOT))
    kernel = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert kernel.stdout is not None
    worker, zygote = map(int, (await kernel.stdout.readline()).split())
    processes = children(zygote) | {zygote}
    assert worker in processes
    kernel.kill()
    await kernel.wait()
    await until(lambda: all(map(gone, processes)), "zygote and workers are gone")


async def test_many_calls_leak_nothing(pool: HandPool, garden: Garden) -> None:
    zygote = zygote_of(pool)
    stock = pool._stock
    await until(lambda: len(stock._spares) == pool.spares and not stock._done, "all spares are there")
    await until(lambda: len(children(zygote)) == pool.spares, "only the spares are there")
    before = len(os.listdir("/proc/self/fd"))
    calls = [garden.do(FINE if n % 10 else "def f(self):\n    return self.nothing") for n in range(200)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, MethodRaised) for outcome in outcomes) == 20
    assert {outcome.result for outcome in outcomes if isinstance(outcome, Outcome)} == {"fine"}
    await until(lambda: len(children(zygote)) == pool.spares, "only the spares are left")
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before, "no descriptor is left over")
    assert not zombies(zygote)


async def test_a_sandbox_that_can_not_be_made_stops_the_start() -> None:
    pool = HandPool(count=1, timeout_s=1.0, memory_mib=1 << 60)
    with pytest.raises(HomeError, match="could not be locked down: OverflowError"):
        await pool.start()
    with pytest.raises(ShuttingDown):
        await Garden(pool).do(FINE)


async def test_a_platform_without_fork_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(HomeError, match="fork"):
        await HandPool(count=1, timeout_s=1.0, memory_mib=64).start()
