"""Under pressure: full and read-only disks, no descriptors, no memory, a clock that jumps. Real processes.

What can't be done is a typed error, what can be done goes on, nothing acknowledged is lost, and when the
pressure ends the same kernel works as before.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from evals.kernels import KernelProcess
from tests.conftest import Start, scripted, writes
from tests.garden import Garden
from tests.pressure import Disk, Shim, address_space, brittle_disk, limited, small_disk, turn_read_only
from uvm.client import Kernel
from uvm.errors import FilesNotWritten, KernelUnreachable, ResourceExhausted, ShuttingDown
from uvm.hands.orders import FORK, pack_order
from uvm.hands.pool import HandPool
from uvm.image.image import LivingImage
from uvm.image.txn import Txn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: namespaces, prlimit, /proc"),
]

SQUARE = "def square(self, x):\n    return x * x"
CUBE = "def cube(self, x):\n    return x * x * x"
KEEP = "def keep(self, x):\n    self.kept = x\n    self._p_changed = True\n    return x"
STALLS = {"pattern": "Write `def slow", "stall": True}
DAY_S = 86_400
LARGE = b"l" * 400_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = small_disk(tmp_path / "home")
    yield made
    made.close()


@asynccontextmanager
async def started(disk: Disk, settings: dict[str, str]) -> AsyncIterator[tuple[Any, Kernel]]:
    """Gives a kernel on the disk, with a client; both are ended after."""
    process = disk.kernel(settings)
    process.start()
    try:
        async with process.client() as kernel:
            yield process, kernel
    finally:
        process.kill()


async def refused(request: Any, resource: str = "disk") -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as caught:
        async with asyncio.timeout(30):
            await request
    assert caught.value.details["resource"] == resource
    return caught.value


async def set_slot(kernel: Kernel, slot: str, value: Any) -> None:
    await kernel.request("set_slot", target_oid="genesis_obj", slot=slot, value=value)


async def slot(kernel: Kernel, name: str) -> Any:
    return await kernel.request("send_message", target_oid="genesis_obj", selector=name, on_missing="error")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until `await condition()` holds."""
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110 (what it waits for happens in another process)
            await asyncio.sleep(0.05)


async def has_state(kernel: Kernel, mission_id: str, *states: str) -> bool:
    row = await kernel.request("mission", mission_id=mission_id)
    return row["state"] in states


async def completed(kernel: Kernel, mission_id: str) -> None:
    """Waits for the good end of a mission."""
    await until(lambda: has_state(kernel, mission_id, "complete", "failed"))
    assert await has_state(kernel, mission_id, "complete")


async def until_refused(request: Callable[[], Awaitable[Any]]) -> ResourceExhausted:
    """Sends the same request again and again, until the kernel has no room for it."""
    errors: list[ResourceExhausted] = []

    async def is_refused() -> bool:
        try:
            await request()
        except ResourceExhausted as error:
            errors.append(error)
        return bool(errors)

    await until(is_refused)
    return errors[0]


async def until_there_is_room(request: Callable[[], Awaitable[Any]]) -> Any:
    """Sends the same request again and again, until the kernel has room for it, and returns the answer."""
    answers: list[Any] = []

    async def is_answered() -> bool:
        with suppress(ResourceExhausted):
            answers.append(await request())
        return bool(answers)

    await until(is_answered)
    return answers[0]


def records(log: Path) -> list[dict[str, Any]]:
    """Returns all records of a log, each of them a whole line."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def seqs_on(disk: Disk) -> list[int]:
    return [record["seq"] for record in records(disk.path / "metacognition.jsonl")]


@contextmanager
def image_of(disk: Disk, folder: Path) -> Iterator[Txn]:
    """Gives a view of the image's file alone, as whoever restores a copy of it would see it."""
    copy = folder / "copy.fs"
    shutil.copyfile(disk.path / "live_image.fs", copy)
    (folder / "copy.fs.index").unlink(missing_ok=True)
    image = LivingImage(str(copy), folder / "copy.fs.blob")
    image.open()
    try:
        with image.view() as txn:
            yield txn
    finally:
        image.close()


def slots_in_image(disk: Disk, folder: Path) -> dict[str, Any]:
    with image_of(disk, folder) as txn:
        return dict(txn.find("genesis_obj").data())


