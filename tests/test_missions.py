"""Missions that nothing loses: cancels, deadlines, stops and deaths at every moment, order, quarantine.

Missions on an image of their own in this process, with commits that are held where the test
wants them; `test_missions_kills.py` kills real kernels.
"""

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_kernel import until
from tests.test_psm import ADD, TAUGHT, Laboratory
from uvm import errors, missions
from uvm.awakening import awaken
from uvm.hands.pool import HandPool
from uvm.image import history, journal
from uvm.image.image import LivingImage
from uvm.image.txn import Txn
from uvm.lanes import Lane
from uvm.messages import MissionBrief
from uvm.mind.backends.scripted import STALL, Reply
from uvm.missions import Missions

pytestmark = pytest.mark.slow

FENCED = f"```python\n{ADD}\n```"
Script = list[tuple[str | None, Reply]]
SCRIPT: Script = [(r"def slow\w*", STALL), (r"def add\w*|corrected", FENCED)]


class Gate:
    """Holds a commit of the image, or fails it, where its note says so.

    Attributes:
        reached: a commit is held.
        opened: it may go on.
    """

    def __init__(self, image: LivingImage) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._note = "no note is like this"
        self._error: Exception | None = None
        storage = image._db.storage
        begin, finish = storage.tpc_begin, storage.tpc_finish

        def gated_begin(transaction: Any, *args: Any) -> Any:
            if self._error is not None and self._note in transaction.description.decode():
                error, self._error = self._error, None
                raise error
            return begin(transaction, *args)

        def gated_finish(transaction: Any, *args: Any) -> Any:
            if self._error is None and self._note in transaction.description.decode():
                self.reached.set()
                assert self.opened.wait(20)
            return finish(transaction, *args)

        storage.tpc_begin, storage.tpc_finish = gated_begin, gated_finish

    def hold(self, note: str) -> None:
        """Holds the next commit whose note contains this."""
        self._note = note
        self.reached.clear()
        self.opened.clear()

    def fail(self, note: str, error: Exception) -> None:
        """Fails the next commit whose note contains this, once."""
        self._note, self._error = note, error
        self.opened.set()


class Household:
    """Missions on an image in a file."""

    def __init__(self, lab: Laboratory, places: int = 2, limit: int = 8) -> None:
        self.lab = lab
        self.image = lab.image
        self.gate = Gate(lab.image)
        self.faults: list[BaseException] = []
        self.lane = Lane("missions", places, limit)
        self.renew()

    def renew(self, script: Script = SCRIPT) -> Missions:
        """Gives the image new missions, as the next start of a kernel would."""
        self.missions = Missions(self.image, self.lab.machine(script), self.lane, self.faults.append)
        return self.missions

    async def begin(self, selector: str = "add", origin: str = "architect", **options: Any) -> str:
        brief = MissionBrief.model_validate({**TAUGHT, "selector": selector})
        async with self.image.reading() as txn:
            target = txn.find("genesis_obj").oid
        return await self.missions.begin(target, brief, origin, **options)

    async def state(self, mission_id: str) -> str:
        return str((await self.missions.record(mission_id))["state"])

    async def versions(self, selector: str = "add") -> int:
        """Returns how many versions of a method there are."""
        async with self.image.reading() as txn:
            target = txn.find("genesis_obj")
            held = selector in target._slots
            return len(history.versions(history.own_method(target, selector))) if held else 0

    async def until_state(self, mission_id: str, state: str) -> None:
        async def is_there() -> bool:
            return await self.state(mission_id) == state

        await becomes_true(is_there)

    async def written(self, selector: str) -> None:
        """Waits until the writing persona was asked for a method."""
        await until(lambda: any(f"`def {selector}" in turn[-1].content for turn in self.lab.writer.prompts))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Household]:
    image = LivingImage(str(tmp_path / "live_image.fs"), tmp_path / "blobs", cache_objects=1000)
    image.open()
    await awaken(image)
    hands = HandPool(count=1, timeout_s=5, memory_mib=128)
    await hands.start()
    lab = Laboratory(image, hands, tmp_path)
    await lab.log.record("ready")  # its file is open: a cancel while it is being opened would leak it
    household = Household(lab)
    yield household
    household.gate.opened.set()
    await household.missions.close()
    await lab.mind.close()
    await hands.close()
    await lab.log.close()
    image.close()


