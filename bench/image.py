"""`python -m bench image`: what the living image costs beside bare ZODB, and what its size costs.

Commits per second over the wire beside bare ZODB commits; time until live and memory of kernels whose images
hold 1,000 to 1,000,000 objects, beside the smallest; backup and restore, which read every object to verify
it, beside ZODB's bare `repozo`. Takes about ten minutes, most of them to make the large image.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from bench.dispatch import BareImage, rate, scripted
from bench.figures import Figure, beside
from evals.kernels import PROJECT, KernelProcess
from uvm.client import Kernel

ROUNDS = 5
MESSAGES = 600  # of each kind in a round
SIZES = (1_000, 100_000, 1_000_000)
STARTS = 3
PAGE = 1000
COPIED = 100_000  # objects of the image that is backed up
IMAGE = "live_image.fs"
REPOZO = "ZODB.scripts.repozo"


async def run() -> list[Figure]:
    """Measures and returns the figures."""
    with tempfile.TemporaryDirectory(prefix="batos-bench-") as folder:
        home = Path(folder)
        figures = await _commits(home)
        for size in SIZES:
            place = home / f"{size}"
            place.mkdir()
            await asyncio.to_thread(_python, "-m", "bench.images", str(place / IMAGE), f"{size}")
        return figures + await _sizes(home) + await asyncio.to_thread(_copies, home)


def _python(*arguments: str, **environment: str) -> None:
    """Runs Python in a process of its own, whose memory is not the bench's."""
    command, quiet = [sys.executable, *arguments], subprocess.DEVNULL
    everything = os.environ | environment
    subprocess.run(command, cwd=PROJECT, env=everything, check=True, stdout=quiet, stderr=quiet)


async def _commits(home: Path) -> list[Figure]:
    """Measures small changes by as many clients as there are hands, beside commits of ZODB alone."""
    process = KernelProcess(home / "kernel", {**scripted(home), "SENTENCE_TRANSFORMER_MODEL": "hashing"})
    await asyncio.to_thread(process.start)
    try:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(process.client()) for _ in range(2)]
            await clients[0].teach("genesis_obj", "increment", [], "Count.")
            for number in range(len(clients)):
                await clients[0].request("create_object", name=f"tally_{number}", parents=["genesis_obj"])
            return await _rates(clients, home / "bare.fs")
    finally:
        await asyncio.to_thread(process.stop)


async def _rates(clients: list[Kernel], bare_file: Path) -> list[Figure]:
    def of_each(send: Callable[[Kernel, str], Awaitable[object]]) -> list[Callable[[], Awaitable[object]]]:
        return [partial(send, kernel, f"tally_{number}") for number, kernel in enumerate(clients)]

    kinds = {
        "set_slot": of_each(lambda k, name: k.request("set_slot", target_oid=name, slot="size", value=7)),
        "messages to a method that counts": of_each(lambda k, name: k.send(name, "increment")),
    }
    rates: dict[str, list[float]] = {"bare": [], **{kind: [] for kind in kinds}}
    with BareImage(bare_file) as bare:
        for _ in range(ROUNDS):
            rates["bare"].append(await rate([bare.commit], MESSAGES))
            for kind, work in kinds.items():
                rates[kind].append(await rate(work, MESSAGES))
    medians = {name: statistics.median(measured) for name, measured in rates.items()}
    return [
        beside(f"commits, {len(clients)} clients, {kind}", medians[kind], "1/s", medians["bare"])
        for kind in kinds
    ]


async def _sizes(home: Path) -> list[Figure]:
    live: dict[int, list[float]] = {size: [] for size in SIZES}
    idle: dict[int, float] = {}
    walked: dict[int, float] = {}
    settings = {**scripted(home), "SENTENCE_TRANSFORMER_MODEL": "hashing"}
    for _ in range(STARTS):
        for size in SIZES:
            process = KernelProcess(home / f"{size}", settings)
            began = time.perf_counter()
            await asyncio.to_thread(process.start)
            live[size].append(time.perf_counter() - began)
            idle[size] = _resident_mib(process.pid)
            if len(live[size]) == STARTS:
                async with process.client() as kernel:
                    await _walk(kernel)
                walked[size] = _resident_mib(process.pid)
            await asyncio.to_thread(process.stop)
    figures = []
    small = SIZES[0]
    for size in SIZES:
        told = f"{size:,} objects: "
        seconds, first = statistics.median(live[size]), statistics.median(live[small])
        figures.append(beside(f"{told}time until live", seconds, "s", first))
        figures.append(beside(f"{told}memory when live", idle[size], "MiB", idle[small]))
        figures.append(beside(f"{told}memory after all were listed", walked[size], "MiB", walked[small]))
    return figures


async def _walk(kernel: Kernel) -> None:
    """Lists all objects, page by page."""
    after = None
    while page := await kernel.request("list_objects", limit=PAGE, **({"after": after} if after else {})):
        after = page[-1]["name"]


def _resident_mib(pid: int) -> float:
    """Returns the resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no memory of process {pid}")


def _copies(home: Path) -> list[Figure]:
    """Measures a full backup and a restore, each with its verification, beside those of bare repozo."""
    place, repository = home / f"{COPIED}", home / "repozo"
    repository.mkdir()
    image = place / IMAGE
    mib = image.stat().st_size / (1 << 20)
    bare = (REPOZO, "-r", str(repository))
    raw = mib / _seconds(lambda: _python("-m", *bare, "-B", "-F", "-f", str(image)))
    raw_back = mib / _seconds(lambda: _python("-m", *bare, "-R", "-o", str(home / "back.fs")))
    backup = mib / _seconds(lambda: _python("upkeep.py", "backup", BATOS_HOME=str(place)))
    restore = mib / _seconds(lambda: _python("upkeep.py", "restore", BATOS_HOME=str(place)))
    told = f"of {COPIED:,} objects, verified"
    return [
        beside(f"backup {told}", backup, "MiB/s", raw),
        beside(f"restore {told}", restore, "MiB/s", raw_back),
    ]


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
