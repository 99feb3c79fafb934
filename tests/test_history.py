"""Turning back time: versions, undo and views of the past, on a real file, through packs and conflicts."""

import asyncio
import datetime as dt
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from terminal.display import Display
from uvm.awakening import CATALOG, ROOT, awaken, primordial
from uvm.errors import (
    InvalidField,
    MethodNotFound,
    NotUndoable,
    ObjectNotFound,
    SlotProtected,
    TransactionNotFound,
)
from uvm.grant_options import NoOptions
from uvm.granting import Granting
from uvm.image import history, journal
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.memory.embedder import Hashing
from uvm.memory.fractal import FractalMemory
from uvm.objects import Objects
from uvm.undoing import Undoing


class World:
    """An image in a file, and what the Architect can do to it."""

    def __init__(self, folder: Path) -> None:
        self.image = LivingImage(str(folder / "live_image.fs"), folder / "blobs")
        self.image.open()
        self.objects = Objects(self.image, ROOT)
        self.memory = FractalMemory(Hashing())
        self.undoing = Undoing(self.image, CATALOG, frozenset(primordial()))
        self.granting = Granting(self.image, _as_it_is)

    @property
    def last(self) -> str:
        return self.image.last_transaction()

    async def install(self, target: str, selector: str, result: Any) -> tuple[str, str]:
        """Installs a method as a mission does; returns the mission and the transaction."""

        def acknowledge(txn: Txn) -> str:
            return journal.add(txn, txn.find(target).oid, {"selector": selector}, "test").mission_id

        mission = await self.image.attempt("acknowledged", acknowledge)
        await self.image.attempt("started", lambda txn: journal.start(txn, mission))
        source = f"def {selector}(self):\n    return {result!r}\n"
        method = UvmMethod(selector, (), source, "Doc.", {"mission_id": mission, "origin": "test"}, [])
        vectors = await self.memory.embed([source])

        def complete(txn: Txn) -> None:
            history.install(txn, txn.find(target), method)
            subject = f"{target}.{selector}"
            self.memory.add(txn.find(CATALOG), source, vectors[0], kind="method", subject=subject)
            journal.finish(txn, mission, journal.COMPLETE, {"attempts": 1})

        await self.image.attempt("complete", complete)
        return mission, self.last

    async def undo(self, tid: str) -> str:
        return await self.undoing.undo(tid, "test")

    async def slots(self, target: str, as_of: Any = None) -> dict[str, Any]:
        return dict((await self.objects.inspect(target, as_of))["slots"])

    async def sources(self, target: str, as_of: Any = None) -> dict[str, str]:
        methods = (await self.objects.inspect(target, as_of))["methods"]
        return {name: method["source"].split()[-1] for name, method in methods.items()}

    async def remembered(self) -> dict[str, str]:
        async with self.image.reading() as txn:
            chunks = txn.find(CATALOG).chunks().values()
            return {str(chunk.subject or chunk.text): chunk.text.split()[-1] for chunk in chunks}

    async def row(self, mission: str) -> dict[str, Any]:
        async with self.image.reading() as txn:
            assert mission not in txn.root["open_missions"]
            return journal.get(txn, mission).record()


async def _as_it_is(options: dict[str, Any]) -> dict[str, Any]:
    return options


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await awaken(world.image)
    await world.objects.create("thing", None, {"n": 1, "other": 0})
    yield world
    world.image.close()


