"""Images of older schemas, as they were written, and what a newer kernel makes of them."""

import asyncio
import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import opened
from uvm.awakening import CATALOG, primordial
from uvm.errors import ImageDamaged, NotUndoable
from uvm.grant_options import NoOptions
from uvm.granting import Granting
from uvm.image import history, journal, migrations
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.undoing import Undoing

PROJECT = Path(__file__).resolve().parent.parent
SCHEMA_1 = PROJECT / "tests" / "images" / "schema-1.fs.gz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of an image of schema 1."""
    (tmp_path / "live_image.fs").write_bytes(gzip.decompress(SCHEMA_1.read_bytes()))
    return tmp_path


def granting(image: LivingImage) -> Granting:
    async def settled(options: dict[str, Any]) -> dict[str, Any]:
        return options

    return Granting(image, settled)


def method(selector: str) -> UvmMethod:
    return UvmMethod(selector, (), f"def {selector}(self):\n    return 1\n", "", {}, [])


async def holders(image: LivingImage) -> list[str]:
    async with image.reading() as txn:
        return [txn.find(oid).label for oid in txn.root["holders"]]


class TestFromSchema1:
    async def test_all_is_as_before(self, old: Path) -> None:
        told: list[str] = []
        with opened(old, told) as image:
            async with image.reading() as txn:
                assert txn.root["schema"] == migrations.SCHEMA == 2
                genesis, tally = txn.find("genesis_obj"), txn.find("tally_obj")
                double = history.own_method(genesis, "double")
                assert [version["version"] for version in history.versions(double)] == [1, 2]
                assert list(tally.methods()) == ["count_up"]
                assert list(tally.data()) == ["count", "names", "more", "partner"]
                assert tally.partner is genesis
                assert [grant.kind for grant in tally.grants().values()] == ["clock"]
                rows = {row.brief["selector"]: row for row in journal.backwards(txn)}
                assert rows["never"].state == journal.FAILED
                assert (rows["slow_one"].state, rows["slow_one"].starts) == (journal.RUNNING, 1)
                assert [row.brief["selector"] for row in journal.unfinished(txn)] == ["slow_one"]
                kinds = {chunk.kind for chunk in txn.find(CATALOG).chunks().values()}
                assert kinds == {"document", "method"}
            assert set(await holders(image)) == {"genesis_obj", "tally_obj"}
            assert [row["object"] for row in await granting(image).listed(None)] == ["tally_obj"]
        assert told == ["The image is brought up to date: schema 1 -> 2"]

    def test_a_second_start_migrates_nothing(self, old: Path) -> None:
        with opened(old) as image:
            last = image.last_transaction()
        told: list[str] = []
        with opened(old, told) as image:
            assert image.last_transaction() == last
        assert told == []

    @pytest.mark.parametrize("moment", ["in the middle of a step", "before the commit is finished"])
    def test_a_kill_leaves_the_old_schema_whole(self, old: Path, moment: str) -> None:
        before = (old / "live_image.fs").read_bytes()
        patch = {
            "in the middle of a step": "step = migrations.STEPS[1]\n"
            "migrations.STEPS[1] = lambda connection: (step(connection), os._exit(9))\n",
            "before the commit is finished": "ImageStorage._finish = lambda *_: os._exit(9)\n",
        }[moment]
        code = (
            "import os\nfrom pathlib import Path\nfrom uvm.image import migrations\n"
            "from uvm.image.image import LivingImage\nfrom uvm.image.storage import ImageStorage\n"
            f"{patch}folder = Path({str(old)!r})\n"
            "LivingImage(str(folder / 'live_image.fs'), folder / 'blobs').open()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 9, done.stderr
        assert (old / "live_image.fs").read_bytes()[: len(before)] == before
        told: list[str] = []
        with opened(old, told) as image:
            assert set(asyncio.run(holders(image))) == {"genesis_obj", "tally_obj"}
        assert told[-1] == "The image is brought up to date: schema 1 -> 2"

    async def test_the_image_rests_on_it_and_no_undo_takes_it_back(self, old: Path) -> None:
        with opened(old) as image:
            undoing = Undoing(image, CATALOG, frozenset(primordial()))
            with pytest.raises(NotUndoable):
                await undoing.undo(image.last_transaction(), "architect")

    async def test_a_step_that_fails_leaves_nothing(self, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(connection: Any) -> None:
            connection.root()["names"].clear()
            raise ZeroDivisionError

        before = (old / "live_image.fs").read_bytes()
        monkeypatch.setitem(migrations.STEPS, 1, fail)
        with pytest.raises(ZeroDivisionError), opened(old):
            pass
        assert (old / "live_image.fs").read_bytes() == before

    @pytest.mark.parametrize("schema", [3, 0, "2", None.__class__, [1]])
    async def test_other_schemas_are_refused(self, old: Path, schema: Any) -> None:
        with opened(old) as image:
            async with image.transaction("from the future") as txn:
                txn.root["schema"] = schema if not isinstance(schema, type) else 99
        with pytest.raises(ImageDamaged, match="use a newer kernel"), opened(old):
            pass


class TestHolders:
    async def test_methods_and_grants_are_noted_once(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("make") as txn:
                txn.create("plain", (), {"n": 1})
                history.install(txn, txn.create("able", (), {}), method("f"))
                txn.create("granted", (), {})
            await granting(image).grant("granted", "clock", NoOptions(kind="clock"))
            assert await holders(image) == ["able", "granted"]
            assert [row["object"] for row in await granting(image).listed(None)] == ["granted"]
            before = await self._serial(image)
            async with image.transaction("again") as txn:
                history.install(txn, txn.find("able"), method("f"))
                history.install(txn, txn.find("able"), method("g"))
            await granting(image).grant("granted", "clock", NoOptions(kind="clock"))
            assert await self._serial(image) == before

    async def _serial(self, image: LivingImage) -> bytes:
        async with image.reading() as txn:
            list(txn.root["holders"])
            return bytes(txn.root["holders"]._p_serial)

    async def test_a_revoked_grant_is_listed_no_more(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("make") as txn:
                txn.create("granted", (), {})
            await granting(image).grant("granted", "clock", NoOptions(kind="clock"))
            await granting(image).revoke("granted", "clock")
            assert await granting(image).listed(None) == []

    async def test_an_object_whose_making_was_undone_is_passed_over(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("make") as txn:
                txn.create("granted", (), {})
            async with image.transaction("note") as noting:
                noting.root["holders"].add("f" * 16)
            assert await granting(image).listed(None) == []

    async def test_two_at_once_are_both_noted(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("make") as txn:
                for name in ("zero", "one", "two"):
                    txn.create(name, (), {})
                history.install(txn, txn.find("zero"), method("f"))

            async def learn(name: str) -> None:
                def unit(txn: Txn) -> None:
                    history.install(txn, txn.find(name), method("f"))

                await image.attempt(f"learn {name}", unit)

            await asyncio.gather(learn("one"), learn("two"))
            assert set(await holders(image)) == {"zero", "one", "two"}
