"""Verification and packing, and the schedule of a real kernel that is at work meanwhile."""

import asyncio
import contextlib
import datetime as dt
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.fsIndex import fsIndex
from ZODB.TimeStamp import TimeStamp

from evals.kernels import KernelProcess
from tests.conftest import Start, scripted
from tests.test_puter import Project
from tests.upkeep import PROJECT, Home
from uvm.errors import InvalidField, ResourceExhausted, TransactionNotFound, UpkeepBusy, UpkeepError
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmObject
from uvm.image.storage import write_index
from uvm.pressure import Room
from uvm.upkeep import files, packs
from uvm.upkeep.backups import Backups
from uvm.upkeep.keeper import Keeper, Record
from uvm.upkeep.verify import verify
from uvm.upkeep.walk import walk


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    for value in range(5):
        home.write("counter", value)
    return home


def problems(home: Home) -> tuple[str, ...]:
    return verify(home.image, home.blob_dir).problems


def transactions(path: Path) -> list[int]:
    """Returns the offsets of the transactions in an image file."""
    data, found = path.read_bytes(), [4]
    while found[-1] < len(data):
        found.append(found[-1] + struct.unpack(">Q", data[found[-1] + 8 : found[-1] + 16])[0] + 8)
    return found[:-1]


def patched(path: Path, offset: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)