def objects_in_image(disk: Disk, folder: Path, prefix: str) -> dict[str, Any]:
    with image_of(disk, folder) as txn:
        return {name: txn.find(name).data()["data"] for name in txn.names if name.startswith(prefix)}


async def test_a_full_disk_refuses_what_writes_and_nothing_else(disk: Disk, tmp_path: Path) -> None:
    async with started(disk, scripted(tmp_path, writes("square", SQUARE))) as (process, kernel):
        assert await kernel.send("genesis_obj", "square", 3) == 9
        await set_slot(kernel, "before", 1)
        disk.fill(leave=100_000)  # room for a part of what comes
        error = await refused(set_slot(kernel, "large", LARGE))
        assert "disk is full" in error.message
        disk.fill()
        await refused(set_slot(kernel, "large", LARGE))
        await refused(kernel.request("create_object", name="x_obj", slots={"large": LARGE}))
        assert await slot(kernel, "before") == 1
        assert await kernel.send("genesis_obj", "square", 4) == 16
        assert (await kernel.request("ping"))["pid"] == process.pid
        assert (await kernel.request("status"))["image"]["records"] > 0
        disk.free()
        await set_slot(kernel, "after", 2)
        await set_slot(kernel, "large", LARGE)
        assert process.stop() == 0
    held = slots_in_image(disk, tmp_path)
    assert (held["before"], held["after"], held["large"]) == (1, 2, LARGE)
    assert seqs_on(disk) == list(range(1, len(seqs_on(disk)) + 1))


async def test_a_commit_that_does_not_fit_leaves_nothing_in_the_file(disk: Disk) -> None:
    """Wherever in a page the file ends: ZODB's buffers would spoil it where the rest of the page is short."""
    image = LivingImage(str(disk.path / "live_image.fs"), disk.path / "blobs")
    image.open()

    async def keep(name: str, size: int) -> None:
        async with image.transaction(f"{size} bytes") as txn:
            txn.create(name, (), {"data": b"v" * size})

    await keep("scratch_obj", 60_000)  # the scratch file has room from now on
    for turn in range(16):
        await keep(f"some_{turn}", 200)
        disk.fill()
        with pytest.raises(ResourceExhausted):
            await keep("large_obj", 4_000)
        image._db.undoLog(0, 1000)  # reads the file from its end on
        disk.free()
        await keep(f"few_{turn}", 1)
        assert (disk.path / "live_image.fs").stat().st_size == image.size()
    image.close()


async def test_what_was_acknowledged_on_a_nearly_full_disk_is_there(disk: Disk, tmp_path: Path) -> None:
    """Commits of many sizes until little fits, then a kill, three times over: each answer is true."""
    kept: dict[str, bytes] = {}
    settings = scripted(tmp_path, [])
    for turn in range(3):
        async with started(disk, settings) as (process, kernel):
            disk.fill(leave=150_000)
            refusals = 0
            for size in (30_000, 200, 90_000, 30, 10_000, 100_000, 5_000, 10, 50_000, 400):
                name = f"of_{turn}_{size}"
                try:
                    await kernel.request("create_object", name=name, slots={"data": b"v" * size})
                    kept[name] = b"v" * size
                except ResourceExhausted:
                    refusals += 1
            assert 3 <= refusals <= 5
            process.kill()  # with the disk as it is
        assert objects_in_image(disk, tmp_path, "of_") == kept
        disk.free()


async def test_missions_under_way_outlast_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    lines = [*writes("square", SQUARE), *writes("cube", CUBE), STALLS]
    async with started(disk, scripted(tmp_path, lines, WORKER_COUNT="1")) as (process, kernel):
        (slow, square, cube) = [
            (await kernel.teach("genesis_obj", selector, ["x"], wait=False))["mission_id"]
            for selector in ("slow", "square", "cube")
        ]
        await until(lambda: has_state(kernel, slow, "running"))
        disk.fill()
        await fill_last_page(kernel)
        await refused(kernel.teach("genesis_obj", "never", ["x"], wait=False))
        await refused(kernel.request("cancel_mission", mission_id=slow))
        assert (await kernel.request("mission", mission_id=slow))["state"] == "running"
        disk.free()
        await kernel.request("cancel_mission", mission_id=slow)
        await until(lambda: has_state(kernel, slow, "cancelled"))
        for mission_id in (square, cube):
            await completed(kernel, mission_id)
        assert await kernel.send("genesis_obj", "cube", 3) == 27
        assert len(await kernel.request("missions")) == 3
        assert process.stop() == 0


