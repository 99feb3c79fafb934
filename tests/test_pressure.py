"""Under pressure: full and read-only disks, no descriptors, no memory, a clock that jumps. Real processes.

What can't be done is a typed error, what can be done goes on, nothing acknowledged is lost, and when the
pressure ends the same kernel works as before.
"""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import scripted, writes
from tests.pressure import Disk, address_space, brittle_disk, limited, small_disk, turn_read_only
from uvm.client import Kernel
from uvm.errors import KernelUnreachable, ResourceExhausted
from uvm.image.image import LivingImage, Txn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: namespaces, prlimit, /proc"),
]

SQUARE = "def square(self, x):\n    return x * x"
CUBE = "def cube(self, x):\n    return x * x * x"
KEEP = "def keep(self, x):\n    self.kept = x\n    self._p_changed = True\n    return x"
STALLS = {"pattern": "Write `def slow", "stall": True}
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


async def completed(kernel: Kernel, mission_id: str) -> dict[str, Any]:
    """Waits for the end of a mission and returns its record."""
    await until(lambda: has_state(kernel, mission_id, "complete", "failed"))
    row: dict[str, Any] = await kernel.request("mission", mission_id=mission_id)
    assert row["state"] == "complete"
    return row


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


def thoughts(disk: Disk) -> list[dict[str, Any]]:
    """Returns all records of the log, each of them a whole line."""
    lines = (disk.path / "metacognition.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
        assert (await kernel.request("status"))["image"]["objects"] > 0
        disk.free()
        await set_slot(kernel, "after", 2)
        await set_slot(kernel, "large", LARGE)
        assert process.stop() == 0
    held = slots_in_image(disk, tmp_path)
    assert (held["before"], held["after"], held["large"]) == (1, 2, LARGE)
    assert [record["seq"] for record in thoughts(disk)] == list(range(1, len(thoughts(disk)) + 1))


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
        image._undo_id(bytes(8))  # reads the file from its end on
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
        rows = [await completed(kernel, mission_id) for mission_id in (square, cube)]
        assert [row["starts"] for row in rows] == [1, 1]
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
        row = await completed(kernel, mission_id)
        assert row["starts"] == 1
        assert await kernel.send("genesis_obj", "square", 5) == 25
        assert process.stop() == 0
    assert "InternalError" not in process.log
    assert [record["seq"] for record in thoughts(disk)] == list(range(1, len(thoughts(disk)) + 1))


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


async def test_no_start_on_a_full_disk_says_so(disk: Disk, tmp_path: Path) -> None:
    disk.fill()
    process = disk.kernel(scripted(tmp_path, []))
    with pytest.raises(RuntimeError, match="can't start: the disk is full"):
        process.start()
    disk.free()
    process.start()
    process.kill()


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


async def test_no_descriptors(disk: Disk, tmp_path: Path) -> None:
    async with started(disk, scripted(tmp_path, writes("square", SQUARE))) as (process, kernel):
        assert await kernel.send("genesis_obj", "square", 3) == 9
        with limited(process.pid, resource.RLIMIT_NOFILE, 3):
            error = await until_refused(lambda: kernel.send("genesis_obj", "square", 4))
            assert error.details["resource"] == "descriptors"
            await set_slot(kernel, "meanwhile", 1)
            assert await slot(kernel, "meanwhile") == 1
            await kernel.request("ping")
            await kernel.request("status")
            with pytest.raises(KernelUnreachable):
                async with process.client():
                    pass
        assert await kernel.send("genesis_obj", "square", 5) == 25
        async with process.client() as other:
            assert await other.send("genesis_obj", "square", 6) == 36
        assert process.stop() == 0


async def test_no_memory(disk: Disk, tmp_path: Path) -> None:
    async with started(disk, scripted(tmp_path, writes("square", SQUARE))) as (process, kernel):
        assert await kernel.send("genesis_obj", "square", 3) == 9
        with limited(process.pid, resource.RLIMIT_AS, address_space(process.pid) + (6 << 20)):
            for size in (15 << 20, 8 << 20, 4 << 20, 3 << 20):
                try:
                    async with asyncio.timeout(20):
                        await kernel.request(
                            "send_message", target_oid="genesis_obj", selector="square", args=[b"x" * size]
                        )
                except Exception as error:
                    print(size, repr(error)[:200], getattr(error, "details", None))
            assert process.process.poll() is None, process.log
            await kernel.request("ping")
            await kernel.request("status")
        assert await kernel.send("genesis_obj", "square", 5) == 25
        assert process.stop() == 0
        print(process.log)
