"""The living image: prototypes, transactions, allow-list, journal and history, on a real file."""

import asyncio
import contextlib
import datetime as dt
import os
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from uvm import codec
from uvm.codec import Ref
from uvm.errors import (
    Conflict,
    DoesNotUnderstand,
    ForbiddenClass,
    ImageDamaged,
    ImageLocked,
    InvalidField,
    MethodNotFound,
    MissionNotFound,
    ObjectExists,
    ObjectNotFound,
)
from uvm.image import history, journal, storage
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod, UvmObject
from uvm.image.txn import Txn

VALUES: dict[str, Any] = {
    "nothing": None,
    "flag": True,
    "big": 10**50,
    "ratio": 0.5,
    "wave": 1 + 2j,
    "text": "grüß",
    "raw": b"\x00\xff",
    "items": [1, [2, (3,)]],
    "pair": (1, "a"),
    "bag": {1, 2},
    "frozen": frozenset({"a"}),
    "table": {"a": 1, 2: [3]},
    "day": dt.date(2020, 2, 29),
    "moment": dt.datetime(2020, 1, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=2), "X")),
    "hour": dt.time(1, 2),
    "span": dt.timedelta(1, 2),
    "zone": dt.UTC,
    "price": Decimal("1.50"),
    "third": Fraction(1, 3),
}


@contextlib.contextmanager
def opened(folder: Path) -> Any:
    image = LivingImage(str(folder / "live_image.fs"), folder / "blobs")
    image.open()
    try:
        yield image
    finally:
        image.close()


@pytest.fixture
def image(tmp_path: Path) -> Any:
    with opened(tmp_path) as image:
        yield image


def method(selector: str, source: str) -> UvmMethod:
    return UvmMethod(selector, ("x",), source, "Doc.", {"mission_id": "m"}, [])


class TestPrototypes:
    def test_slots_delegate_depth_first_and_each_object_once(self) -> None:
        root = UvmObject("root", (), {"a": "root", "b": "root"})
        left, right = UvmObject("left", (root,)), UvmObject("right", (root,), {"a": "right"})
        leaf = UvmObject("leaf", (left, right))
        assert (leaf.a, leaf.b) == ("root", "root")
        assert [owner.name for owner in leaf.chain()] == ["leaf", "left", "root", "right"]

    def test_a_cycle_of_parents_terminates(self) -> None:
        one, other = UvmObject("one"), UvmObject("other", (), {"x": 1})
        one.parents, other.parents = (other,), (one,)
        assert one.x == 1
        with pytest.raises(DoesNotUnderstand, match="one does not understand 'y'") as miss:
            _ = one.y
        assert (miss.value.target, miss.value.selector) == ("one", "y")
        assert not hasattr(one, "y")

    def test_assignment_writes_a_slot(self) -> None:
        thing = UvmObject("thing")
        thing.count = 1
        assert thing._slots == {"count": 1}
        del thing.count
        with pytest.raises(AttributeError):
            del thing.count


