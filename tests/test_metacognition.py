"""The log: one JSON object a line, in order, on disk before the caller moves on."""

import asyncio
import json
import resource
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from uvm.metacognition import MetacognitionLog


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def test_a_record_is_on_disk_when_record_returns(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metacognition.jsonl"
    heard: list[tuple[str, dict[str, Any]]] = []
    log = MetacognitionLog(path, (lambda event, fields: heard.append((event, fields)),))
    await log.record("transition", state="IDLE", text="zwei\nZeilen, ünïcode", odd={1, 2})
    (record,) = lines(path)
    assert record["event"] == "transition"
    assert (record["seq"], record["text"], record["odd"]) == (1, "zwei\nZeilen, ünïcode", "{1, 2}")
    assert record["ts"].endswith("+00:00")
    assert heard[0][0] == "transition"
    await log.close()


async def test_what_json_does_not_have_is_told_in_text(tmp_path: Path) -> None:
    path = tmp_path / "metacognition.jsonl"
    log = MetacognitionLog(path)
    await log.record("odd", value=[{(1, 2): 3}, "\udc80", 16**4000, {16**4000}, Fraction(16**4000, 3), 7])
    await log.record("even", value={(1, 2): 3})
    odd, even = lines(path)
    large = "0x1" + "0" * 4000
    assert odd["value"] == [{"[1, 2]": 3}, "\udc80", large, [large], "a Fraction", 7]
    assert even["value"] == {"[1, 2]": 3}
    await log.close()


async def test_records_of_many_tasks_stay_in_order(tmp_path: Path) -> None:
    log = MetacognitionLog(tmp_path / "log")
    await asyncio.gather(*(log.record("thought", n=n) for n in range(100)))
    await log.close()
    assert [record["seq"] for record in lines(tmp_path / "log")] == list(range(1, 101))


async def test_seq_goes_on_after_a_restart_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = MetacognitionLog(path)
    await log.record("one")
    await log.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"ts": "2020", "seq": 2, "eve')
    log = MetacognitionLog(path)
    await log.record("two")
    await log.close()
    whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert [json.loads(line)["seq"] for line in whole] == [1, 2]


async def test_a_record_that_can_not_be_written_raises(tmp_path: Path) -> None:
    log = MetacognitionLog(tmp_path / "gone" / "log")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match="gone"):
        await log.record("lost")
    await log.close()


async def test_tokens_are_announced_but_not_logged(tmp_path: Path) -> None:
    heard: list[str] = []
    log = MetacognitionLog(tmp_path / "log", (lambda event, fields: heard.append(fields["text"]),))
    log.announce("token", text="def")
    assert heard == ["def"]
    assert not (tmp_path / "log").exists()
    await log.close()


async def test_a_listener_that_raises_keeps_nobody_waiting(tmp_path: Path) -> None:
    heard: list[str] = []
    faults: list[BaseException] = []

    def fails(event: str, fields: dict[str, Any]) -> None:
        raise MemoryError(event)

    log = MetacognitionLog(
        tmp_path / "log", (fails, lambda event, fields: heard.append(event)), report=faults.append
    )
    names = [f"thought {n}" for n in range(5)]
    await asyncio.wait_for(asyncio.gather(*(log.record(name) for name in names)), 20)
    log.announce("token")
    await log.record("after")
    await log.close()
    assert heard == [*names, "token", "after"]
    assert [str(fault) for fault in faults] == heard
    assert [record["event"] for record in lines(tmp_path / "log")] == [*names, "after"]


async def test_a_report_that_raises_too_changes_nothing(tmp_path: Path) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no room to say so")

    log = MetacognitionLog(tmp_path / "log", (fails,), report=fails)
    await asyncio.wait_for(asyncio.gather(*(log.record("thought") for _ in range(3))), 20)
    await log.close()
    assert len(lines(tmp_path / "log")) == 3


def set_aside(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in ("metacognition.jsonl", "log")]


async def test_a_large_log_is_set_aside_at_the_start_and_seq_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metacognition.jsonl"
    log = MetacognitionLog(path, max_mib=1)
    await log.record("large", text="x" * (1 << 20))
    await log.record("more")
    await log.close()
    before = path.read_bytes()
    for _ in range(2):  # also where a kernel ended before it wrote anything
        await MetacognitionLog(path, max_mib=1).close()
        (aside,) = set_aside(tmp_path)
        assert aside.read_bytes() == before
        assert not path.exists()
    log = MetacognitionLog(path, max_mib=1)
    await log.record("new")
    await log.close()
    assert [record["seq"] for record in lines(path)] == [3]
    await MetacognitionLog(path, max_mib=1).close()
    assert path.exists()  # it is small


async def test_a_limit_of_nothing_sets_no_log_aside(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"seq": 7, "text": "' + "x" * (2 << 20) + '"}\n', encoding="utf-8")
    log = MetacognitionLog(path, max_mib=0)
    await log.record("next")
    await log.close()
    assert set_aside(tmp_path) == []
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["event"] == "next"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
async def test_a_line_that_does_not_fit_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = MetacognitionLog(path)
    await log.record("one")
    limit = path.stat().st_size + 50
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            await log.record("two", text="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await log.record("three")
    await log.close()
    assert [(record["seq"], record["event"]) for record in lines(path)] == [(1, "one"), (2, "three")]