class TestUndo:
    async def test_a_slot(self, world: World) -> None:
        await world.objects.set_slot("thing", "n", [1, (2,)])
        tid = world.last
        await world.objects.set_slot("thing", "other", 5)
        assert await world.undo(tid) == world.last
        assert await world.slots("thing") == {"n": 1, "other": 5}
        with pytest.raises(NotUndoable, match=f"transaction {tid} is undone already"):
            await world.undo(tid)

    async def test_what_was_changed_later_is_named(self, world: World) -> None:
        await world.objects.set_slot("thing", "n", 2)
        tid = world.last
        await world.objects.set_slot("thing", "other", 7)
        await world.objects.set_slot("thing", "n", 3)
        later = world.last
        await world.objects.set_slot("thing", "other", 8)
        with pytest.raises(NotUndoable, match="undo that first") as refused:
            await world.undo(tid)
        told = {"transaction_id": later, "note": "set_slot thing n", "user": "architect"}
        assert refused.value.details == {"transaction_id": tid, "later": [told]}
        await world.undo(later)
        await world.undo(tid)
        assert await world.slots("thing") == {"n": 1, "other": 8}

    async def test_an_undoing_is_undone(self, world: World) -> None:
        await world.objects.set_slot("thing", "fresh", {"a": 1})
        undone = await world.undo(world.last)
        assert "fresh" not in await world.slots("thing")
        redone = await world.undo(undone)
        assert (await world.slots("thing"))["fresh"] == {"a": 1}
        await world.undo(redone)
        assert "fresh" not in await world.slots("thing")

    async def test_a_deleted_slot_with_a_reference_comes_back(self, world: World) -> None:
        from uvm.codec import Ref

        oid = await world.objects.create("friend", None, {})
        await world.objects.set_slot("thing", "friend", [Ref(oid)])
        await world.objects.delete_slot("thing", "friend")
        await world.undo(world.last)
        assert (await world.slots("thing"))["friend"] == [Ref(oid)]

    async def test_a_created_object_loses_its_name_and_gets_it_back(self, world: World) -> None:
        from uvm.codec import Ref

        oid = await world.objects.create("shop", None, {"stock": 3})
        tid = world.last
        for n in range(100):  # its bucket of names splits meanwhile
            await world.objects.create(f"more_{n:02}", None, {})
        await world.objects.set_slot("thing", "shop", Ref(oid))
        undone = await world.undo(tid)
        with pytest.raises(ObjectNotFound):
            await world.slots("shop")
        assert await world.slots(oid) == {"stock": 3}  # who refers to it still finds it
        await world.undo(undone)
        assert await world.slots("shop") == {"stock": 3}
        await world.objects.set_slot("shop", "stock", 4)
        with pytest.raises(NotUndoable, match=r"the object shop was changed later, by .* stock"):
            await world.undo(tid)

    async def test_a_name_that_was_given_again_is_not_taken(self, world: World) -> None:
        await world.objects.create("shop", None, {})
        undone = await world.undo(world.last)
        await world.objects.create("shop", None, {"new": True})
        with pytest.raises(NotUndoable, match="'shop' was changed later"):
            await world.undo(undone)
        assert await world.slots("shop") == {"new": True}

    async def test_a_grant_and_its_replacement(self, world: World) -> None:
        await world.granting.grant("thing", "clock", NoOptions(kind="clock"))
        first, [granted] = world.last, await world.granting.listed("thing")
        await world.granting.grant("thing", "clock", NoOptions(kind="recall"))
        await world.undo(world.last)
        assert await world.granting.listed("thing") == [granted]
        await world.granting.revoke("thing", "clock")
        with pytest.raises(NotUndoable):
            await world.undo(first)
        assert await world.granting.listed("thing") == []

    async def test_a_method_its_memory_and_its_mission(self, world: World) -> None:
        """Later missions share the records of journal and memory, which is all that ZODB would see."""
        mission, tid = await world.install("thing", "answer", 1)
        for n in range(150):
            await world.install("thing", f"other_{n}", n)
        undone = await world.undo(tid)
        assert "answer" not in await world.sources("thing")
        assert len(await world.sources("thing")) == 150
        assert "thing.answer" not in await world.remembered()
        assert len(await world.remembered()) == 150
        row = await world.row(mission)
        assert (row["state"], row["undone"], row["attempts"]) == ("complete", tid, 1)
        await world.undo(undone)
        assert (await world.sources("thing"))["answer"] == "1"
        assert (await world.remembered())["thing.answer"] == "1"
        assert "undone" not in await world.row(mission)

    async def test_a_version_and_the_memory_of_the_one_before(self, world: World) -> None:
        _, first = await world.install("thing", "answer", 1)
        mission, second = await world.install("thing", "answer", 2)
        with pytest.raises(NotUndoable, match=f"{second} .complete."):
            await world.undo(first)
        await world.undo(second)
        assert (await world.sources("thing"), (await world.remembered())["thing.answer"]) == (
            {"answer": "1"},
            "1",
        )
        assert (await world.row(mission))["undone"] == second
        async with world.image.reading() as txn:
            [version] = history.versions(history.own_method(txn.find("thing"), "answer"))
        assert version["transaction_id"] == first
        await world.undo(first)
        assert (await world.sources("thing"), await world.remembered()) == ({}, {})

    async def test_the_memory_of_today_stays(self, world: World) -> None:
        _, tid = await world.install("thing", "answer", 1)
        vectors = await world.memory.embed(["newer"])
        await world.image.attempt(
            "remember anew",
            lambda txn: world.memory.add(
                txn.find(CATALOG), "newer", vectors[0], kind="method", subject="thing.answer"
            ),
        )
        await world.undo(tid)
        assert (await world.remembered())["thing.answer"] == "newer"

    async def test_a_remembered_text(self, world: World) -> None:
        vectors = await world.memory.embed(["cheese"])

        def remember(txn: Txn) -> int:
            return world.memory.add(txn.find(CATALOG), "cheese", vectors[0], kind="document")

        await world.image.attempt("remember", remember)
        tid = world.last
        undone = await world.undo(tid)
        assert await world.remembered() == {}
        with pytest.raises(NotUndoable, match="undone already"):
            await world.undo(tid)
        await world.image.attempt("remember", remember)
        with pytest.raises(NotUndoable, match="the memory was changed later"):
            await world.undo(undone)

    async def test_the_journal_is_never_undone(self, world: World) -> None:
        def acknowledge(txn: Txn) -> str:
            return journal.add(txn, txn.find("thing").oid, {"selector": "f"}, "test").mission_id

        mission = await world.image.attempt("acknowledged", acknowledge)
        tids = [world.last]
        await world.image.attempt("started", lambda txn: journal.start(txn, mission))
        tids.append(world.last)
        await world.image.attempt("failed", lambda txn: journal.finish(txn, mission, journal.FAILED, {}))
        tids.append(world.last)
        for tid in tids:
            with pytest.raises(NotUndoable, match="only keeps the journal"):
                await world.undo(tid)
        assert (await world.row(mission))["state"] == "failed"

    async def test_what_the_image_rests_on(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        foundations = world.last
        await awaken(world.image)
        for tid, reason in ((foundations, "rests on"), (world.last, "made alfred_prototype_obj")):
            with pytest.raises(NotUndoable, match=reason):
                await world.undo(tid)
        await world.image.attempt("migration", lambda txn: txn.root.update(extra=1))
        with pytest.raises(NotUndoable, match="rests on"):
            await world.undo(world.last)
        world.image.close()

    async def test_no_such_transaction(self, world: World) -> None:
        after = f"{int(world.last, 16) + 1:016x}"
        before = f"{int(world.last, 16) - 1:016x}"
        for tid in ("0" * 16, "f" * 16, before, after):
            with pytest.raises(TransactionNotFound, match="the history begins with"):
                await world.undo(tid)

    async def test_a_race_with_a_change_is_not_lost(self, world: World) -> None:
        oid = await world.objects.create("shop", None, {"stock": 3})
        tid = world.last
        change = world.objects.set_slot(oid, "stock", 4)
        undone, _ = await asyncio.gather(world.undo(tid), change, return_exceptions=True)
        if isinstance(undone, BaseException):
            assert isinstance(undone, NotUndoable)
        else:
            assert await world.slots(oid) == {"stock": 4}  # it came after, to an object without a name

    async def test_in_memory(self) -> None:
        image = LivingImage.in_memory()
        image.open()
        await awaken(image)
        objects = Objects(image, ROOT)
        await objects.create("thing", None, {"n": 1})
        await objects.set_slot("thing", "n", 2)
        await Undoing(image, CATALOG, frozenset(primordial())).undo(image.last_transaction(), "test")
        assert (await objects.inspect("thing", None))["slots"] == {"n": 1}
        image.close()


class TestPast:
    async def test_just_after_a_transaction_and_between_two(self, world: World) -> None:
        moments = []
        for n in (10, 20):
            await world.objects.set_slot("thing", "n", n)
            moments.append((world.last, dt.datetime.now(dt.UTC)))
        for (tid, now), n in zip(moments, (10, 20), strict=True):
            between = f"{int(tid, 16) + 1:016x}" if n == 10 else tid
            for as_of in (tid, between, now, now.replace(tzinfo=None)):
                assert (await world.slots("thing", as_of))["n"] == n

    async def test_after_the_newest_transaction_it_is_as_now(self, world: World) -> None:
        ahead = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30)  # a client's clock may be
        assert (await world.slots("thing", ahead))["n"] == 1
        zone = dt.timezone(dt.timedelta(hours=5))
        assert (await world.slots("thing", dt.datetime.now(zone)))["n"] == 1
        with pytest.raises(InvalidField, match="in the future"):
            await world.slots("thing", dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
        with pytest.raises(InvalidField, match=r"no transaction f+ yet"):
            await world.slots("thing", "f" * 16)

    @pytest.mark.parametrize(
        "as_of",
        [
            dt.datetime(1970, 1, 2),
            dt.datetime(1, 1, 1),
            dt.datetime(2000, 1, 1, tzinfo=dt.UTC),
            "0" * 16,
            "0" * 15 + "1",
        ],
    )
    async def test_before_the_image_was(self, world: World, as_of: Any) -> None:
        with pytest.raises(InvalidField, match="as_of"):
            await world.slots("thing", as_of)
        with pytest.raises(InvalidField, match="as_of"):
            await world.objects.listed("", 10, None, as_of)

    async def test_before_an_object_was(self, world: World) -> None:
        then = world.last
        oid = await world.objects.create("late", None, {})
        for target in ("late", oid):
            with pytest.raises(ObjectNotFound):
                await world.slots(target, then)
        assert "late" not in [row["name"] for row in await world.objects.listed("", 100, None, then)]

    async def test_many_views_at_once(self, world: World) -> None:
        tids = []
        for n in range(40):
            await world.objects.set_slot("thing", "n", n)
            tids.append(world.last)
        views = [world.slots("thing", tid) for tid in tids for _ in range(3)]
        assert [slots["n"] for slots in await asyncio.gather(*views)] == [
            n for n in range(40) for _ in range(3)
        ]


class TestPack:
    async def test_versions_outlast_it_and_the_packed_past_is_told(
        self, world: World, tmp_path: Path
    ) -> None:
        first = (await world.install("thing", "answer", 1))[1]
        for n in (2, 3):
            await world.install("thing", "answer", n)
        await world.objects.set_slot("thing", "n", 2)
        oid, whole = await world.objects.create("late", None, {}), world.last
        world.image._db.pack(time.time())
        await world.objects.set_slot("thing", "n", 3)
        kept = world.last
        async with world.image.reading() as txn:
            rows = history.versions(history.own_method(txn.find("thing"), "answer"))
        assert [row["source"].split()[-1] for row in rows] == ["1", "2", "3"]
        assert rows[0]["transaction_id"] == first
        for unread in (first, "0" * 16):
            with pytest.raises(InvalidField, match=r"history begins at .* UTC"):
                await world.slots("thing", unread)
        with pytest.raises(InvalidField, match="history begins"):
            await world.slots(oid, first)
        assert (await world.slots("thing", whole))["n"] == 2
        for unknown in (first, whole):
            with pytest.raises(TransactionNotFound, match="history"):
                await world.undo(unknown)
        await world.undo(kept)
        assert (await world.slots("thing"))["n"] == 2
        world.image.close()
        again = World(tmp_path)
        await again.image.attempt(
            "revert", lambda txn: history.revert(txn, txn.find("thing"), "answer", 1, "me")
        )
        assert await again.sources("thing") == {"answer": "1"}
        again.image.close()
        world.image.open()


class TestWhatHasTakenItsPlace:
    async def test_data_does_not_come_back_over_a_method(self, world: World) -> None:
        await world.objects.delete_slot("thing", "n")
        tid = world.last
        _, installed = await world.install(ROOT, "n", 5)
        with pytest.raises(NotUndoable, match=r"slot 'n' of thing .* traits_obj\.n is a method; undo"):
            await world.undo(tid)
        assert await world.slots("thing") == {"other": 0}
        await world.undo(installed)
        await world.undo(tid)
        assert await world.slots("thing") == {"n": 1, "other": 0}

    async def test_data_does_not_come_back_over_a_grant(self, world: World) -> None:
        await world.objects.delete_slot("thing", "n")
        tid = world.last
        await world.granting.grant(ROOT, "n", NoOptions(kind="clock"))
        with pytest.raises(NotUndoable, match=r"traits_obj\.n is a grant"):
            await world.undo(tid)

    async def test_a_method_does_not_come_back_over_a_grant(self, world: World) -> None:
        _, installed = await world.install("thing", "answer", 1)
        undone = await world.undo(installed)
        await world.granting.grant(ROOT, "answer", NoOptions(kind="clock"))
        with pytest.raises(NotUndoable, match=r"traits_obj\.answer is a grant"):
            await world.undo(undone)
        assert await world.sources("thing") == {}

    async def test_a_grant_does_not_come_back_over_a_method(self, world: World) -> None:
        await world.granting.grant("thing", "clock", NoOptions(kind="clock"))
        await world.granting.revoke("thing", "clock")
        revoked = world.last
        await world.install(ROOT, "clock", 1)
        with pytest.raises(NotUndoable, match="'clock' of thing is no grant"):
            await world.undo(revoked)

    async def test_data_that_hides_a_method_already_is_still_put_back(self, world: World) -> None:
        await world.install(ROOT, "n", 5)  # the data was there first
        await world.objects.set_slot("thing", "n", 2)
        await world.undo(world.last)
        assert await world.slots("thing") == {"n": 1, "other": 0}

    async def test_objects_are_found_however_far_from_their_slots(self, world: World) -> None:
        def unit(txn: Txn) -> None:
            made = [txn.create(f"one_{n}", (txn.find(ROOT),), {"n": n}) for n in range(300)]
            made[0]._slots["n"] = 0

        await world.image.attempt("many", unit)
        await world.objects.delete_slot("one_0", "n")
        tid = world.last
        _, installed = await world.install(ROOT, "n", 5)
        with pytest.raises(NotUndoable, match="slot 'n' of one_0"):
            await world.undo(tid)
        await world.undo(installed)
        await world.undo(tid)
        assert await world.slots("one_0") == {"n": 0}


class TestVersions:
    async def test_who_when_why_and_what_differs(self, world: World) -> None:
        began = time.time()
        tids = [(await world.install("thing", "answer", n))[1] for n in (1, 2)]
        await world.image.attempt(
            "revert", lambda txn: history.revert(txn, txn.find("thing"), "answer", None, "me")
        )
        tids.append(world.last)
        async with world.image.reading() as txn:
            method = history.own_method(txn.find("thing"), "answer")
            first, second, third = history.versions(method)
        assert [row["transaction_id"] for row in (first, second, third)] == tids
        assert (first["diff"], first["user"], first["reverted_from"]) == ("", "test", None)
        assert second["diff"].splitlines()[-2:] == ["-    return 1", "+    return 2"]
        assert third["diff"].splitlines()[-2:] == ["-    return 2", "+    return 1"]
        assert (third["user"], third["reason"]) == ("me", "version 1 again")
        assert (third["reverted_from"], third["reverted_to"]) == (2, 1)
        assert third["created"] >= began
        assert third["provenance"]["mission_id"] == first["provenance"]["mission_id"]

    async def test_wrong_versions(self, world: World) -> None:
        await world.install("thing", "answer", 1)
        await world.install("thing", "answer", 2)
        wrong = (
            ("answer", 2, "at version 2 already"),
            ("answer", 9, "has 2 versions"),
            ("n", 1, "no method"),
        )
        async with world.image.reading() as txn:
            for selector, version, reason in wrong:
                with pytest.raises(MethodNotFound, match=reason):
                    history.earlier(txn.find("thing"), selector, version)

    async def test_its_place_may_be_a_grant_by_now(self, world: World) -> None:
        await world.objects.create("child", ["thing"], {})
        for n in (1, 2):
            await world.install("child", "clock", n)
        await world.granting.grant("thing", "clock", NoOptions(kind="clock"))
        with pytest.raises(SlotProtected, match=r"thing\.clock is a grant"):
            await world.image.attempt(
                "revert", lambda txn: history.revert(txn, txn.find("child"), "clock", 1, "me")
            )

    async def test_two_at_once_both_count(self, world: World) -> None:
        for n in (1, 2):
            await world.install("thing", "answer", n)

        async def revert(version: int) -> None:
            await world.image.attempt(
                "revert", lambda txn: history.revert(txn, txn.find("thing"), "answer", version, "me")
            )

        await asyncio.gather(revert(1), revert(1))
        async with world.image.reading() as txn:
            rows = history.versions(history.own_method(txn.find("thing"), "answer"))
        assert [row["reverted_from"] for row in rows] == [None, None, 2, 3]

    def test_a_diff_is_bounded(self) -> None:
        one, other = ({"version": n, "source": f"x = {n}\n" * 1900} for n in (1, 2))
        assert len(history.diff(one, other).splitlines()) == history.MAX_DIFF_LINES + 1
        longer = {"version": 3, "source": "x\n" * 30_000}
        assert history.diff(one, longer) == "(more than 2000 lines: not compared)"

    async def test_holders_are_kept_where_the_root_has_them(self, world: World) -> None:
        from BTrees.OOBTree import OOTreeSet

        if "holders" not in (await _root(world)):
            await world.image.attempt("holders", lambda txn: txn.root.update(holders=OOTreeSet()))
        await world.install("thing", "answer", 1)
        async with world.image.reading() as txn:
            assert txn.find("thing").oid in txn.root["holders"]


async def _root(world: World) -> set[str]:
    async with world.image.reading() as txn:
        return set(txn.root)


def test_the_terminal_shows_versions_to_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    source = "def f(self):\n    return 1\n"
    row = {
        "version": 1,
        "sha256": "ab" * 32,
        "source": source,
        "diff": "",
        "created": 1.7e9,
        "user": "architect",
    }
    row |= {"reason": "Says\n\x1b one.", "model": "qwen", "transaction_id": "0" * 16}
    one = {
        **row,
        "source": source.replace("1", "2"),
        "version": 2,
        "user": None,
        "created": None,
        "reason": None,
    }
    other = {**one, "diff": history.diff(row, one), "broken": ["o.g relies on this method"]}
    Display().answer("method_history", [row, other])
    first, marks, *rest = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"version 1  2023-11-1\d \d\d:\d\d:\d\d  architect  Says \\x1b one.", first)
    assert marks == f"qwen  abababababab  {'0' * 16}"
    assert rest[:3] == ["def f(self):", "    return 1", "version 2"]
    assert rest[-3:] == ["-    return 1", "+    return 2", "breaks: o.g relies on this method"]