class TestTransactions:
    async def test_every_plain_value_survives_a_reopening(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("write") as txn:
                friend = txn.create("friend", (), {})
                slots = VALUES | {"friends": [Ref(friend.oid)]}
                txn.create("keeper", (), txn.storable(slots))
        with opened(tmp_path) as image:
            async with image.reading() as txn:
                assert codec.encode(txn.plain(txn.find("keeper").data())) == codec.encode(slots)

    async def test_an_exception_leaves_nothing(self, image: LivingImage) -> None:
        before = image.last_transaction()
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 (the block is the unit of work)
            async with image.transaction("fails") as txn:
                txn.create("ghost", (), {})
                raise ZeroDivisionError
        async with image.reading() as txn:
            assert "ghost" not in txn.names
        assert image.last_transaction() == before

    async def test_a_doomed_transaction_aborts(self, image: LivingImage) -> None:
        async with image.transaction("doomed") as txn:
            txn.doom()
            txn.create("ghost", (), {})
        async with image.reading() as txn:
            assert "ghost" not in txn.names

    async def test_tasks_do_not_commit_each_others_work(self, image: LivingImage) -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def unfinished() -> None:
            async with image.transaction("never ends well") as txn:
                txn.create("ghost", (), {})
                entered.set()
                await leave.wait()
                raise KeyError

        task = asyncio.create_task(unfinished())
        await entered.wait()
        async with image.transaction("the other") as txn:
            txn.create("real", (), {})
        leave.set()
        with pytest.raises(KeyError):
            await task
        async with image.reading() as txn:
            assert set(txn.names) == {"real"}

    async def test_a_lost_race_is_run_again(self, image: LivingImage) -> None:
        async with image.transaction("make") as txn:
            txn.create("counter", (), {"n": 0})
        tries = []

        async def unit(txn: Txn) -> None:
            tries.append(1)
            counter = txn.find("counter")
            value = counter.n
            if len(tries) == 1:
                async with image.transaction("overtakes") as other:
                    other.find("counter").n = 10
            counter.n = value + 1

        await image.attempt("count", unit)
        async with image.reading() as txn:
            assert (txn.find("counter").n, len(tries)) == (11, 2)

    async def test_losing_always_ends_as_conflict(self, image: LivingImage) -> None:
        async with image.transaction("make") as txn:
            txn.create("counter", (), {"n": 0})

        async def unit(txn: Txn) -> None:
            txn.find("counter").n = -1
            async with image.transaction("overtakes") as other:
                other.find("counter").n += 1

        with pytest.raises(Conflict):
            await image.attempt("count", unit)

    async def test_the_transaction_id_is_the_one_that_wrote(self, image: LivingImage) -> None:
        async with image.transaction("write") as txn:
            thing = txn.create("thing", (), {})
            oid = thing.oid
        async with image.reading() as reading:
            assert reading.find("thing")._p_serial.hex() == txn.tid
            assert reading.find(oid).name == "thing"

    async def test_reading_an_earlier_time(self, image: LivingImage) -> None:
        tids = []
        for n in range(3):
            async with image.transaction("write") as txn:
                if n == 0:
                    txn.create("thing", (), {})
                txn.find("thing").n = n
            tids.append(txn.tid)
        seen = []
        for tid in tids:
            async with image.reading(tid) as past:
                seen.append(past.find("thing").n)
        assert seen == [0, 1, 2]
        with pytest.raises(InvalidField, match="future"):
            async with image.reading(dt.datetime.now(dt.UTC) + dt.timedelta(days=1)):
                pass

    async def test_wrong_targets(self, image: LivingImage) -> None:
        async with image.transaction("write") as txn:
            txn.create("thing", (), {})
            with pytest.raises(ObjectExists):
                txn.create("thing", (), {})
        async with image.reading() as txn:
            inner = txn.find("thing")._slots._p_oid.hex()
            for wrong in ("nobody", "f" * 16, inner):
                with pytest.raises(ObjectNotFound):
                    txn.find(wrong)


class TestHistory:
    async def test_versions_are_kept_and_come_back(self, image: LivingImage) -> None:
        for n in (1, 2, 3):
            async with image.transaction(f"version {n}") as txn:
                target = txn.find("thing") if n > 1 else txn.create("thing", (), {})
                history.install(txn, target, method("f", f"def f(self, x):\n    return {n}\n"))
        async with image.transaction("revert") as txn:
            history.revert(txn, txn.find("thing"), "f", 1, "architect")
        async with image.reading() as txn:
            found = history.own_method(txn.find("thing"), "f")
            told = history.versions(found)
            assert [version["version"] for version in told] == [1, 2, 3, 4]
            assert [version["source"].split()[-1] for version in told] == ["1", "2", "3", "1"]
            assert told[-1]["provenance"]["reverted_from"] == 3
            assert len(told[-1]["transaction_id"]) == 16
            for selector, version in (("g", None), ("f", 9), ("f", 4)):
                with pytest.raises(MethodNotFound):
                    history.revert(txn, txn.find("thing"), selector, version, "architect")


class TestJournal:
    async def test_rows_in_order_of_time(self, image: LivingImage) -> None:
        ids = []
        for n in range(5):
            async with image.transaction("add") as txn:
                ids.append(journal.add(txn, "0" * 16, {"selector": f"f{n}"}, "test").mission_id)
        async with image.transaction("finish") as txn:
            journal.start(txn, ids[1])
            journal.finish(txn, ids[1], journal.FAILED, {"attempts": 2})
        async with image.reading() as txn:
            assert [row.mission_id for row in journal.backwards(txn)] == ids[::-1]
            assert [row.mission_id for row in journal.unfinished(txn)] == [ids[0], *ids[2:]]
            assert journal.get(txn, ids[1]).record()["attempts"] == 2
            with pytest.raises(MissionNotFound):
                journal.get(txn, "nonsense")


class _Evil:
    """A class that no image may hold; unpickling one would import this module."""


class TestAllowList:
    def write(self, path: Path, value: Any) -> None:
        db = DB(FileStorage(str(path / "live_image.fs"), blob_dir=str(path / "blobs")))
        with db.transaction() as connection:
            connection.root()["evil"] = value
        db.close()

    @pytest.mark.parametrize(
        "value",
        [_Evil(), os.system, subprocess.Popen, transaction.TransactionManager, PersistentMapping(e=print)],
    )
    async def test_a_foreign_class_raises_instead_of_importing(self, tmp_path: Path, value: Any) -> None:
        self.write(tmp_path, value)
        image = LivingImage(str(tmp_path / "live_image.fs"), tmp_path / "blobs")
        with pytest.raises(ForbiddenClass):  # noqa: PT012 (the root itself refuses, or what it holds)
            image.open()
            async with image.reading() as txn:
                dict(txn.root["evil"])
        image.close()


class TestOpening:
    def test_a_second_opening_is_refused(self, tmp_path: Path) -> None:
        with opened(tmp_path), pytest.raises(ImageLocked, match=r"puter\.sh stop"), opened(tmp_path):
            pass

    # FileStorage leaves its files open when it refuses one; the kernel ends then anyway.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize(
        "content", [b"no database at all, but long enough to be looked at", b"FS21" + b"\xff" * 99]
    )
    def test_a_file_that_is_no_image_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "live_image.fs").write_bytes(content)
        with pytest.raises(ImageDamaged, match="can't be opened"), opened(tmp_path):
            pass

    def test_an_unknown_scheme_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImageDamaged, match="gopher"):
            LivingImage("gopher://x", tmp_path).open()

    async def test_in_memory(self) -> None:
        image = LivingImage.in_memory()
        image.open()
        async with image.transaction("write") as txn:
            txn.create("thing", (), {})
        image.close()

    async def test_fsdump_names_the_classes(self, tmp_path: Path) -> None:
        with opened(tmp_path) as image:
            async with image.transaction("a note to find") as txn:
                history.install(
                    txn, txn.create("thing", (), {}), method("f", "def f(self, x):\n    return x\n")
                )
        dump = subprocess.run(  # noqa: ASYNC221 (nothing else runs in this test)
            [sys.executable, "-m", "ZODB.FileStorage.fsdump", str(tmp_path / "live_image.fs")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "uvm.image.prototypes.UvmObject" in dump
        assert "uvm.image.prototypes.UvmMethod" in dump
        assert "a note to find" in dump


async def test_a_commit_stands_where_no_thread_is_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is saved by a thread, after the commit."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    image = LivingImage(str(tmp_path / "image.fs"), tmp_path / "blobs")
    image.open()
    monkeypatch.setattr(storage, "MIN_STEP", 0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        for number in range(3):
            async with image.transaction("grow") as txn:
                txn.create(f"thing_{number}", (), {"ballast": "x" * 1000})
            assert txn.tid
    image.close()
    image.open()
    with image.view() as txn:
        assert len(txn.names) == 3
    image.close()