async def becomes_true(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await check():  # noqa: ASYNC110 (what it waits for may happen in another process)
            await asyncio.sleep(0.02)


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20)


async def turns(n: int = 20) -> None:
    """Lets the event loop run whatever is ready."""
    for _ in range(n):
        await asyncio.sleep(0)


class TestCommits:
    async def test_a_cancel_during_the_last_commit_comes_too_late(self, house: Household) -> None:
        house.gate.hold("unhandled_message")
        mission = await house.begin()
        outcome = asyncio.ensure_future(house.missions.outcome(mission))
        await reached(house.gate.reached)
        cancels = [asyncio.ensure_future(house.missions.cancel(mission)) for _ in range(3)]
        await turns()
        assert not any(cancel.done() for cancel in cancels)
        house.gate.opened.set()
        assert [record["state"] for record in await asyncio.gather(*cancels)] == ["complete"] * 3
        assert (await outcome)["state"] == "COMPLETE"
        assert await house.versions() == 1
        reached_states = [fields["state"] for event, fields in house.lab.events if event == "transition"]
        assert reached_states[-1] == "COMPLETE"
        assert "FAILED" not in reached_states

    async def test_a_stop_during_the_last_commit_leaves_it_complete(self, house: Household) -> None:
        house.gate.hold("unhandled_message")
        mission = await house.begin()
        await reached(house.gate.reached)
        closing = asyncio.ensure_future(house.missions.close())
        await turns()
        house.gate.opened.set()
        await closing
        assert await house.state(mission) == "complete"
        assert await house.renew().resume() == 0
        assert await house.versions() == 1

    async def test_a_deadline_during_the_last_commit_comes_too_late(self, house: Household) -> None:
        house.gate.hold("unhandled_message")
        mission = await house.begin(deadline_s=3600)
        outcome = asyncio.ensure_future(house.missions.outcome(mission))
        await reached(house.gate.reached)
        house.missions._under_way[mission].end(errors.MissionExpired("as its timer does"))
        await turns()
        house.gate.opened.set()
        assert (await outcome)["state"] == "COMPLETE"
        assert await house.state(mission) == "complete"

    @pytest.mark.parametrize("end", ["cancel", "close"])
    async def test_a_failure_that_is_being_written_stays_one(self, house: Household, end: str) -> None:
        house.gate.hold("failed")
        mission = await house.begin("subtract")  # the script has nothing for it
        outcome = asyncio.ensure_future(house.missions.outcome(mission))
        await reached(house.gate.reached)
        ending = getattr(house.missions, end)(*([mission] if end == "cancel" else []))
        ending = asyncio.ensure_future(ending)
        await turns()
        house.gate.opened.set()
        await ending
        with pytest.raises(errors.MissionFailed):
            await outcome
        record = await house.missions.record(mission)
        assert (record["state"], record["error"]["type"]) == ("failed", "ModelUnavailable")

    async def test_a_cancelled_commit_is_told_as_cancelled(self, house: Household) -> None:
        house.gate.hold("held")

        def unit(txn: Txn) -> None:
            txn.create("kept_obj", (), {})

        task = asyncio.ensure_future(house.image.attempt("held", unit))
        await reached(house.gate.reached)
        for _ in range(3):  # each of them waits for the end of the commit
            task.cancel()
            await turns()
            assert not task.done()
        house.gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with house.image.reading() as txn:
            assert txn.find("kept_obj").name == "kept_obj"

    async def test_what_is_over_is_neither_begun_nor_closed_again(self, house: Household) -> None:
        mission = await house.begin()
        await house.missions.outcome(mission)
        before = await house.missions.record(mission)
        for state in (journal.CANCELLED, journal.FAILED, journal.COMPLETE, journal.QUARANTINED):
            assert not await house.missions._finish(mission, state, {"attempts": 99})
        with pytest.raises(errors.MissionFailed, match="over already: complete"):
            await house.image.attempt("again", lambda txn: journal.start(txn, mission))
        assert await house.missions.cancel(mission) == before == await house.missions.record(mission)

    async def test_a_mission_that_was_closed_meanwhile_installs_nothing(self, house: Household) -> None:
        asked, answer = threading.Event(), threading.Event()

        def write(_: object) -> str:
            asked.set()
            assert answer.wait(20)
            return FENCED

        house.renew([(None, write)])
        mission = await house.begin()
        await reached(asked)
        assert await house.missions._finish(mission, journal.CANCELLED, {})  # as a kernel beside this one may
        answer.set()
        with pytest.raises(errors.MissionFailed, match="nothing was installed"):
            await house.missions.outcome(mission)
        assert (await house.state(mission), await house.versions()) == ("cancelled", 0)

    async def test_a_row_that_can_not_be_written_is_tried_again(
        self, house: Household, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(missions, "RETRY_S", 0.01)
        house.gate.fail(" started", OSError(errno.ENOSPC, "No space left on device"))
        mission = await house.begin()
        await house.until_state(mission, "complete")
        assert [type(fault) for fault in house.faults] == [errors.ResourceExhausted]
        assert await house.versions() == 1


class TestCancelling:
    async def test_before_its_first_step(self, house: Household) -> None:
        mission = await house.begin()
        outcome = asyncio.ensure_future(house.missions.outcome(mission))
        assert (await house.missions.cancel(mission))["state"] == "cancelled"
        with pytest.raises(errors.MissionCancelled):
            await outcome
        assert (await house.missions.record(mission))["starts"] == 0
        assert await house.renew().resume() == 0

    async def test_in_the_queue_and_while_it_is_written(self, house: Household) -> None:
        slow = [await house.begin(f"slow_{n}") for n in range(3)]
        await house.until_state(slow[1], "running")
        await until(lambda: (house.lane.running, house.lane.waiting) == (2, 1))
        for mission in reversed(slow):
            assert (await house.missions.cancel(mission))["state"] == "cancelled"
        assert (house.lane.running, house.lane.waiting) == (0, 0)
        assert (await house.missions.outcome(await house.begin()))["attempts"] == 1

    async def test_each_who_waits_is_told(self, house: Household) -> None:
        async with house.image.reading() as txn:
            oid = txn.find("genesis_obj").oid
        miss = errors.DoesNotUnderstand("a miss", target=oid, selector="slow", args=[1])
        waiting = [asyncio.ensure_future(house.missions.learn(miss)) for _ in range(3)]
        await house.written("slow")
        (row,) = await house.missions.newest("running", 9)
        await house.missions.cancel(row["mission_id"])
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in told] == [errors.MissionCancelled] * 3
        assert house.missions._learning == {}

    async def test_one_that_only_the_journal_knows(self, house: Household) -> None:
        mission = await house.begin("slow")
        await house.written("slow")
        await house.missions.close()
        later = house.renew()  # a start in safe mode does not resume
        assert await later.open() == 1
        assert (await later.cancel(mission))["state"] == "cancelled"
        assert await later.open() == 0
        with pytest.raises(errors.MissionCancelled):
            await later.outcome(mission)
        with pytest.raises(errors.MissionNotFound):
            await later.cancel("0")