async def fill_last_page(kernel: Kernel) -> None:
    """Takes what room a full disk leaves in the last page of the image."""
    await until_refused(lambda: set_slot(kernel, "x", 1))


async def test_a_cycle_that_the_disk_interrupts_goes_on_by_itself(disk: Disk, tmp_path: Path) -> None:
    async with started(disk, scripted(tmp_path, writes("square", SQUARE))) as (process, kernel):
        disk.fill(leave=12_000)  # room to begin, none for the prompts in the log
        error = await refused(kernel.teach("genesis_obj", "square", ["x"]))
        mission_id = error.details["mission_id"]
        assert (await kernel.request("mission", mission_id=mission_id))["state"] in ("queued", "running")
        disk.free()
        await completed(kernel, mission_id)
        assert await kernel.send("genesis_obj", "square", 5) == 25
        assert process.stop() == 0
    assert "InternalError" not in process.log
    assert seqs_on(disk) == list(range(1, len(seqs_on(disk)) + 1))


async def test_a_mission_open_on_a_full_disk_is_taken_up_by_the_next_kernel(
    disk: Disk, tmp_path: Path
) -> None:
    settings = scripted(tmp_path, writes("square", SQUARE))
    async with started(disk, settings) as (process, kernel):
        disk.fill(leave=12_000)
        error = await refused(kernel.teach("genesis_obj", "square", ["x"]))
        process.kill()
    disk.free()
    async with started(disk, settings) as (process, kernel):
        await completed(kernel, error.details["mission_id"])
        assert await kernel.send("genesis_obj", "square", 5) == 25


async def test_room_is_kept_for_what_is_under_way(disk: Disk, tmp_path: Path) -> None:
    settings = scripted(tmp_path, [*writes("square", SQUARE), *writes("keep", KEEP)], MIN_FREE_MIB="2")
    async with started(disk, settings) as (_, kernel):
        await kernel.teach("genesis_obj", "keep", ["x"], examples=[{"args": [1], "returns": 1}])
        disk.fill(leave=1 << 20)
        error = await until_refused(lambda: set_slot(kernel, "x", 1))
        assert error.details["resource"] == "disk"
        assert "MIN_FREE_MIB" in error.message
        await refused(kernel.teach("genesis_obj", "square", ["x"]))
        await refused(kernel.send("genesis_obj", "square", 2))
        await refused(kernel.send("genesis_obj", "keep", 2))
        assert await kernel.request("missions", state="failed") == []
        await kernel.request("cancel_mission", mission_id=(await kernel.request("missions"))[0]["mission_id"])
        disk.free()
        assert await until_there_is_room(lambda: kernel.send("genesis_obj", "keep", 7)) == 7


async def test_a_file_that_does_not_fit_takes_its_message_back(disk: Disk, tmp_path: Path) -> None:
    save = (
        "def save(self, size):\n"
        "    self.files.write_text('note.txt', 'n' * size)\n"
        "    self.saved = size\n"
        "    self._p_changed = True\n"
        "    return size"
    )
    (disk.path / "out").mkdir()
    folder = {"path": str(tmp_path / "home" / "data" / "out"), "write": True}
    async with started(disk, scripted(tmp_path, writes("save", save))) as (process, kernel):
        await kernel.request("grant", target_oid="genesis_obj", kind="files", options=folder)
        await kernel.teach("genesis_obj", "save", ["size"], examples=[{"args": [1], "returns": 1}])
        assert await kernel.send("genesis_obj", "save", 10) == 10
        disk.fill(leave=100_000)
        with pytest.raises(FilesNotWritten) as caught:
            await kernel.send("genesis_obj", "save", 500_000)
        assert caught.value.details == {"committed": False, "resource": "disk"}
        assert await slot(kernel, "saved") == 10
        assert os.listdir(disk.path / "out") == ["note.txt"]
        assert (disk.path / "out" / "note.txt").stat().st_size == 10
        disk.free()
        assert await kernel.send("genesis_obj", "save", 500_000) == 500_000
        assert (disk.path / "out" / "note.txt").stat().st_size == 500_000
        assert process.stop() == 0
    assert slots_in_image(disk, tmp_path)["saved"] == 500_000