class TestVerify:
    def test_a_sound_image(self, home: Home) -> None:
        result = home.run("verify")
        assert (result.returncode, result.stderr.count("error")) == (0, 0)
        (line,) = result.stdout.splitlines()
        assert line.startswith(f"{home.image}: sound (")
        report = verify(home.image, home.blob_dir)
        assert report.transactions == len(transactions(home.image))
        assert report.bytes == home.image.stat().st_size

    def test_it_writes_nothing(self, home: Home) -> None:
        before = {path: path.stat().st_mtime_ns for path in home.folder.rglob("*")}
        assert problems(home) == ()
        assert {path: path.stat().st_mtime_ns for path in home.folder.rglob("*")} == before

    @pytest.mark.parametrize("field", [0, 8, 16, 17, 30, 70])
    def test_damage_in_each_transaction_is_seen(self, home: Home, field: int) -> None:
        sound = home.image.read_bytes()
        for start in transactions(home.image):
            home.image.write_bytes(sound)
            patched(home.image, start + field, b"\xee")
            if home.image.read_bytes() != sound:
                assert problems(home) != () or field == 30  # a note may be anything
        home.image.write_bytes(sound)
        assert problems(home) == ()

    def test_every_cut_but_between_transactions_is_seen(self, home: Home) -> None:
        sound = home.image.read_bytes()
        last = transactions(home.image)[-1]
        for length in range(last + 23, len(sound), 7):
            home.image.write_bytes(sound[:length])
            assert "is cut short by" in problems(home)[0]

    def test_a_transaction_that_is_being_written_is_none_yet(self, home: Home) -> None:
        last = transactions(home.image)[-1]
        whole = verify(home.image, home.blob_dir)
        patched(home.image, last + 16, b"c")
        report = verify(home.image, home.blob_dir)
        assert report.problems == ()
        assert report.transactions == whole.transactions - 1
        assert report.unfinished == whole.bytes - last

    def test_one_that_was_not_finished_has_nothing_after_it(self, home: Home) -> None:
        patched(home.image, transactions(home.image)[-2] + 16, b"c")
        assert "has others after it" in problems(home)[0]

    def test_an_index_that_is_wrong(self, home: Home) -> None:
        index = Path(f"{home.image}.index")
        for value in range(3):
            home.write("another", value)
        info = fsIndex.load(str(index))  # of three objects written last, which ZODB itself looks at
        oid = walk(home.image).index.minKey()  # the root, which is not among them
        assert info["index"][oid] != 4
        info["index"][oid] = 4
        info["index"].save(info["pos"], str(index))  # as ZODB does, so that no kernel trusts it
        assert problems(home) == ()
        parts = [(prefix, bucket.toString()) for prefix, bucket in info["index"]._data.items()]
        write_index(home.image, info["pos"], bytes.fromhex(walk(home.image).last), parts)
        assert problems(home)[0] == f"its index is wrong about 1 objects; delete {index}"
        index.unlink()
        assert problems(home) == ()

    def test_a_missing_object_is_told(self, home: Home) -> None:
        async def refer(image: LivingImage) -> str:
            async with image.transaction("refer") as txn:
                friend = txn.create("friend", (), {})
                txn.create("owner", (), {"friend": friend})
            return friend.oid

        with home.opened() as image:
            oid = asyncio.run(refer(image))
        data = home.image.read_bytes()
        nowhere = "00000000000000ff"
        references = b"C\x08" + bytes.fromhex(oid)  # how a pickle has it
        assert references in data
        home.image.write_bytes(data.replace(references, b"C\x08" + bytes.fromhex(nowhere)))
        assert any(f"refers to {nowhere}, which is missing" in told for told in problems(home))

    def test_no_image_and_no_file(self, home: Home, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("no image")
        assert verify(tmp_path / "text", tmp_path).problems == ("it is no image file",)
        result = home.run("verify", str(tmp_path / "nothing"))
        assert (result.returncode, result.stdout) == (1, "")
        assert "there is no image file" in result.stderr

    def test_a_forged_class_is_not_imported(self, home: Home) -> None:
        data = home.image.read_bytes()
        home.image.write_bytes(data.replace(b"uvm.image.prototypes", b"uvm.image.prototypex"))
        assert any("ForbiddenClass" in told for told in problems(home))
        assert "uvm.image.prototypex" not in sys.modules


class TestPack:
    def tids(self, home: Home) -> list[str]:
        data = home.image.read_bytes()
        return [data[start : start + 8].hex() for start in transactions(home.image)]

    def test_it_forgets_what_is_old_and_says_so(self, home: Home) -> None:
        async def look(image: LivingImage, as_of: dt.datetime | str) -> None:
            async with image.reading(as_of) as txn:
                txn.find("counter")

        tids = self.tids(home)
        until = TimeStamp(bytes.fromhex(tids[-2])).timeTime() + 1e-6
        with home.opened() as image:
            image.pack(until)
            with image.view(tids[-1]) as txn:
                assert txn.find("counter").value == 4
            with image.view(tids[-2]) as txn:
                assert txn.find("counter").value == 3
            for early in (tids[0], dt.datetime(2001, 1, 1)):
                with pytest.raises(InvalidField, match=f"history begins at .*{tids[-2]}"):
                    asyncio.run(look(image, early))
            with pytest.raises(TransactionNotFound, match="packed"):
                asyncio.run(image.changes(tids[1]))
        assert problems(home) == ()

    def test_what_comes_back_by_its_oid_stays(self, home: Home) -> None:
        async def unit(image: LivingImage) -> float:
            async with image.transaction("born") as txn:
                orphan = UvmObject(None, (), {"secret": 42})
                txn.create("holder", (), {"child": orphan})
            oid = orphan.oid
            async with image.transaction("let go") as txn:
                txn.edit(txn.find("holder"), {}, ["child"])
            until = float(TimeStamp(bytes.fromhex(txn.tid)).timeTime()) + 1e-6
            async with image.transaction("taken back") as txn:
                txn.edit(txn.find("holder"), {"child": txn.find(oid)})
            return until

        with home.opened() as image:
            image.pack(asyncio.run(unit(image)))
            with image.view() as txn:
                assert txn.find("holder").child.secret == 42
        assert problems(home) == ()

    def test_garbage_goes(self, home: Home) -> None:
        async def unit(image: LivingImage) -> str:
            async with image.transaction("born") as txn:
                txn.create("holder", (), {"child": UvmObject(None, (), {"ballast": "x" * 100_000})})
            async with image.transaction("let go") as txn:
                txn.edit(txn.find("holder"), {}, ["child"])
            return txn.tid

        with home.opened() as image:
            tid = asyncio.run(unit(image))
            image.pack(TimeStamp(bytes.fromhex(tid)).timeTime() + 1e-6)
            assert image.size() < 50_000

    def test_on_command_without_a_kernel(self, home: Home) -> None:
        before = home.image.stat().st_size
        result = home.run("pack", "--days", "0")
        assert result.returncode == 0, result.stderr
        assert f"{before} bytes before" in result.stdout
        assert home.image.stat().st_size < before
        assert not Path(f"{home.image}.old").exists()
        assert not Path(f"{home.blob_dir}.old").exists()
        assert home.read("counter") == 4
        assert home.run("pack", "--days=-1").returncode == 2

    def test_an_image_that_does_not_verify_keeps_the_one_before(self, home: Home) -> None:
        data = home.image.read_bytes()
        damaged = data[::-1].replace(b"PersistentMapping"[::-1], b"PersistentMappinG"[::-1], 1)[::-1]
        assert damaged != data
        home.image.write_bytes(damaged)
        for _ in range(2):  # the second one finds what the first has kept
            result = home.run("pack", "--days", "0")
            assert result.returncode == 1
            assert f"is kept as {home.image}.old" in result.stderr
            assert Path(f"{home.image}.old").read_bytes() == damaged

    def test_a_clock_that_is_ahead_forgets_nothing_more(
        self, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 365 * packs.DAY_S)
        before = self.tids(home)
        with home.opened() as image:
            packed = packs.pack(image, 30)
            with image.view(before[-2]) as txn:
                assert txn.find("counter").value == 3
        assert packed.until < now - 29 * packs.DAY_S
        assert self.tids(home) == before

    def test_a_damaged_end_is_told(self, home: Home) -> None:
        with home.image.open("ab") as file:
            file.write(b"\xa5" * 50)
        result = home.run("pack")
        assert result.returncode == 0, result.stderr
        assert "The last 50 bytes of" in result.stderr

    @pytest.mark.parametrize(("opcode", "error"), [(b"~", "UnpicklingError"), (b"\xff", "OverflowError")])
    def test_whatever_damage_does_to_a_pack_it_is_typed(self, home: Home, opcode: bytes, error: str) -> None:
        data = home.image.read_bytes()
        patched(home.image, data.rindex(b"}q\x01X") + 3, opcode + b"\xff" * 8)  # within the newest record
        with home.opened() as image, pytest.raises(UpkeepError, match=rf"can't be packed \({error}.*verify"):
            image.pack(time.time())

    def test_an_image_in_memory(self) -> None:
        image = LivingImage.in_memory()
        image.open()
        with pytest.raises(UpkeepError, match="is no image file"):
            image.pack(0.0)
        image.close()

    def test_the_history_of_methods_survives(self, home: Home) -> None:
        from uvm.image import history
        from uvm.image.prototypes import UvmMethod

        async def learn(image: LivingImage, number: int) -> None:
            async with image.transaction("learn") as txn:
                source = f"def f(self):\n    return {number}\n"
                history.install(txn, txn.find("counter"), UvmMethod("f", (), source, "", {}, []))

        with home.opened() as image:
            for number in range(3):
                asyncio.run(learn(image, number))
        assert home.run("pack", "--days", "0").returncode == 0
        with home.opened() as image, image.view() as txn:
            assert len(history.versions(txn.find("counter")._slots["f"])) == 3


# A real kernel


def command(kernel: KernelProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "upkeep.py"), *arguments],
        env=kernel.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what is waited for happens in another process)
            await asyncio.sleep(0.05)


