"""Start-up recovery: torn and damaged images, what kills leave, and an index that lasts; on real files."""

import asyncio
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileIterator
from ZODB.TimeStamp import TimeStamp

from evals.damages import damage_many
from evals.kernels import free_endpoint
from evals.report import Report
from min_watchdog_service import EXIT_CANNOT_START
from tests.conftest import opened
from uvm.errors import ImageDamaged
from uvm.image import journal, storage
from uvm.image.chain import MAGIC, ChainReader
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmObject
from uvm.image.recovery import sweep
from uvm.image.storage import index_of, read_index
from uvm.image.txn import Txn
from uvm.upkeep.backups import Backups
from uvm.upkeep.restore import restore

PROJECT = Path(__file__).resolve().parent.parent


def child(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, beside an image that it calls `image` once it is open."""
    head = (
        "import asyncio, os, shutil, sys\nfrom pathlib import Path\n"
        "from uvm.image import migrations, recovery, storage\nfrom uvm.image.image import LivingImage\n"
        f"folder = Path({str(folder)!r})\n"
        "image = LivingImage(str(folder / 'live_image.fs'), folder / 'blobs')\n"
    )
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, cwd=PROJECT)


async def make(image: LivingImage, *names: str, **slots: Any) -> None:
    for name in names:
        async with image.transaction(f"make {name}") as txn:
            txn.create(name, (), slots)


def names_in(folder: Path, told: list[str] | None = None) -> set[str]:
    async def read(image: LivingImage) -> set[str]:
        async with image.reading() as txn:
            return set(txn.names)

    with opened(folder, told) as image:
        return asyncio.run(read(image))


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """The folder of an image of three transactions with garbage behind them."""
    with opened(tmp_path) as image:
        asyncio.run(make(image, "one", "two", "three"))
    with (tmp_path / "live_image.fs").open("ab") as file:
        file.write(b"\xa5" * 5000)
    return tmp_path


def tails(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("live_image.fs.tail*"))]


class TestDamages:
    def test_nothing_whole_is_lost(self, tmp_path: Path) -> None:
        report = Report("damages")
        damage_many(tmp_path, 75, 7, report)  # every kind with every index
        assert [(case.id, case.reason) for case in report.cases if not case.passed] == []
        assert len(report.cases) == 75

    def test_a_quiet_start_says_nothing(self, tmp_path: Path) -> None:
        told: list[str] = []
        assert names_in(tmp_path, told) == names_in(tmp_path, told) == set()
        assert told == []

    def test_no_image_of_zodb_is_refused_untouched(self, tmp_path: Path) -> None:
        path = tmp_path / "live_image.fs"
        for content in (b"FS", b"a letter to somebody, long enough to be one", MAGIC + b"\xff" * 99):
            path.write_bytes(content)
            with pytest.raises(ImageDamaged, match=r"can't be opened.*puter\.sh restore"), opened(tmp_path):
                pass
            assert path.read_bytes() == content

    @pytest.mark.parametrize("content", [b"", MAGIC, MAGIC + bytes(4096)])
    def test_a_file_without_a_transaction_is_a_new_image(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "live_image.fs").write_bytes(content)
        assert names_in(tmp_path) == set()
        assert tails(tmp_path) == [bytes(4096)] * (len(content) > 4)

    def test_the_bytes_of_another_image_in_a_slot_are_no_transactions(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one"))
        other = (tmp_path / "live_image.fs").read_bytes()
        with opened(tmp_path) as image:
            asyncio.run(make(image, "two"))
            asyncio.run(make(image, "three", raw=other))
        whole = (tmp_path / "live_image.fs").read_bytes()
        (tmp_path / "live_image.fs").write_bytes(whole[:-1])
        assert names_in(tmp_path) == {"one", "two"}
        assert other in tails(tmp_path)[0]

    def test_what_follows_the_damage_is_named(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one", "two", "three"))
        path = tmp_path / "live_image.fs"
        starts = [found._tpos for found in FileIterator(str(path))]
        data = bytearray(path.read_bytes())
        data[starts[-2] + 8] ^= 1
        path.write_bytes(data)
        index_of(path).unlink()
        with pytest.raises(ImageDamaged, match="whole transactions follow") as refusal, opened(tmp_path):
            pass
        assert (refusal.value.details["at"], refusal.value.details["next"]) == (starts[-2], starts[-1])
        assert path.read_bytes() == data


class TestLoss:
    """What a saved index proves: the transactions that it knows were there."""

    @pytest.fixture
    def whole(self, tmp_path: Path) -> Path:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one", "two", "three"))
        return tmp_path / "live_image.fs"

    def test_a_cut_between_transactions_is_told_once(self, whole: Path) -> None:
        found = [(unit._tpos, unit.tid.hex()) for unit in FileIterator(str(whole))]
        with whole.open("r+b") as file:
            file.truncate(found[-1][0])
        told: list[str] = []
        assert names_in(whole.parent, told) == {"one", "two"}
        (line,) = told
        assert "MISSING" in line
        assert found[-2][1] in line
        assert found[-1][1] in line
        assert names_in(whole.parent, told) == {"one", "two"}
        assert len(told) == 1

    @pytest.mark.parametrize("content", [None, b"", MAGIC, MAGIC + bytes(4096)])
    def test_a_file_that_lost_all_is_no_new_image(self, whole: Path, content: bytes | None) -> None:
        index = index_of(whole).read_bytes()
        whole.unlink() if content is None else whole.write_bytes(content)
        refused = pytest.raises(ImageDamaged, match=r"knows of .*puter\.sh restore")
        with refused, opened(whole.parent):
            pass
        assert index_of(whole).read_bytes() == index
        assert (whole.read_bytes() if whole.exists() else None) == content
        index_of(whole).unlink()
        assert names_in(whole.parent) == set()

    def test_what_the_index_knows_was_acknowledged(self, whole: Path) -> None:
        starts = [unit._tpos for unit in FileIterator(str(whole))]
        data = bytearray(whole.read_bytes())
        data[starts[-1] + 16] = ord("c")  # as if a kill had interrupted its commit
        whole.write_bytes(data)
        told: list[str] = []
        assert names_in(whole.parent, told) == {"one", "two"}
        assert ["MISSING" in line for line in told] == [True, False]
        assert tails(whole.parent) == [bytes(data[starts[-1] :])]

    async def test_a_pack_that_took_the_last_transaction_is_no_loss(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("born") as txn:
                orphan = UvmObject(None, (), {"n": 1})
                txn.create("holder", (), {"child": orphan})
            async with image.transaction("let go") as txn:
                txn.edit(txn.find("holder"), {}, ["child"])
            async with image.transaction("garbage") as txn:
                txn.edit(txn.find(orphan.oid), {"n": 2})
            last = image.last_transaction()
            image.pack(TimeStamp(bytes.fromhex(last)).timeTime() + 1)
        told: list[str] = []
        with opened(tmp_path, told) as image:
            assert image.last_transaction() < last
        assert told == []

    def test_a_restore_of_an_older_backup_is_no_loss(self, whole: Path) -> None:
        backups = Backups(whole.parent / "backups")
        backups.make(whole, whole.parent / "blobs", keep=1, full_every=1)
        with opened(whole.parent) as image:
            asyncio.run(make(image, "four"))
        restore(backups, whole, whole.parent / "blobs")
        told: list[str] = []
        assert names_in(whole.parent, told) == {"one", "two", "three"}
        assert told == []


class TestServers:
    def test_one_that_is_down_is_no_damage(self, tmp_path: Path) -> None:
        address = free_endpoint().removeprefix("tcp://")
        environment = os.environ | {
            "BATOS_HOME": str(tmp_path),
            "BATOS_DB_FILE": f"zeo://{address}?wait_timeout=1",
            "BATOS_SENTENCE_TRANSFORMER_MODEL": "hashing",
        }
        ended = subprocess.run(
            [sys.executable, str(PROJECT / "batos.py")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        (line,) = [line for line in ended.stderr.splitlines() if "can't start" in line]
        assert "is its server up?" in line
        assert "restore" not in line
        assert ended.returncode not in (0, EXIT_CANNOT_START)  # so its watchdog tries again


class TestKills:
    def test_a_commit_that_was_not_finished_is_cut_without_ado(self, tmp_path: Path) -> None:
        names_in(tmp_path)
        dead = child(
            tmp_path,
            "async def main():\n"
            "    async with image.transaction('never finished') as txn:\n"
            "        txn.create('ghost', (), {'raw': b'x' * 100_000})\n"
            "image.open()\n"
            "image._db.storage._finish = lambda *_: os._exit(9)\n"
            "asyncio.run(main())\n",
        )
        assert dead.returncode == 9, dead.stderr
        told: list[str] = []
        assert names_in(tmp_path, told) == set()
        assert [line.split(" (")[0] for line in told] == ["An unfinished transaction"]
        assert tails(tmp_path) == []

    @pytest.mark.parametrize("moment", ["half of the tail is copied", "the tail is kept", "the index goes"])
    def test_recovery_itself_can_be_killed(self, torn: Path, moment: str) -> None:
        index_of(torn / "live_image.fs").write_bytes(b"garbage")
        patch = {
            "half of the tail is copied": "def die(source, target, piece):\n"
            "    target.write(source.read(100))\n    target.flush()\n    os._exit(9)\n"
            "shutil.copyfileobj = die\n",
            "the tail is kept": "keep = recovery._keep_aside\n"
            "recovery._keep_aside = lambda *found: (keep(*found), os._exit(9))\n",
            "the index goes": "recovery.index_of = lambda path: os._exit(9) if list(\n"
            "    folder.glob('*.tail-*')) else storage.index_of(path)\n",
        }[moment]
        dead = child(torn, patch + "image.open()\n")
        assert dead.returncode == 9, dead.stderr
        told: list[str] = []
        assert names_in(torn, told) == {"one", "two", "three"}
        assert "5,000 bytes" in told[0]
        assert set(tails(torn)) == {b"\xa5" * 5000}
        assert not (torn / "live_image.fs.tail.part").exists()

    def test_without_room_for_the_tail_nothing_is_cut(self, torn: Path) -> None:
        before = (torn / "live_image.fs").read_bytes()
        refused = child(
            torn,
            "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nimage.open()\n",
        )
        assert "so nothing was cut; make room for 5,000 bytes" in refused.stderr
        assert (torn / "live_image.fs").read_bytes() == before
        assert tails(torn) == []
        assert names_in(torn) == {"one", "two", "three"}
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000

    def test_a_pack_killed_between_its_renames_gives_the_image_back(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one"))
        dead = child(
            tmp_path,
            "image.open()\n"
            "rename = os.rename\n"
            "def die(old, new):\n"
            "    os._exit(9) if old.endswith('.pack') else rename(old, new)\n"
            "os.rename = die\n"
            "image._db.pack()\n",
        )
        assert dead.returncode == 9, dead.stderr
        assert not (tmp_path / "live_image.fs").exists()
        told: list[str] = []
        assert names_in(tmp_path, told) == {"one"}
        assert "pack" in told[0]
        assert not (tmp_path / "live_image.fs.pack").exists()

    def test_temporary_blob_files_are_swept_and_no_others(self, tmp_path: Path) -> None:
        names_in(tmp_path)
        folder = tmp_path / "blobs" / "tmp"
        (folder / "savepointsx1").mkdir()
        for name in ("BUCabc", "CTFTabc.tmp", "tmpq_1", "savepointsx1/0x01-0x02.spb", "notes.txt"):
            (folder / name).write_bytes(b"x")
        (folder / "BUClink").symlink_to(tmp_path / "live_image.fs")
        (tmp_path / "blobs" / "0x01.blob").write_bytes(b"x")
        told: list[str] = []
        names_in(tmp_path, told)
        assert told == ["Temporary blob files that a kill left behind: 5, removed"]
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]
        assert (tmp_path / "blobs" / "0x01.blob").exists()
        assert (tmp_path / "live_image.fs").exists()
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "BUCabc").write_bytes(b"x")
        assert sweep(tmp_path / "blobs") == 0


class TestIndex:
    def reach(self, folder: Path) -> int:
        path = folder / "live_image.fs"
        with path.open("rb") as file:
            found = read_index(path, ChainReader(file, path.stat().st_size))
        return found.end if found is not None else 0

    def test_it_follows_the_file_so_that_a_kill_costs_little(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "MIN_STEP", 50_000)
        with opened(tmp_path) as image:
            for number in range(10):
                asyncio.run(make(image, f"thing_{number}", raw=bytes(20_000)))
                if image._db.storage._saver is not None:
                    image._db.storage._saver.join()
            size = (tmp_path / "live_image.fs").stat().st_size
            assert size - self.reach(tmp_path) < 75_000
            asyncio.run(make(image, "last"))
        assert self.reach(tmp_path) == (tmp_path / "live_image.fs").stat().st_size
        assert len(names_in(tmp_path)) == 11

    def test_a_file_without_one_gets_one_while_it_is_open(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "thing", raw=bytes(90_000)))
        index_of(tmp_path / "live_image.fs").unlink()
        monkeypatch.setattr(storage, "MIN_STEP", 50_000)
        with opened(tmp_path) as image:
            image._db.storage._saver.join()
            assert self.reach(tmp_path) == (tmp_path / "live_image.fs").stat().st_size

    @pytest.mark.parametrize("flipped", [0, 1, 40, -1, -20, -45])
    def test_a_flipped_byte_is_noticed(self, tmp_path: Path, flipped: int) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one"))
        file = index_of(tmp_path / "live_image.fs")
        data = bytearray(file.read_bytes())
        assert self.reach(tmp_path)
        data[flipped] ^= 4
        file.write_bytes(data)
        assert self.reach(tmp_path) == 0
        assert names_in(tmp_path) == {"one"}

    def test_it_is_that_of_the_packed_file_after_a_pack(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one", "two"))
            for number in range(5):
                asyncio.run(self._set(image, number))
            image._db.pack()
            assert self.reach(tmp_path) == (tmp_path / "live_image.fs").stat().st_size
        assert names_in(tmp_path) == {"one", "two"}

    async def _set(self, image: LivingImage, number: int) -> None:
        async with image.transaction("set") as txn:
            txn.find("one").n = number

    def test_zodb_itself_reads_it(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            asyncio.run(make(image, "one"))
        code = f"from ZODB.FileStorage import FileStorage as F; s = F({str(tmp_path / 'live_image.fs')!r}); "
        done = subprocess.run(
            [sys.executable, "-c", code + "print(s._used_index); s.close()"], capture_output=True, text=True
        )
        assert done.stdout.strip() == "1", done.stderr


class TestVerification:
    async def spoil(self, folder: Path, unit: Any) -> None:
        with opened(folder) as image:
            await image.attempt("spoil", unit)

    async def test_an_open_mission_needs_its_row(self, tmp_path: Path) -> None:
        def unit(txn: Txn) -> None:
            row = journal.add(txn, "0" * 16, {"selector": "f"}, "test")
            del txn.missions[row.mission_id]

        await self.spoil(tmp_path, unit)
        refused = pytest.raises(ImageDamaged, match=r"no row of the open mission.*puter\.sh restore")
        with refused, opened(tmp_path):
            pass

    @pytest.mark.parametrize("name", ["names", "missions", "open_missions", "holders"])
    async def test_the_root_needs_its_trees(self, tmp_path: Path, name: str) -> None:
        await self.spoil(tmp_path, lambda txn: txn.root.pop(name) and None)
        with pytest.raises(ImageDamaged, match=f"no '{name}'"), opened(tmp_path):
            pass
        with pytest.raises(ImageDamaged, match=f"no '{name}'"), opened(tmp_path):
            pass