async def test_no_start_on_a_full_disk_says_so(disk: Disk, tmp_path: Path) -> None:
    disk.fill()
    process = disk.kernel(scripted(tmp_path, []))
    with pytest.raises(RuntimeError, match="can't start: the disk is full"):
        process.start()
    disk.free()
    process.start()
    process.kill()


async def test_a_kernel_whose_output_has_no_room(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("square", SQUARE)))
    assert process.stop() == 0
    ended = subprocess.Popen(  # noqa: ASYNC220 (it returns at once)
        ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", *process.command],
        env=process.environment,
        stdin=subprocess.DEVNULL,
    )
    try:
        async with process.client() as kernel:
            assert await kernel.send("genesis_obj", "square", 3) == 9
            await kernel.request("shutdown")
        assert await asyncio.to_thread(ended.wait, 20) == 0
    finally:
        ended.kill()


async def test_a_marker_that_a_power_cut_left_empty_is_written_again(tmp_path: Path) -> None:
    for content in ("bushy", ""):
        image = LivingImage(str(tmp_path / "live_image.fs"), tmp_path / "blobs")
        image.open()
        image.close()
        assert (tmp_path / "blobs" / ".layout").read_text() == "bushy"
        (tmp_path / "blobs" / ".layout").write_text("" if content else "bushy")


async def test_a_disk_that_turns_read_only(tmp_path: Path) -> None:
    disk = brittle_disk(tmp_path / "home")
    try:
        async with started(disk, scripted(tmp_path, writes("square", SQUARE))) as (process, kernel):
            await kernel.send("genesis_obj", "square", 2)
            await set_slot(kernel, "before", 1)
            turn_read_only(disk)
            error = await refused(set_slot(kernel, "after", 2), "read_only")
            assert "read-only" in error.message
            await refused(kernel.teach("genesis_obj", "cube", ["x"]), "read_only")
            assert await slot(kernel, "before") == 1
            assert await kernel.send("genesis_obj", "square", 4) == 16
            await kernel.request("status")
            assert process.stop() == 0
        process = disk.kernel(scripted(tmp_path, []))
        with pytest.raises(RuntimeError, match="can't start: the file system is read-only"):
            process.start()
        held = slots_in_image(disk, tmp_path)
        assert held["before"] == 1
        assert "after" not in held
    finally:
        disk.close()
    disk = brittle_disk(tmp_path / "home")  # mounted again
    try:
        async with started(disk, scripted(tmp_path, [])) as (_, kernel):
            assert await slot(kernel, "before") == 1
            await set_slot(kernel, "after", 2)
    finally:
        disk.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_the_maker_of_hands_outlasts_an_order_whose_sockets_did_not_reach_it(pool: HandPool) -> None:
    """The system drops them where it has no descriptors for them."""
    garden = Garden(pool)
    plant = garden.plant("plant_obj", SQUARE)
    zygote, restarts = pool._stock.living(), pool.restarts
    ours, theirs = socket.socketpair()
    with ours, theirs:
        zygote._send(pack_order(FORK, [2**31, 2**31 + 1]), [theirs.fileno()])
    for n in range(2 * pool.spares):
        assert (await garden.send(plant, "square", n)).result == n * n
    assert pool.restarts == restarts


def impatient(process: KernelProcess) -> Kernel:
    """Returns a client that gives up soon."""
    commands, events = (process.environment[f"BATOS_ZMQ_{kind}ENDPOINT"] for kind in ("", "EVENTS_"))
    return Kernel(commands, events, process.home / "keys", connect_timeout_s=1.0)


async def test_no_descriptors(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [*writes("square", SQUARE), *writes("cube", CUBE)]))
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "square", 3) == 9
        with limited(process.pid, resource.RLIMIT_NOFILE, 3):  # no further one
            error = await until_refused(lambda: kernel.send("genesis_obj", "square", 4))
            assert error.details["resource"] == "descriptors"
            mission_id = (await refused(kernel.teach("genesis_obj", "cube", ["x"]), "descriptors")).details[
                "mission_id"
            ]
            await set_slot(kernel, "meanwhile", 1)
            assert await slot(kernel, "meanwhile") == 1
            assert (await kernel.request("ping"))["pid"] == process.pid
            await kernel.request("status")
            with pytest.raises(KernelUnreachable):
                async with impatient(process):
                    pass
        assert await kernel.send("genesis_obj", "square", 5) == 25
        await completed(kernel, mission_id)
        assert await kernel.send("genesis_obj", "cube", 3) == 27
        async with process.client() as other:
            assert await other.send("genesis_obj", "square", 6) == 36
        assert await slot(kernel, "meanwhile") == 1
    assert process.stop() == 0
    assert "Traceback" not in process.log


