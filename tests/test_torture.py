"""A bounded run of `python -m evals torture`, and whether its verdict would see what it looks for."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batos import Kernel
from config import Settings
from evals import torture
from evals.__main__ import main
from evals.report import Case, Report
from evals.torture import script
from evals.torture.books import Book, Slot
from evals.torture.house import House
from evals.torture.image import Findings, interrupted
from evals.torture.killer import plan
from evals.torture.processes import KERNEL, Census, Process, strike
from uvm.image import journal
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.messages import Ping
from uvm.mind.backends import Message
from uvm.mind.backends.scripted import Scripted
from uvm.outcomes import MISS

linux = pytest.mark.skipif(sys.platform != "linux", reason="it tells processes apart by /proc")


@linux
@pytest.mark.slow
def test_nothing_is_lost_in_twenty_kills(tmp_path: Path) -> None:
    out = tmp_path / "torture.json"
    status = main(["torture", "--kills", "20", "--json", str(out)])
    told = json.loads(out.read_text())
    assert [(case["id"], case["reason"]) for case in told["cases"] if not case["passed"]] == []
    assert (status, told["name"], told["n"]) == (0, "torture", 19)
    assert "kernel at its birth 2" in told["summary"]["killed"]
    assert "complete" in told["summary"]["missions"]
    assert "increment" in told["summary"]["answered"]


@linux
def test_a_home_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "live_image.fs").touch()
    assert main(["torture", "--kills", "0", "--home", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_what_is_lost_is_told_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, passed: bool, status: int
) -> None:
    report = Report("torture", [Case("every acknowledged commit is there", passed, 1.0)], must_pass=True)
    monkeypatch.setattr(torture, "run", lambda args: report)
    assert main(["torture"]) == status


def test_the_same_seed_is_the_same_plan() -> None:
    once, again, other = (plan(60, random.Random(seed)) for seed in (1, 1, 2))
    assert once == again != other
    assert {kind for blow in once for kind in blow.kinds} == {"kernel", "watchdog", "zygote", "hand"}
    assert {blow.early for blow in once} == {True, False}


async def test_a_request_waits_until_the_journal_is_taken_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BATOS_HOME", str(tmp_path))
    kernel = Kernel(Settings())
    early = asyncio.create_task(kernel._handle(Ping(command="ping")))
    done, _ = await asyncio.wait([early], timeout=0.1)  # its organs are not there: it would fail
    assert not done
    early.cancel()


# The script


@pytest.mark.parametrize("kind", [*script.KINDS])
@pytest.mark.parametrize(
    ("question", "edition"),
    [("  self.{}_17(5) returns [5, 17, 3]", 3), ("It was called as: self.{}_17(5)", 1)],
)
def test_the_personas_write_what_was_asked_for(
    tmp_path: Path, kind: str, question: str, edition: int
) -> None:
    script.settings(tmp_path)
    told = Scripted.from_file(tmp_path / "script.json").generate(
        [Message("user", question.format(kind))],
        schema=None,
        max_tokens=200,
        temperature=0,
        seed=1,
        on_token=lambda _: None,
        cancelled=lambda: False,
    )
    names: dict[str, Any] = {}
    exec(told.text.removeprefix("```python\n").removesuffix("```"), names)
    assert names[f"{kind}_17"](None, 7) == script.answer(f"{kind}_17", 7, edition)


# Processes


@linux
def test_processes_are_known_by_their_home_and_killed_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "batos.py").write_text("import time; print('up', flush=True); time.sleep(600)")

    def start(home: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tmp_path / "batos.py")]
        environment = os.environ | {"BATOS_HOME": str(tmp_path / home)}
        started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert started.stdout is not None
        assert started.stdout.readline() == b"up\n"
        started.stdout.close()
        return started

    mine, other = start("mine"), start("other")
    census = Census(tmp_path / "mine")
    try:
        (found,) = census.take()
        assert (found.pid, found.kind, found.kernel) == (mine.pid, KERNEL, mine.pid)
        assert not strike(Process(other.pid, found.born - 1, 1, KERNEL, 0))  # another that had its pid before
        assert strike(found)
        assert mine.wait(20) == -9
        assert not strike(found)
        assert census.leftover() == []
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


@linux
@pytest.mark.parametrize("pid", [1, 0, -1])
def test_what_is_no_process_is_never_killed(pid: int) -> None:
    with pytest.raises(ValueError, match="no process of ours"):
        strike(Process(pid, 0, 0, KERNEL, 0))


# The verdict


@linux
def test_faults_of_the_kernel_are_read_from_what_it_prints(tmp_path: Path) -> None:
    house = House(tmp_path, {})
    (tmp_path / "run").mkdir()
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nKeyError: 7\n'
    (tmp_path / "run" / "kernel.log").write_text(f"[UVM] live\n{trace}[UVM] live\n", encoding="utf-8")
    (tmp_path / "run" / "kernel.log.1").write_text(trace.replace("7", "6"), encoding="utf-8")  # moved aside
    assert house.faults() == ["KeyError: 6", "KeyError: 7"]


async def _keep(home: Path, *units: Any) -> None:
    """Makes an image with a client's objects, and what `units` do to it."""
    image = LivingImage(str(home / "live_image.fs"), home / "live_image.fs.blob")
    image.open()
    book = Book("0")

    def objects(txn: Txn) -> None:
        txn.create(book.ledger, (), {"count": 2, "entries": [1, 2]})
        txn.create(book.store, (), {"slot_3": 3})
        txn.create(book.pupil, (), {})
        txn.create("made_0_4", (), {"mark": 4})

    for unit in (objects, *units):
        await image.attempt("a test", unit)
    image.close()