class TestStopping:
    async def test_a_stop_in_good_order_is_no_death(self, house: Household) -> None:
        mission = await house.begin("slow")
        for _ in range(4):
            waiter = asyncio.ensure_future(house.missions.outcome(mission))
            await house.written("slow")
            await house.missions.close()
            with pytest.raises(errors.ShuttingDown) as told:
                await waiter
            assert told.value.details["mission_id"] == mission
            assert await house.state(mission) == "queued"
            assert await house.renew().resume() == 1
        record = await house.missions.record(mission)
        assert (record["starts"], record["deaths"], house.missions.quarantined) == (4, 0, 0)

    async def test_what_is_acknowledged_during_the_stop_stays(self, house: Household) -> None:
        house.gate.hold("acknowledged")
        beginning = asyncio.ensure_future(house.begin())
        await reached(house.gate.reached)
        await house.missions.close()
        house.gate.opened.set()
        mission = await beginning
        with pytest.raises(errors.ShuttingDown):
            await house.missions.outcome(mission)
        assert await house.renew().resume() == 1
        await house.until_state(mission, "complete")


class TestDeadlines:
    @pytest.mark.parametrize("selector", ["slow", "slow_queued"])
    async def test_it_passes_wherever_the_mission_is(self, house: Household, selector: str) -> None:
        if selector == "slow_queued":
            for n in range(2):
                await house.begin(f"slow_{n}")
        mission = await house.begin(selector, deadline_s=0.05)
        with pytest.raises(errors.MissionExpired) as expired:
            await house.missions.outcome(mission)
        assert expired.value.details["mission_id"] == mission
        record = await house.missions.record(mission)
        assert (record["state"], record["error"]["type"]) == ("failed", "MissionExpired")
        assert record["deadline"] - record["created"] == pytest.approx(0.05)

    async def test_it_passes_while_no_kernel_runs(self, house: Household) -> None:
        mission = await house.begin("slow", deadline_s=3600)
        await house.missions.close()

        def pass_by(txn: Txn) -> None:
            row = journal.get(txn, mission)
            row.created, row.deadline = row.created - 7200, row.created - 3600

        await house.image.attempt("two hours go by", pass_by)
        starts = (await house.missions.record(mission))["starts"]
        await house.renew().resume()
        await house.until_state(mission, "failed")
        record = await house.missions.record(mission)
        assert (record["error"]["type"], record["starts"]) == ("MissionExpired", starts)

    async def test_a_mission_in_time_keeps_its_result(self, house: Household) -> None:
        mission = await house.begin(deadline_s=3600)
        assert (await house.missions.outcome(mission))["state"] == "COMPLETE"
        assert house.missions._under_way == {}

    def test_a_clock_that_jumps_gives_no_more_than_at_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        row = journal.MissionRow("1", "0" * 16, {}, "test", 0, 60.0)
        for now, left in ((row.created + 10, 50), (row.created - 9e6, 60), (row.created + 9e6, 0)):
            monkeypatch.setattr("uvm.image.journal.time.time", lambda now=now: now)
            assert row.time_left() == pytest.approx(left)


