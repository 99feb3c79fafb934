"""The dump that `puter.sh inspect` prints: as useful as fsdump, and nothing in the file can make it act."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_image_attacks import FORGED, Forge, called, record, text, undo_in_storage
from uvm.image import dump, history
from uvm.image.prototypes import UvmMethod


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    return Forge(tmp_path)


def dumped(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uvm.image.dump", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def fsdump(path: Path) -> str:
    command = [sys.executable, "-m", "ZODB.FileStorage.fsdump", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def change(forge: Forge) -> None:
    async def unit() -> None:
        image = forge.opened()
        async with image.transaction("a note to find") as txn:
            victim = txn.find("victim")
            source = "def f(self, x):\n    return x\n"
            history.install(txn, victim, UvmMethod("f", ("x",), source, "", {}, []))
            txn.create("other", (), {})
        undo_in_storage(image, txn.tid)
        image.close()

    asyncio.run(unit())


def test_it_prints_what_fsdump_prints(forge: Forge) -> None:
    change(forge)
    ours = dumped(forge.path)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert ours.stdout == fsdump(forge.path)
    assert "a note to find" in ours.stdout
    assert "uvm.image.prototypes.UvmMethod" in ours.stdout
    assert "undo or abort of object creation" in ours.stdout


def test_one_object_alone(forge: Forge) -> None:
    change(forge)
    by_name = dumped(forge.path, "--object", "victim").stdout
    assert {line.split("oid=")[1][:16] for line in by_name.splitlines() if "oid=" in line} == {
        forge.victim.hex(),
        (forge.slots or b"").hex(),
    }
    assert "a note to find" in by_name
    by_oid = dumped(forge.path, "--oid", forge.victim.hex().lstrip("0")).stdout
    assert by_oid.count("Trans #") == 1
    assert "foundations" not in by_oid
    for options in (["--object", "nobody"], ["--object", "victim", "--oid", "1"], ["--oid", "x"]):
        assert dumped(forge.path, *options).returncode != 0
    assert "--object" in dumped(forge.path, "--help").stdout


def test_it_reads_beside_a_kernel_and_takes_no_lock(forge: Forge) -> None:
    image = forge.opened()
    assert "make the victim" in dumped(forge.path).stdout
    image.close()


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_record_is_named_and_not_run(forge: Forge, case: str) -> None:
    where, data = FORGED[case](forge)
    forge.write((getattr(forge, where), data))
    done = dumped(forge.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "description=b'forged'" in done.stdout
    assert not forge.canary.exists()


def test_stock_fsdump_runs_a_forged_record(forge: Forge) -> None:
    """Why it is only for images that one trusts: what does not begin with a class is unpickled."""
    evil = b"\x80\x03]" + called("os.system", forge.touch) + b"\x86." + b"\x80\x03}."
    forge.write((forge.victim, evil))
    assert "class=os.system" in dumped(forge.path).stdout
    assert not forge.canary.exists()
    fsdump(forge.path)
    assert forge.canary.exists()


def test_a_forged_extension_is_not_read(forge: Forge) -> None:
    forge.write((forge.victim, record(b"N")), extension=b"\x80\x03" + called("os.system", forge.touch) + b".")
    assert dumped(forge.path).returncode == 0
    assert not forge.canary.exists()


@pytest.mark.parametrize("cut", [1, 9, 40, 200])
def test_a_torn_end_is_one_line(forge: Forge, cut: int) -> None:
    whole = dumped(forge.path).stdout
    change(forge)
    content = forge.path.read_bytes()
    ends = dumped(forge.path, "--oid", "ffff").stdout
    assert ends == ""
    forge.path.write_bytes(content[:-cut])
    done = dumped(forge.path)
    assert done.returncode == 0
    assert done.stdout.startswith(whole)
    assert done.stderr.count("\n") == 1
    assert "no whole transaction" in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"no image at all",
        lambda content: b"",
        lambda content: content[:200] + b"\xff" * 60 + content[260:],
        lambda content: content[:4] + b"\0" * (len(content) - 4),
    ],
)
def test_damage_is_one_line(forge: Forge, damage: Any) -> None:
    forge.path.write_bytes(damage(forge.path.read_bytes()))
    done = dumped(forge.path)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.fs", tmp_path):
        done = dumped(path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_does_no_harm(forge: Forge) -> None:
    for n in range(300):
        forge.write((forge.victim, record(b"N")), note=f"note {n} " + "x" * 300)
    command = f"{sys.executable} -m uvm.image.dump {forge.path} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_what_is_printed_is_bounded_and_can_not_steer_a_terminal(forge: Forge) -> None:
    name = "x\x1b[2J" * 10_000
    forge.write(
        (forge.victim, b"\x80\x03" + text("os") + text(name) + b"\x86." + b"\x80\x03}."), note="n" * 9_999
    )
    done = dumped(forge.path)
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 3 * dump.MAX_TEXT
    assert dump.class_of(b"\x80\x03" + b"(" * 100_000 + b".") == "(none)"
