"""`python -m bench dispatch`: what a message costs beside a bare ZeroMQ echo and a bare ZODB commit.

The kernel, the echo and the bare commits run alternately in the same minutes on the same machine, so that
what the machine does meanwhile falls on all of them. Back to back, the making of hands for the calls to come
competes with the call under way for the processors; one call at a time with a pause, as a person or a script
sends them, finds its hand ready.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import transaction
import zmq
import zmq.asyncio
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from bench.figures import Figure, percentile
from evals.kernels import free_endpoint, running
from uvm.client import Kernel
from uvm.image.prototypes import UvmObject

ROUNDS = 8
MESSAGES = 150  # of each kind in a round
CLIENTS = 4
PAUSE_S = 0.02  # between messages sent one at a time
PACED = 40  # of them in a round
TARGET = "genesis_obj"
SOURCES = {
    "square": "def square(self, x):\n    return x * x\n",
    "increment": (
        "def increment(self):\n"
        "    self.count = (self.count if hasattr(self, 'count') else 0) + 1\n"
        "    self._p_changed = True\n"
        "    return self.count\n"
    ),
}
ECHO = """
import asyncio, sys, zmq, zmq.asyncio
async def main():
    socket = zmq.asyncio.Context().socket(zmq.ROUTER)
    socket.bind(sys.argv[1])
    print("ready", flush=True)
    while True:
        await socket.send_multipart(await socket.recv_multipart())
asyncio.run(main())
"""


async def run() -> list[Figure]:
    """Measures and returns the figures."""
    with tempfile.TemporaryDirectory(prefix="batos-bench-") as folder:
        home = Path(folder)
        async with running(home / "kernel", scripted(home)) as kernel, _Echo() as echo:
            await kernel.teach(TARGET, "square", ["x"], "Return x times x.")
            await kernel.teach(TARGET, "increment", [], "Count.")
            return await _measure(kernel, echo, home / "bare.fs")


def scripted(folder: Path) -> dict[str, str]:
    """Returns settings for a kernel whose personas recite the two methods of this bench."""
    script = folder / "script.json"
    rules = [
        {"pattern": f"Write `def {name}", "reply": f"```python\n{code}```"} for name, code in SOURCES.items()
    ]
    script.write_text(json.dumps([*rules, {"pattern": None, "reply": '{"queries": ["arithmetic"]}'}]))
    personas = ("ALFRED", "BRICK", "ROBIN", "BABS")
    return {"PERSONA_MODELS": json.dumps(dict.fromkeys(personas, f"scripted:{script}"))}


async def _measure(kernel: Kernel, echo: _Echo, bare_file: Path) -> list[Figure]:
    async def read() -> None:
        await kernel.send(TARGET, "square", 12)

    async def write() -> None:
        await kernel.send(TARGET, "increment")

    timed: dict[str, list[float]] = defaultdict(list)
    rates: list[float] = []
    with BareImage(bare_file) as bare:
        for _ in range(ROUNDS):
            timed["read"] += await _times(read, MESSAGES)
            timed["echo"] += await _times(echo.round_trip, MESSAGES)
            timed["paced"] += await _times(read, PACED, PAUSE_S)
            timed["paced echo"] += await _times(echo.round_trip, PACED, PAUSE_S)
            timed["write"] += await _times(write, MESSAGES // 3)
            timed["commit"] += await _times(bare.commit, MESSAGES // 3)
            rates.append(await rate([read] * CLIENTS, MESSAGES))
    p50 = {name: percentile(times, 50) * 1000 for name, times in timed.items()}
    p95 = {name: percentile(times, 95) * 1000 for name, times in timed.items()}

    def figure(name: str, figures: dict[str, float], one: str, raw: str) -> Figure:
        return Figure(name, figures[one], "ms", figures[raw], figures[one] / figures[raw])

    return [
        figure("reading message, one at a time, p50", p50, "paced", "paced echo"),
        figure("reading message, one at a time, p95", p95, "paced", "paced echo"),
        figure("reading message, back to back, p50", p50, "read", "echo"),
        figure("reading message, back to back, p95", p95, "read", "echo"),
        figure("mutating message, back to back, p50", p50, "write", "commit"),
        Figure(f"reading messages, {CLIENTS} at once", statistics.median(rates), "1/s", None, None),
    ]


async def _times(work: Callable[[], Awaitable[object]], count: int, pause_s: float = 0.0) -> list[float]:
    times = []
    for _ in range(count):
        if pause_s:
            await asyncio.sleep(pause_s)
        started = time.perf_counter()
        await work()
        times.append(time.perf_counter() - started)
    return times


async def rate(clients: Sequence[Callable[[], Awaitable[object]]], count: int) -> float:
    """Returns how many times a second clients do their work, all at once, `count` times in all."""
    started = time.perf_counter()
    await asyncio.gather(*(_times(work, count // len(clients)) for work in clients))
    return count / (time.perf_counter() - started)


class _Echo:
    """The raw limit of a round trip: an asyncio ROUTER in another process that sends back what it gets."""

    async def __aenter__(self) -> _Echo:
        endpoint = free_endpoint()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ECHO, endpoint, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        await self._process.stdout.readline()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._context.destroy(linger=0)
        self._process.kill()
        await self._process.wait()

    async def round_trip(self) -> None:
        await self._socket.send(b"x" * 100)
        await self._socket.recv()


class BareImage:
    """The raw limit of a mutating message: one attribute changed and committed by ZODB alone."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> BareImage:
        self._db = DB(FileStorage(str(self._path)))
        self._manager = transaction.TransactionManager(explicit=True)
        self._connection = self._db.open(self._manager)
        self._manager.begin()
        self._thing = self._connection.root()["thing"] = UvmObject("thing", (), {"count": 0})
        self._manager.commit()
        return self

    def __exit__(self, *_: Any) -> None:
        self._connection.close()
        self._db.close()

    async def commit(self) -> None:
        self._manager.begin()
        self._thing.count += 1
        self._manager.commit()