class TestOrder:
    async def test_the_architect_goes_first(self, house: Household) -> None:
        house.lane._places = 1
        first = await house.begin("slow")
        await house.written("slow")
        origins = ("autotelic", "architect", "doesNotUnderstand", "architect")
        for n, origin in enumerate(origins):
            await house.begin(f"add_{n}", origin)
        await house.missions.cancel(first)
        await until(lambda: not house.missions._under_way)
        begun = [
            fields["selector"]
            for event, fields in house.lab.events
            if event == "transition" and fields["state"] == "IDLE"
        ]
        assert begun == ["slow", "add_1", "add_2", "add_3", "add_0"]

    async def test_the_kernels_own_missions_leave_room(self, house: Household) -> None:
        slow = [await house.begin(f"slow_{n}") for n in range(2)]
        await house.until_state(slow[1], "running")
        for n in range(4):
            await house.begin(f"add_{n}", "autotelic")
        with pytest.raises(errors.QueueFull):
            await house.begin("add_4", "autotelic")
        for n in range(4):
            await house.begin(f"add_1{n}")
        with pytest.raises(errors.QueueFull):
            await house.begin("add_20")
        assert len(await house.missions.newest(None, 99)) == len(slow) + 8

    async def test_many_at_once_do_not_overfill_the_queue(self, house: Household) -> None:
        begun = [asyncio.ensure_future(house.begin(f"slow_{n}")) for n in range(30)]
        told = await asyncio.gather(*begun, return_exceptions=True)
        refused = [error for error in told if isinstance(error, errors.QueueFull)]
        assert len(told) - len(refused) == len(await house.missions.newest(None, 99)) == 2 + 8

    async def test_lanes_keep_rank_and_order(self) -> None:
        lane, order = Lane("things", 1, 9), []

        async def enter(name: str, rank: int) -> None:
            async with lane.place(rank):
                order.append(name)
                await turns(3)

        tasks = [asyncio.create_task(enter(*entry)) for entry in (("a", 5), ("b", 1), ("c", 0), ("d", 1))]
        await turns(1)
        late = asyncio.create_task(enter("e", 0))
        await turns(1)
        tasks[1].cancel()  # it waits
        await asyncio.gather(*tasks, late, return_exceptions=True)
        assert order == ["a", "c", "e", "d"]
        assert (lane.running, lane.waiting, lane._queue) == (0, 0, [])

    async def test_a_place_that_comes_too_late_is_passed_on(self) -> None:
        lane, entered = Lane("things", 1, 9), []

        async def enter(name: str) -> None:
            async with lane.place():
                entered.append(name)

        lane.running = 1
        tasks = [asyncio.create_task(enter(name)) for name in "ab"]
        await turns(1)
        lane._give_back()
        tasks[0].cancel()  # its turn has come, but it has not heard of it
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (entered, lane.running, lane.waiting) == (["b"], 0, 0)

    async def test_a_waiter_that_gives_up_as_the_place_is_given_back_locks_nobody_out(self) -> None:
        lane = Lane("things", 1, 9)
        lane.running = 1
        waiter = asyncio.create_task(lane._take(0))
        await turns(1)
        waiter.cancel()  # it is still counted,
        lane._give_back()  # but passed over
        async with asyncio.timeout(10), lane.place():  # before it has gone
            assert (lane.running, lane.waiting) == (1, 1)
        await asyncio.gather(waiter, return_exceptions=True)
        assert (lane.running, lane.waiting, lane._queue) == (0, 0, [])

    async def test_ids_rise_where_the_clock_is_set_back(
        self, house: Household, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids, now = [], time.time_ns()
        for jump in (0, 365 * 86_400, -86_400, 1):
            monkeypatch.setattr("uvm.image.journal.time.time_ns", lambda jump=jump: now + jump * 10**9)
            row = await house.image.attempt(
                "add", lambda txn: journal.add(txn, "0" * 16, {}, "test").mission_id
            )
            ids.append(row)
        assert ids == sorted(ids)
        assert [row["mission_id"] for row in await house.missions.newest(None, 9)] == ids[::-1]


class TestJournal:
    async def test_a_long_walk_keeps_little_and_lets_others_run(self, house: Household) -> None:
        def fill(txn: Txn) -> None:
            for n in range(6000):
                row = journal.add(txn, "0" * 16, {"selector": f"f{n}"}, "test")
                journal.finish(txn, row.mission_id, journal.FAILED if n == 0 else journal.CANCELLED, {})

        await house.image.attempt("fill", fill)
        kept: list[int] = []
        walked = asyncio.Event()

        async def look() -> None:
            while not walked.is_set():
                kept.append(max(cache["ngsize"] for cache in house.image._db.cacheDetailSize()))
                await asyncio.sleep(0)

        looking = asyncio.create_task(look())
        (row,) = await house.missions.newest("failed", 5)
        walked.set()
        await looking
        assert row["brief"] == {"selector": "f0"}
        assert len(kept) >= 6000 // missions.BREATH
        assert max(kept) < 2000

    async def test_the_walk_backwards_misses_nothing(self, house: Household) -> None:
        names = ["0", "00", "1", "1\x00", "1\x00a", "a-1", "a-1f", "a-2", "b", "bb", "z"]

        def fill(txn: Txn) -> None:
            for name in names:
                txn.missions[name] = journal.MissionRow(name, "0" * 16, {}, "test", 0, None)

        await house.image.attempt("fill", fill)
        async with house.image.reading() as txn:
            assert [row.mission_id for row in journal.backwards(txn)] == names[::-1]

    async def test_a_completed_mission_names_method_and_transaction(self, house: Household) -> None:
        told = await house.missions.outcome(mission := await house.begin())
        record = await house.renew().record(mission)
        async with house.image.reading() as txn:
            method = history.own_method(txn.find("genesis_obj"), "add")
            assert record["transaction_id"] == method._p_serial.hex() == told["method"]["transaction_id"]
            assert record["method"]["sha256"] == method.sha256
        again = await house.missions.outcome(mission)
        assert {**again, "seconds": 0} == {**told, "seconds": 0}
        assert again["method"].keys() == {
            "selector",
            "parameters",
            "source",
            "doc",
            "sha256",
            "transaction_id",
        }


@contextlib.contextmanager
def died(house: Household) -> Iterator[None]:
    """Within, missions end as if their kernel had been killed: nothing is written of it."""
    interrupt, journal.interrupt = journal.interrupt, lambda *_: None
    try:
        yield
    finally:
        journal.interrupt = interrupt


async def missed(house: Household, selector: str = "add") -> errors.DoesNotUnderstand:
    async with house.image.reading() as txn:
        oid = txn.find("genesis_obj").oid
    return errors.DoesNotUnderstand("a miss", target=oid, selector=selector, args=[1, 2])


class TestPauses:
    @pytest.fixture(autouse=True)
    def long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pauses last longer than any test."""
        monkeypatch.setattr(missions, "RETRY_S", 600.0)
        monkeypatch.setattr(missions, "LONGEST_RETRY_S", 600.0)

    async def paused(self, house: Household, note: str = "unhandled_message") -> str:
        """Lets a mission of a miss run into a full disk; returns its id."""
        house.gate.fail(note, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(errors.ResourceExhausted) as told:
            await house.missions.learn(await missed(house))
        return str(told.value.details["mission_id"])

    async def test_who_misses_it_meanwhile_ends_the_pause(self, house: Household) -> None:
        mission = await self.paused(house)
        plan = house.missions._plan
        await house.missions.learn(await missed(house))
        async with house.image.reading() as txn:
            house.missions._pursue(plan(journal.get(txn, mission)))  # as the end of the pause does
        await until(lambda: not house.missions._under_way)
        await house.missions.learn(await missed(house))  # it comes late: it is understood by now
        assert [row["mission_id"] for row in await house.missions.newest(None, 9)] == [mission]
        assert (await house.versions(), await house.state(mission)) == (1, "complete")

    async def test_a_mission_under_way_is_not_begun_twice(self, house: Household) -> None:
        mission = await house.begin("slow")
        mine = house.missions._under_way[mission]
        house.missions._pursue(mine.plan)
        assert house.missions._under_way[mission] is mine

    async def test_an_open_miss_that_was_not_taken_up_is_learned_once(self, house: Household) -> None:
        house.renew([(None, STALL)])
        learning = asyncio.ensure_future(house.missions.learn(await missed(house)))
        await house.written("add")
        with died(house):
            await house.missions.close()
        await asyncio.gather(learning, return_exceptions=True)
        await house.renew().learn(await missed(house))  # a start in safe mode does not resume
        (row,) = await house.missions.newest(None, 9)
        assert (row["state"], row["deaths"], row["starts"]) == ("complete", 1, 2)
        assert await house.versions() == 1

    async def test_a_kernel_that_is_killed_in_the_pause_did_not_die_of_the_mission(
        self, house: Household
    ) -> None:
        mission = await self.paused(house)
        assert await house.state(mission) == "queued"
        with died(house):
            await house.missions.close()
        await house.renew().resume()
        await house.until_state(mission, "complete")
        assert (await house.missions.record(mission))["deaths"] == 0

    async def test_without_room_for_the_pause_the_stop_says_so(
        self, house: Household, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt = journal.interrupt

        def full(*_: object) -> None:
            monkeypatch.setattr(journal, "interrupt", interrupt)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(journal, "interrupt", full)
        mission = await self.paused(house)
        assert await house.state(mission) == "running"
        await house.missions.close()
        assert await house.state(mission) == "queued"

    async def test_the_deadline_cuts_the_pause_short(self, house: Household) -> None:
        house.gate.fail("unhandled_message", OSError(errno.ENOSPC, "No space left on device"))
        mission = await house.begin(deadline_s=2.0)
        with pytest.raises(errors.ResourceExhausted):
            await house.missions.outcome(mission)
        await house.until_state(mission, "failed")
        assert (await house.missions.record(mission))["error"]["type"] == "MissionExpired"

    @pytest.mark.parametrize("left_s", [-1.0, 0.0, None])
    async def test_a_passed_deadline_does_not_make_pauses_none(
        self, house: Household, left_s: float | None
    ) -> None:
        plan = missions._Plan("1", 0, house.missions._until(left_s))
        assert house.missions._before_deadline(plan, 7.0) == 7.0

    async def test_suspects_do_not_wait_for_what_pauses(self, house: Household) -> None:
        suspect = await house.begin("slow")
        await house.written("slow")
        with died(house):
            await house.missions.close()
        brief, target = MissionBrief.model_validate(TAUGHT).plain(), (await missed(house)).target
        innocent = await house.image.attempt(
            "acknowledged, not begun", lambda txn: journal.add(txn, target, brief, "test").mission_id
        )
        house.renew()
        house.gate.fail("unhandled_message", OSError(errno.ENOSPC, "No space left on device"))
        await house.missions.resume()
        await house.until_state(suspect, "running")
        assert await house.state(innocent) == "queued"
        assert house.missions._innocent == set()

    @pytest.mark.parametrize("error", [errors.QueueFull, errors.ResourceExhausted, errors.Conflict])
    async def test_what_passes_is_no_fault_of_the_method(
        self, house: Household, monkeypatch: pytest.MonkeyPatch, error: type[errors.BatosError]
    ) -> None:
        run = house.lab.hands.run

        async def busy(*_: Any, **__: Any) -> Any:
            monkeypatch.setattr(house.lab.hands, "run", run)
            raise error("not now")

        monkeypatch.setattr(house.lab.hands, "run", busy)
        mission = await house.begin()
        with pytest.raises(error) as told:
            await house.missions.outcome(mission)
        assert told.value.details["mission_id"] == mission
        assert await house.state(mission) == "queued"
        assert "deferred" in [event for event, _ in house.lab.events]
        assert "finding" not in [event for event, _ in house.lab.events]


class TestQuarantine:
    async def test_the_second_death_is_the_last(self, house: Household) -> None:
        mission = await house.begin("slow")
        for death in (1, 2):
            await house.until_state(mission, "running")
            with died(house):
                await house.missions.close()
            assert await house.renew().resume() == 2 - death
        record = await house.missions.record(mission)
        assert (record["state"], record["deaths"], record["starts"]) == ("quarantined", 2, 2)
        assert record["error"]["details"]["cycles"] == [f"{mission}.1", f"{mission}.2"]
        assert house.missions.quarantined == 1
        assert await house.renew().resume() == 0
        assert [row["mission_id"] for row in await house.missions.newest("quarantined", 9)] == [mission]
        with pytest.raises(errors.MissionFailed, match="quarantine"):
            await house.missions.outcome(mission)
        cancelled = await house.missions.cancel(mission)
        assert (cancelled["state"], cancelled["error"]) == ("cancelled", record["error"])

    async def test_suspects_run_last_and_one_at_a_time(self, house: Household) -> None:
        suspects = [await house.begin(f"slow_{n}") for n in range(2)]
        for mission in suspects:
            await house.until_state(mission, "running")
        innocent = await house.begin("add")
        with died(house):
            await house.missions.close()
        await house.renew().resume()
        await house.until_state(innocent, "complete")
        await house.until_state(suspects[0], "running")
        assert house.lane.running == 1  # of two places
        assert await house.state(suspects[1]) == "queued"
        with died(house):
            await house.missions.close()
        await house.renew().resume()
        await house.until_state(suspects[1], "running")
        assert await house.state(suspects[0]) == "quarantined"
        assert (await house.missions.record(suspects[1]))["deaths"] == 1

    async def test_who_misses_it_again_waits_for_the_resumed_mission(self, house: Household) -> None:
        async with house.image.reading() as txn:
            oid = txn.find("genesis_obj").oid
        miss = errors.DoesNotUnderstand("a miss", target=oid, selector="add", args=[1, 2])
        waiting = asyncio.ensure_future(house.missions.learn(miss))
        house.gate.hold(" started")
        await reached(house.gate.reached)
        closing = asyncio.ensure_future(house.missions.close())
        house.gate.opened.set()
        await closing
        with pytest.raises(errors.ShuttingDown):
            await waiting
        await house.renew().resume()
        await house.missions.learn(miss)
        assert await house.versions() == 1
        assert len(await house.missions.newest(None, 9)) == 1