def _found(home: Path, book: Book) -> Findings:
    findings = Findings(home, [book])
    findings.look()
    return findings


def _book(home: Path) -> Book:
    """Returns a book that says what the image holds."""
    image = LivingImage(str(home / "live_image.fs"), home / "live_image.fs.blob")
    image.open()
    with image.view() as txn:
        oid = txn.find("made_0_4").oid
    image.close()
    book = Book("0", entries={1, 2}, acknowledged={1, 2}, objects={"made_0_4": 4}, made={"made_0_4": oid})
    book.slots["slot_3"] = Slot(acknowledged=3)
    return book


FAULTS = ("lost", "doubled", "uninvited", "half_installed", "versions", "unreasoned", "open")


def _faults(findings: Findings) -> set[str]:
    return {name for name in FAULTS if getattr(findings, name)}


async def test_an_image_that_is_as_it_was_told_has_no_fault(tmp_path: Path) -> None:
    await _keep(tmp_path)
    findings = _found(tmp_path, _book(tmp_path))
    assert _faults(findings) == set()
    assert findings.unreadable() == []
    assert findings.transactions >= 2


async def test_what_an_acknowledged_commit_lacks_is_seen(tmp_path: Path) -> None:
    await _keep(tmp_path)
    book = _book(tmp_path)
    book.entries.add(9)
    assert _faults(_found(tmp_path, book)) == set()  # it was sent, and never acknowledged
    book.acknowledged.add(9)
    book.slots["slot_3"] = Slot(acknowledged=5)
    book.slots["slot_8"] = Slot(doubtful=8)
    book.made["made_0_6"] = "00000000000000ff"
    findings = _found(tmp_path, book)
    assert _faults(findings) == {"lost"}
    assert len(findings.lost) == 3


async def test_what_was_done_twice_or_by_nobody_is_seen(tmp_path: Path) -> None:
    def twice(txn: Txn) -> None:
        txn.edit(txn.find("ledger_0_obj"), {"entries": [1, 2, 2, 7], "count": 3})

    await _keep(tmp_path, twice)
    assert _faults(_found(tmp_path, _book(tmp_path))) == {"doubled", "uninvited", "half_installed"}


