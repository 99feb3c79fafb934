"""Backups and what they are for: real files, real processes, kills at every step."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.upkeep import PROJECT, Home, blob_image, killed_at
from uvm.errors import ImageLocked, NoBackup, NotVerified, ResourceExhausted, UpkeepBusy, UpkeepError
from uvm.image.chain import ChainReader
from uvm.image.recovery import preflight
from uvm.image.storage import index_of, read_index
from uvm.upkeep import files
from uvm.upkeep.backups import Backups
from uvm.upkeep.restore import parse_time, restore
from uvm.upkeep.verify import verify
from uvm.upkeep.walk import walk


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.write("counter", 1)
    return home


def flip(path: Path, what: bytes, to: bytes) -> None:
    """Damages a file as a bad disk does: its size stays."""
    data = path.read_bytes()
    assert what in data
    assert len(what) == len(to)
    path.write_bytes(data.replace(what, to))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestChains:
    def test_increments_restore_each_state(self, home: Home) -> None:
        made = [home.back_up()]
        for value in (2, 3):
            home.write("counter", value)
            made.append(home.back_up())
        assert [backup.full for backup in made] == [True, False, False]
        assert home.backups.kept() == made
        for value, backup in enumerate(made, 1):
            home.restore(backup.stamp)
            assert home.read("counter") == value

    def test_an_increment_holds_what_is_new_alone(self, home: Home) -> None:
        home.write("ballast", "x" * 100_000)
        full = home.back_up()
        home.write("counter", 2)
        second = home.back_up()
        assert (home.backups.folder / second.file).stat().st_size == second.bytes - full.bytes < 2000

    def test_nothing_new_is_verified_again(self, home: Home) -> None:
        first = home.back_up()
        files_before = names(home.backups.folder)
        again = home.back_up()
        assert again.stamp == first.stamp
        assert again.verified > first.verified
        assert names(home.backups.folder) == files_before

    def test_a_pack_begins_a_new_chain(self, home: Home) -> None:
        home.write("counter", 2)
        home.back_up()
        with home.opened() as image:
            image.pack(time_of(image.last_transaction()) + 1)
        backup = home.back_up()
        assert backup.full
        home.write("counter", 3)
        assert home.back_up().chain == backup.stamp

    def test_old_chains_go_and_their_blobs(self, home: Home) -> None:
        old = home.add_blobs(b"one", b"two")
        first = home.back_up(keep=2, full_every=2)
        shutil.rmtree(home.blob_dir)
        for value in range(5):
            home.write("counter", value)
            home.back_up(keep=2, full_every=2)
        kept = home.backups.kept()
        assert len({backup.chain for backup in kept}) == 2
        assert first not in kept
        assert not list(home.backups.folder.glob(f"{first.stamp}.*"))
        assert not files.blob_files(home.backups.folder / "blobs").keys() & old.keys()
        for backup in kept:
            assert home.backups.check(backup).problems == ()

    def test_repozo_alone_could_restore_them(self, home: Home, tmp_path: Path) -> None:
        home.back_up()
        home.write("counter", 2)
        home.back_up()
        out = tmp_path / "out.fs"
        command = [sys.executable, "-m", "ZODB.scripts.repozo", "-R", "-w", "-D", "2100-01-01"]
        command += ["-r", str(home.backups.folder), "-o", str(out)]
        subprocess.run(command, check=True, timeout=60)
        assert out.read_bytes() == home.image.read_bytes()

    def test_a_clock_that_was_set_back(self, home: Home) -> None:
        first = home.back_up()
        for path in list(home.backups.folder.glob(f"{first.stamp}.*")):
            later = path.with_name(path.name.replace(first.stamp, "2099-12-31-23-59-59"))
            later.write_text(path.read_text("latin-1").replace(first.stamp, later.stem), "latin-1")
            path.unlink()
        home.write("counter", 2)
        backup = home.back_up()
        assert backup.stamp == "2100-01-01-00-00-00"
        home.restore()
        assert home.read("counter") == 2


def time_of(tid: str) -> float:
    from ZODB.TimeStamp import TimeStamp

    return float(TimeStamp(bytes.fromhex(tid)).timeTime())


class TestBlobs:
    def test_they_are_copied_once_and_come_back(self, home: Home) -> None:
        blobs = home.add_blobs(b"a model" * 1000, b"another")
        first = home.back_up()
        assert first.blobs == blobs
        store = home.backups.folder / "blobs"
        before = {name: (store / name).stat().st_mtime_ns for name in blobs}
        home.write("counter", 2)
        home.back_up()
        assert {name: (store / name).stat().st_mtime_ns for name in blobs} == before
        contents = {name: (home.blob_dir / name).read_bytes() for name in blobs}
        shutil.rmtree(home.blob_dir)
        home.restore()
        assert {name: (home.blob_dir / name).read_bytes() for name in blobs} == contents

    def test_a_blob_that_a_backup_lost_is_told(self, home: Home) -> None:
        (name,) = home.add_blobs(b"a model")
        backup = home.back_up()
        (home.backups.folder / "blobs" / name).unlink()
        with pytest.raises(NotVerified, match=f"blob {name} is missing"):
            home.backups.check(backup)
        home.back_up()  # nothing else is new; the copy comes back
        assert home.backups.check(backup).problems == ()

    def test_a_blob_that_a_backup_has_damaged_is_told_and_mended(self, home: Home, tmp_path: Path) -> None:
        (name,) = home.add_blobs(b"a model")
        backup = home.back_up()
        flip(home.backups.folder / "blobs" / name, b"model", b"modem")
        with pytest.raises(NotVerified, match=f"blob {name} is damaged"):
            home.backups.check(backup)
        with pytest.raises(NotVerified, match=f"blob {name} is damaged"):
            restore(home.backups, tmp_path / "copy.fs", tmp_path / "copy.blobs")
        home.back_up()
        assert home.backups.check(backup).problems == ()
        home.restore()
        assert (home.blob_dir / name).read_bytes() == b"a model"

    def test_a_manifest_without_sums_is_one_of_before(self, home: Home) -> None:
        (name,) = home.add_blobs(b"a model")
        backup = home.back_up()
        manifest = home.backups.folder / f"{backup.stamp}.json"
        told = json.loads(manifest.read_text())
        del told["sums"]
        manifest.write_text(json.dumps(told))
        (older,) = home.backups.kept()
        assert home.backups.check(older).problems == ()
        assert home.back_up().sums.keys() == {name}

    def test_a_record_of_a_blob_needs_its_file(self, tmp_path: Path) -> None:
        path, blobs = blob_image(tmp_path / "other.fs", b"a model")
        ((oid, tid),) = walk(path).blobs
        assert not [line for line in verify(path, blobs).problems if "is missing" in line]
        (name,) = files.blob_files(blobs)
        (blobs / name).unlink()
        missing = f"blob file of object {oid.hex()}, transaction {tid.hex()}, is missing"
        assert missing in verify(path, blobs).problems


class TestDamage:
    def test_a_damaged_image_makes_no_backup_and_costs_none(self, home: Home) -> None:
        home.write("word", "before")
        good = home.back_up()
        home.write("second", "after")
        flip(home.image, b"uvm.image.prototypes", b"uvm.image.prototypos")
        result = home.run("backup")
        assert result.returncode == 1
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert "does not verify" in error
        assert "uvm.image.prototypos" in error
        assert home.backups.kept() == [good]
        assert not [name for name in names(home.backups.folder) if name.startswith("scratch-")]
        home.restore()
        assert home.read("word") == "before"

    def test_a_damaged_chain_is_left_for_a_new_one(self, home: Home) -> None:
        home.write("word", "sound")
        first = home.back_up()
        flip(home.backups.folder / first.file, b"sound", b"SOUND")
        home.write("counter", 2)
        assert home.back_up().full
        with pytest.raises(NotVerified, match="is damaged"):
            home.restore(first.stamp)
        assert home.read("counter") == 2
        home.restore()

    def test_a_lost_part_is_told(self, home: Home) -> None:
        backup = home.back_up()
        (home.backups.folder / backup.file).unlink()
        result = home.run("verify", "--backups")
        assert result.returncode == 1
        assert f"{backup.file} is missing" in result.stderr

    def test_what_never_counted_is_swept(self, home: Home) -> None:
        home.back_up()
        folder = home.backups.folder
        for name in ("tmp.tmp", "2020-01-01-00-00-00.fs", "2020-01-01-00-00-00.dat"):
            (folder / name).write_bytes(b"half")
        (folder / "scratch-x").mkdir()
        (folder / "a note of the user").write_text("stays")
        home.write("counter", 2)
        home.back_up()
        stale = {"tmp.tmp", "2020-01-01-00-00-00.fs", "2020-01-01-00-00-00.dat", "scratch-x"}
        assert not names(folder) & stale
        assert (folder / "a note of the user").exists()


class TestWhere:
    def test_a_strange_folder_is_refused(self, home: Home, tmp_path: Path) -> None:
        strange = tmp_path / "strange"
        strange.mkdir()
        (strange / "2020-01-01-00-00-00.fs").write_bytes(b"of somebody else")
        result = home.run("backup", "--to", str(strange))
        assert result.returncode == 1
        assert "is no folder of backups" in result.stderr
        assert (strange / "2020-01-01-00-00-00.fs").read_bytes() == b"of somebody else"

    def test_a_folder_of_another_image_is_refused(self, home: Home, tmp_path: Path) -> None:
        home.back_up()
        other = Home(tmp_path / "other")
        other.write("counter", 9)
        result = other.run("backup", "--to", str(home.backups.folder))
        assert result.returncode == 1
        assert "holds backups of another image (../live_image.fs)" in result.stderr

    def test_a_home_can_be_moved(self, tmp_path: Path) -> None:
        home = Home(tmp_path / "here")
        home.write("counter", 1)
        home.back_up()
        moved = Home((tmp_path / "here").rename(tmp_path / "there with spaces"))
        moved.write("counter", 2)
        assert not moved.back_up().full
        moved.restore()
        assert moved.read("counter") == 2

    def test_one_at_a_time(self, home: Home) -> None:
        first = home.back_up()
        for lock, who in (
            (files.image_lock(home.image), "upkeep of this image"),
            (home.backups.folder / ".lock", "backup into this folder"),
        ):
            with files.alone(lock, "test"):
                result = home.run("backup")
                with pytest.raises(UpkeepBusy):
                    home.back_up()
            assert (result.returncode, result.stdout) == (1, "")
            assert f"another {who} is under way" in result.stderr
        assert home.back_up().stamp == first.stamp

    def test_no_image_yet(self, tmp_path: Path) -> None:
        result = Home(tmp_path).run("backup")
        assert result.returncode == 1
        assert "no living image" in result.stderr
        assert not (tmp_path / "live_image.fs").exists()

    def test_an_image_of_a_server(self, home: Home) -> None:
        result = home.run("backup", BATOS_DB_FILE="zeo://localhost:9999")
        assert result.returncode == 1
        assert "is no image file" in result.stderr

    def test_nothing_sweeps_a_backup_that_is_being_read(self, home: Home) -> None:
        home.back_up()
        for arguments in (("verify", "--backups"), ("restore",)):
            with files.alone(home.backups.folder / ".lock", "test"):
                result = home.run(*arguments)
            assert result.returncode == 1
            assert "another backup into this folder is under way" in result.stderr
        told: list[str] = []

        def meet(phase: str) -> None:
            told.append(phase)
            with pytest.raises(UpkeepBusy):
                home.back_up()

        backups = Backups(home.backups.folder, meet)
        backups.check(backups.newest())
        assert told

    def test_a_folder_that_can_not_be_locked_is_read_without(self, home: Home, tmp_path: Path) -> None:
        backup = home.back_up()
        lock = home.backups.folder / ".lock"
        lock.unlink()
        lock.symlink_to(tmp_path / "nowhere" / "lock")
        restore(home.backups, tmp_path / "copy.fs", tmp_path / "copy.blobs")
        assert (tmp_path / "copy.fs").stat().st_size == backup.bytes

    @pytest.mark.parametrize(
        "wrong",
        [{"verified": None}, {"verified": float("nan")}, {"bytes": "1"}, {"blobs": []}, {"sums": {"a": 1}}],
    )
    def test_a_manifest_that_is_none_does_not_count(self, home: Home, wrong: dict[str, object]) -> None:
        backup = home.back_up()
        manifest = home.backups.folder / f"{backup.stamp}.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | wrong))
        assert home.backups.kept() == []
        assert home.back_up().full


class TestKills:
    def test_a_backup_killed_at_any_step_costs_no_other(self, home: Home) -> None:
        home.add_blobs(b"a model")
        first = home.back_up(keep=1, full_every=2)
        step = 0
        while True:
            step += 1
            home.write("counter", step)
            killed = killed_at(step, lambda: home.back_up(keep=1, full_every=2))
            newest = home.backups.newest()
            assert newest.stamp >= first.stamp
            assert home.backups.check(newest).problems == ()
            if not killed:
                break
            first = newest
        assert step > 8
        home.write("counter", "last")
        home.back_up()
        home.restore()
        assert home.read("counter") == "last"

    def test_a_restore_killed_at_any_step_leaves_one_of_the_two(self, home: Home) -> None:
        blobs = home.add_blobs(b"a model")
        home.back_up()
        step = 0
        killed = True
        while killed:
            step += 1
            home.write("counter", "newer")
            newer = home.add_blobs(b"later")
            killed = killed_at(step, home.restore)
            assert step < 200
            value = home.read("counter")
            assert value in (1, "newer")
            owned = newer if value == "newer" else blobs
            assert owned.items() <= files.blob_files(home.blob_dir).items()
            for path in home.folder.glob("*.before-restore-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for name in files.blob_files(home.blob_dir).keys() - blobs.keys():
                (home.blob_dir / name).unlink()
        assert step > 8
        assert files.blob_files(home.blob_dir) == blobs
        assert home.read("counter") == 1
        assert not list(home.folder.glob(".restore-*"))

    def test_a_pack_killed_at_any_step_leaves_the_image(self, home: Home) -> None:
        step = 0
        killed = True
        while killed:
            step += 1
            home.write("counter", step)
            home.write("counter", -step)

            def pack() -> None:
                with home.opened() as image:
                    image.pack(time_of(image.last_transaction()) + 1)

            killed = killed_at(step, pack)
            assert home.read("counter") == -step
            assert verify(home.image, home.blob_dir).problems == ()
            assert not Path(f"{home.image}.pack").exists()
        assert step > 8

    def test_an_interrupted_command_says_so_and_sweeps(self, home: Home) -> None:
        home.write("ballast", ["x" * 1000] * 20_000)
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "upkeep.py"), "backup"],
            env=home.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert "copying" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.stderr.read()
        assert process.wait(60) == 130
        process.stderr.close()
        assert not [name for name in names(home.backups.folder) if name.startswith(("scratch", "20", "tmp"))]


class TestNoRoom:
    def test_a_full_disk_is_told_and_costs_nothing(self, home: Home) -> None:
        good = home.back_up()
        home.write("ballast", os.urandom(300_000))
        limit = 200_000  # what a file may have: writing beyond fails as on a full disk
        result = subprocess.run(
            [sys.executable, str(PROJECT / "upkeep.py"), "backup"],
            env=home.environment | {"PYTHONDONTWRITEBYTECODE": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 1
        assert "the disk is full" in result.stderr.splitlines()[-1]
        assert home.backups.kept() == [good]
        assert not [name for name in names(home.backups.folder) if "tmp" in name or "scratch" in name]
        home.back_up()
        home.restore()

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs files with holes")
    def test_blobs_need_room_too(self, home: Home) -> None:
        (name,) = home.add_blobs(b"a model")
        os.truncate(home.blob_dir / name, 1 << 43)  # with a hole of 8 TiB
        with pytest.raises(ResourceExhausted, match=r"needs 8,796,093,\d+,\d+ bytes"):
            home.back_up()
        os.truncate(home.blob_dir / name, 7)
        backup = home.back_up()
        manifest = home.backups.folder / f"{backup.stamp}.json"
        told = json.loads(manifest.read_text()) | {"blobs": {name: 1 << 43}}
        manifest.write_text(json.dumps(told))
        with pytest.raises(ResourceExhausted, match=r"restoring backup .*needs 8,796,093"):
            home.restore()
        assert home.read("counter") == 1


class TestRestore:
    def test_its_index_is_one_that_a_kernel_trusts(self, home: Home) -> None:
        home.back_up()
        home.restore()
        with home.image.open("rb") as file:
            found = read_index(home.image, ChainReader(file, home.image.stat().st_size))
        assert found is not None
        assert found.end == home.image.stat().st_size

    def test_the_image_before_is_kept_with_its_blobs(self, home: Home) -> None:
        blobs = home.add_blobs(b"a model")
        home.back_up()
        home.write("counter", "lost?")
        later = home.add_blobs(b"later")
        result = home.run("restore")
        assert result.returncode == 0, result.stderr
        assert "To go back" in result.stdout
        assert home.read("counter") == 1
        assert files.blob_files(home.blob_dir) == blobs
        (back,) = [line for line in result.stdout.splitlines() if "To go back" in line]
        subprocess.run(["sh", "-ec", back.partition("stop the kernel, then ")[2]], check=True)
        assert home.read("counter") == "lost?"
        assert files.blob_files(home.blob_dir) == later

    def test_an_open_image_is_refused(self, home: Home) -> None:
        home.back_up()
        with home.opened(), pytest.raises(ImageLocked, match=r"stop it with \./puter\.sh stop"):
            home.restore()

    def test_to_another_file_and_at_a_time(self, home: Home, tmp_path: Path) -> None:
        home.add_blobs(b"a model")
        first = home.back_up()
        home.write("counter", 2)
        home.back_up()
        target = tmp_path / "elsewhere" / "copy.fs"
        result = home.run("restore", "--at", first.stamp, "--to", str(target))
        assert result.returncode == 0, result.stderr
        assert verify(target, Path(f"{target}.blob")).problems == ()
        assert home.read("counter") == 2
        early = home.run("restore", "--at", "2001-01-01")
        assert early.returncode == 1
        assert f"the first is of {first.stamp}" in early.stderr

    def test_without_an_image_and_without_backups(self, home: Home, tmp_path: Path) -> None:
        home.back_up()
        home.image.unlink()
        assert home.run("restore").returncode == 0
        assert home.read("counter") == 1
        with pytest.raises(NoBackup, match=r"make one: \./puter\.sh backup"):
            Backups(tmp_path / "nothing").newest()

    @pytest.mark.parametrize(
        ("text", "stamp"),
        [
            ("2026-01-31-18-30-00", "2026-01-31-18-30-00"),
            ("2026-01-31T18:30", "2026-01-31-18-30-00"),
            ("2026-01-31 18:30:05+02:00", "2026-01-31-16-30-05"),
            ("2026-01-31", "2026-01-31-23-59-59"),
        ],
    )
    def test_times(self, text: str, stamp: str) -> None:
        assert parse_time(text) == stamp

    def test_no_time(self) -> None:
        with pytest.raises(UpkeepError, match="is no time"):
            parse_time("yesterday")


def test_a_user_can_start_afresh_beside_an_old_pack(home: Home) -> None:
    shutil.copy(home.image, f"{home.image}.old")
    home.image.unlink()
    index_of(home.image).unlink()
    preflight(home.image, print)
    assert not home.image.exists()