def records(kernel: KernelProcess, event: str) -> list[dict[str, Any]]:
    lines = (kernel.home / "metacognition.jsonl").read_text("utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


def backups(kernel: KernelProcess) -> Backups:
    return Backups(kernel.home / "backups")


@pytest.mark.slow
async def test_backup_verify_and_pack_beside_commits(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        await kernel.request("create_object", name="counter", slots={"value": 0})
        done = asyncio.Event()

        async def write() -> int:
            number = 0
            while not done.is_set():
                number += 1
                await kernel.request("set_slot", target_oid="counter", slot="value", value=number)
            return number

        writing = asyncio.create_task(write())
        try:
            for arguments in (
                ("backup",),
                ("pack", "--days", "0"),
                ("verify",),
                ("backup",),
                ("verify", "--backups"),
            ):
                result = await asyncio.to_thread(command, process, *arguments)
                assert result.returncode == 0, (arguments, result.stderr)
        finally:
            done.set()
            last = await writing
        assert last > 10
        assert await kernel.send("counter", "value") == last
        status = (await kernel.request("status"))["upkeep"]
        assert status["pack"]["last"]
        assert status["pack"]["bytes"] > 0
    assert await asyncio.to_thread(process.stop) == 0
    image = process.home / "live_image.fs"
    assert verify(image, process.home / "live_image.fs.blob").problems == ()
    kept = backups(process).kept()
    assert [backup.full for backup in kept] == [True] * len(kept)  # each after a pack
    for backup in kept:
        assert backups(process).check(backup).problems == ()


@pytest.mark.slow
async def test_the_schedule(start_kernel: Start, tmp_path: Path) -> None:
    settings = scripted(tmp_path, [], BACKUP_INTERVAL_S="0.3", PACK_INTERVAL_S="0.3", PACK_KEEP_DAYS="0")
    process = start_kernel(settings)
    async with process.client() as kernel:
        for number in range(3):
            await kernel.request("remember", text=f"text {number}")
        await until(lambda: {record["what"] for record in records(process, "upkeep")} == {"backup", "pack"})
        assert {record["outcome"] for record in records(process, "upkeep")} == {"done"}
        status = (await kernel.request("status"))["upkeep"]
        assert status["backup"]["bytes"] > 0
        assert status["backup"]["verified"] <= status["backup"]["last"]
        assert "error" not in status["backup"]
    await asyncio.to_thread(process.stop)
    assert backups(process).check(backups(process).newest()).problems == ()


def plenty(_needed_mib: int) -> None:
    """The disk has room."""


def keeper(
    home: Home,
    record: Record,
    said: list[str],
    interval: float = 0.05,
    room: Callable[[int], None] = plenty,
) -> Keeper:
    return Keeper(
        image=LivingImage(str(home.image), home.blob_dir),
        blob_dir=home.blob_dir,
        backup_dir=home.backups.folder,
        ledger=home.folder / "run" / "upkeep.json",
        command=("env", f"BATOS_HOME={home.folder}", sys.executable, str(PROJECT / "upkeep.py")),
        intervals={"backup": interval},
        keep_days=30,
        room=room,
        record=record,
        say=said.append,
    )


async def test_a_pack_leaves_the_room_that_is_kept(home: Home) -> None:
    room = Room(home.folder, 1 << 40)

    async def record(_event: str, **_: Any) -> None: ...

    kept = keeper(home, record, [], room=room.check)
    kept._image.open()
    before = home.image.read_bytes()
    with pytest.raises(ResourceExhausted, match="MIN_FREE_MIB is"):
        await kept.do("pack", 0)
    kept._image.close()
    assert home.image.read_bytes() == before


async def test_nothing_ends_the_schedule(home: Home) -> None:
    records = 0

    async def record(event: str, **_: Any) -> None:
        nonlocal records
        records += 1
        raise ValueError("I/O operation on closed file")  # as a log that was closed says

    said: list[str] = []
    keep = keeper(home, record, said)
    ledger = home.folder / "run" / "upkeep.json"
    ledger.parent.mkdir(exist_ok=True)
    ledger.write_text('{"backup": {"last": NaN, "tried": 0, "failures": ' + "9" * 400 + "}}")
    keep.start()
    await until(lambda: records > 1)
    ledger.write_text("[" * 200_000)
    seen = records
    await until(lambda: records > seen + 1)
    await keep.close()
    assert said == []
    assert keep.told()["backup"]["bytes"] == home.image.stat().st_size


async def test_what_nobody_thought_of_is_a_failure_that_is_told(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def record(event: str, **_: Any) -> None:
        pass

    said: list[str] = []
    keep = keeper(home, record, said)
    monkeypatch.setattr(keep, "_command", ("sh", "-c", "echo '{\"ok\": true}'"))  # no result
    for _ in range(2):
        with pytest.raises(UpkeepError, match="KeyError: 'result'"):
            await keep.do("backup")
    assert said == ["The backup failed: KeyError: 'result'; see ./puter.sh verify"]
    assert "KeyError" in keep.told()["backup"]["error"]


async def test_a_backup_on_command_is_told(home: Home) -> None:
    async def record(event: str, **_: Any) -> None:
        pass

    keep = keeper(home, record, [])
    assert keep.told()["backup"]["last"] is None
    assert home.run("backup").returncode == 0
    newest = home.backups.newest()
    told = {"last": newest.verified, "verified": newest.verified, "bytes": newest.bytes}
    assert keep.told()["backup"] == told


@pytest.mark.slow
async def test_what_fails_is_told_once_and_tried_again(start_kernel: Start, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "somebody's file").touch()
    settings = scripted(tmp_path, [], BACKUP_INTERVAL_S="0.2", BACKUP_DIR=str(folder))
    process = start_kernel(settings)
    async with process.client() as kernel:
        await until(lambda: len(records(process, "upkeep")) >= 2)
        assert {record["outcome"] for record in records(process, "upkeep")} == {"failed"}
        assert process.log.count("The backup failed: ") == 1
        assert "is no folder of backups" in (await kernel.request("status"))["upkeep"]["backup"]["error"]
        (folder / "somebody's file").unlink()
        await until(lambda: any(record["outcome"] == "done" for record in records(process, "upkeep")))
        assert "error" not in (await kernel.request("status"))["upkeep"]["backup"]


@pytest.mark.slow
async def test_safe_mode_and_zero_mean_no_schedule(start_kernel: Start, tmp_path: Path) -> None:
    safe = scripted(tmp_path, [], SAFE_MODE="true", BACKUP_INTERVAL_S="0.1", PACK_INTERVAL_S="0.1")
    process = start_kernel(safe)
    async with process.client() as kernel:
        made = await kernel.request("upkeep", what="backup")  # on command all the same
        assert made["stamp"] == backups(process).newest().stamp
        assert len(records(process, "upkeep")) == 1


@pytest.mark.slow
async def test_shutting_down_ends_a_backup(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        for number in range(4):
            await kernel.request("remember", text=f"{number}" * 900_000)
        asking = asyncio.create_task(kernel.request("upkeep", what="backup"))
        await until(lambda: list(process.home.glob("backups/.lock")))
        with pytest.raises(UpkeepBusy):
            await kernel.request("upkeep", what="pack")
        assert await asyncio.to_thread(process.stop) == 0
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    locked = files.alone(process.home / "backups" / ".lock", "backup into this folder")

    def free() -> bool:
        with contextlib.suppress(UpkeepBusy), locked:
            return True
        return False

    assert free()
    assert not list(process.home.glob("backups/scratch-*"))


@pytest.mark.slow
async def test_a_kernel_killed_while_it_packs(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    for _ in range(3):
        async with process.client() as kernel:
            for _ in range(20):
                await kernel.request("create_object", name=f"thing_{os.urandom(4).hex()}")
            count = len(await kernel.request("list_objects", limit=1000))
            asking = asyncio.create_task(kernel.request("upkeep", what="pack", days=0.0))

            def packing(request: asyncio.Task[Any] = asking) -> bool:
                return request.done() or bool(list(process.home.glob("live_image.fs.pack")))

            await until(packing)
            await asyncio.to_thread(process.kill)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await asyncio.to_thread(process.start)
        async with process.client() as kernel:
            assert len(await kernel.request("list_objects", limit=1000)) == count
    assert walk(process.home / "live_image.fs").problems == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["backup", "restore", "verify", "pack"])
def test_the_launcher_passes_a_verb_and_its_options_on(tmp_path: Path, verb: str) -> None:
    project = Project(tmp_path)
    project.write("upkeep.py", "import sys; print(sys.argv[1:]); sys.exit(7)")
    assert "run: ./puter.sh setup" in project.puter(verb, BATOS_VENV=str(tmp_path / "none")).stderr
    result = project.puter(verb, "--to", "a folder")
    assert (result.returncode, result.stdout.strip()) == (7, str([verb, "--to", "a folder"]))
    assert f"  {verb} " in project.puter("help").stdout