def _mission(
    txn: Txn, selector: str, state: str, error: dict[str, Any] | None = None, origin: str = "architect"
) -> str:
    row = journal.add(txn, txn.find("pupil_0_obj").oid, {"selector": selector}, origin)
    journal.finish(txn, row.mission_id, state, {"error": error} if error else {})
    return row.mission_id


def _install(txn: Txn, selector: str, mission_id: str) -> None:
    provenance = {"mission_id": mission_id, "description": None}
    method = UvmMethod(selector, (), "def f(self): pass", "", provenance, [])
    slots = txn.find("pupil_0_obj")._slots
    slots[selector] = slots[selector].succeed(method) if selector in slots else method


async def test_a_mission_without_its_method_or_memory_is_half_installed(tmp_path: Path) -> None:
    await _keep(tmp_path, lambda txn: _mission(txn, "add_1", "complete"))
    assert _faults(_found(tmp_path, _book(tmp_path))) == {"half_installed"}


async def test_a_method_of_no_mission_is_half_installed(tmp_path: Path) -> None:
    await _keep(tmp_path, lambda txn: _install(txn, "add_1", "never"))
    assert _faults(_found(tmp_path, _book(tmp_path))) == {"half_installed"}


async def test_a_mission_that_was_installed_twice_is_seen(tmp_path: Path) -> None:
    def twice(txn: Txn) -> None:
        mission_id = _mission(txn, "add_1", "complete")
        _install(txn, "add_1", mission_id)
        _install(txn, "add_1", mission_id)

    await _keep(tmp_path, twice)
    assert "versions" in _faults(_found(tmp_path, _book(tmp_path)))


@pytest.mark.parametrize(("second", "seen"), [(MISS, True), ("architect", False)])
async def test_a_miss_that_was_learned_twice_is_seen(tmp_path: Path, second: str, seen: bool) -> None:
    def twice(txn: Txn) -> None:
        for origin in (MISS, second):  # the second of the Architect's is a revision
            _install(txn, "add_1", _mission(txn, "add_1", "complete", origin=origin))

    await _keep(tmp_path, twice)
    book = _book(tmp_path)
    assert "versions" not in _faults(_found(tmp_path, book))
    book.missed.add("add_1")
    assert ("versions" in _faults(_found(tmp_path, book))) == seen


@pytest.mark.parametrize(
    ("selector", "error", "faults"),
    [
        ("bad_1", {"type": "MissionFailed", "message": "it must return 1"}, set()),
        ("add_1", {"type": "HandDied", "message": "the audit was killed by SIGKILL"}, set()),
        ("add_1", {"type": "MissionFailed", "message": "it must return 1"}, {"unreasoned"}),
        ("add_1", None, {"unreasoned"}),
    ],
)
async def test_a_mission_may_fail_for_a_reason_only(
    tmp_path: Path, selector: str, error: dict[str, Any] | None, faults: set[str]
) -> None:
    await _keep(tmp_path, lambda txn: _mission(txn, selector, "failed", error))
    assert _faults(_found(tmp_path, _book(tmp_path))) == faults


async def test_an_open_mission_is_seen(tmp_path: Path) -> None:
    def begin(txn: Txn) -> None:
        journal.add(txn, txn.find("pupil_0_obj").oid, {"selector": "add_1"}, "architect")

    await _keep(tmp_path, begin)
    assert _faults(_found(tmp_path, _book(tmp_path))) == {"open"}


def test_where_missions_were_interrupted_is_read_from_the_log() -> None:
    live = {"event": "kernel", "change": "live"}
    states = [("a", "IDLE"), ("b", "IDLE"), ("b", "VALIDATING"), ("b", "COMPLETE"), ("a", "DECOMPOSING")]
    moves = [{"event": "transition", "cycle": cycle, "state": state} for cycle, state in states]
    assert interrupted([live, *moves, live, live]) == {"DECOMPOSING": 1}


def test_a_slot_may_hold_what_was_acknowledged_or_what_came_after() -> None:
    assert Slot(acknowledged=1, doubtful=2).possible == {1, 2}
    assert Slot(doubtful=2).possible == {None, 2}
    assert Slot(acknowledged=1).possible == {1}