async def test_no_memory(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("square", SQUARE)))
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "square", 3) == 9
        await set_slot(kernel, "before", 1)
        with limited(process.pid, resource.RLIMIT_AS, address_space(process.pid) + (6 << 20)):
            for size in (15 << 20, 8 << 20, 2 << 20):
                await refused(set_slot(kernel, "large", b"l" * size), "memory")
                await refused(kernel.send("genesis_obj", "square", b"l" * size), "memory")
            await asyncio.gather(
                *(refused(set_slot(kernel, "x", b"l" * (2 << 20)), "memory") for _ in range(9))
            )
            assert await slot(kernel, "before") == 1
            assert (await kernel.request("ping"))["pid"] == process.pid
            await kernel.request("status")
        await set_slot(kernel, "large", b"l" * (8 << 20))
        assert await kernel.send("genesis_obj", "square", 5) == 25
    assert process.stop() == 0
    assert "Traceback" not in process.log


async def test_a_clock_that_jumps(start_kernel: Start, tmp_path: Path) -> None:
    shim = Shim(tmp_path)
    process = start_kernel(scripted(tmp_path, writes("square", SQUARE)), environment=shim.environment)
    missions, early = [], dt.datetime.now(dt.UTC)
    async with process.client() as kernel:
        await set_slot(kernel, "n", -1)
        before = dt.datetime.now(dt.UTC)
        for n, clock_s in enumerate((0, -DAY_S, 365 * DAY_S, -DAY_S, 0)):
            shim.tell(clock_s=clock_s)
            await set_slot(kernel, "n", n)
            missions.append((await kernel.teach("genesis_obj", "square", ["x"]))["mission_id"])
            assert await kernel.send("genesis_obj", "square", n) == n * n
            async with process.client() as other:  # a handshake under this clock
                assert await slot(other, "n") == n
        assert missions == sorted(missions)
        assert [row["mission_id"] for row in await kernel.request("missions")] == missions[::-1]
        then = await kernel.request(
            "send_message", target_oid="genesis_obj", selector="n", as_of=before, on_missing="error"
        )
        assert then == -1
        told = records(process.home / "metacognition.jsonl")
        commits = [record for record in told if record["event"] == "commit"]
        tids = [record["transaction_id"] for record in commits]
        assert tids == sorted(set(tids))
        of_n = [record["transaction_id"] for record in commits if record["note"] == "set_slot genesis_obj n"]
        for n, tid in enumerate(of_n, -1):
            seen = await kernel.request("send_message", target_oid="genesis_obj", selector="n", as_of=tid)
            assert seen == n
        years = {dt.datetime.fromisoformat(record["ts"]).year for record in told}
        assert {early.year, (early + dt.timedelta(days=365)).year} <= years  # told as the clock had it
        assert [record["seq"] for record in told] == list(range(1, len(told) + 1))
    process.kill()
    process.start()
    async with process.client() as kernel:
        assert await slot(kernel, "n") == 4
        await set_slot(kernel, "n", 5)
    assert process.stop() == 0
    assert "Traceback" not in process.log


async def test_a_commit_that_fails_in_its_last_step_ends_the_kernel(
    start_kernel: Start, tmp_path: Path
) -> None:
    """FileStorage closes itself then; a kernel that lived on could neither read nor write."""
    shim = Shim(tmp_path)
    process = start_kernel(scripted(tmp_path, []), environment=shim.environment)
    async with process.client() as kernel:
        await set_slot(kernel, "before", 1)
        shim.tell(fsync_errno=errno.EIO)
        with pytest.raises(ShuttingDown, match="whether this change was kept"):
            await set_slot(kernel, "after", 2)
        assert process.process is not None
        assert await asyncio.to_thread(process.process.wait, 20) == 3
    shim.tell()
    process.start()
    async with process.client() as kernel:
        assert await slot(kernel, "before") == 1
        await set_slot(kernel, "after", 3)
        assert await slot(kernel, "after") == 3
    assert process.stop() == 0
