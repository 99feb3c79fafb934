"""Missions and the end of kernels: real ones, killed and stopped at every stage. The personas recite."""

import asyncio
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from evals.kernels import KernelProcess
from tests.conftest import Start, scripted, writes
from tests.test_kernel import STALLS, thoughts, until
from tests.test_missions import becomes_true
from uvm import errors
from uvm.client import Kernel
from uvm.codec import Ref

pytestmark = pytest.mark.slow


def slow(*selectors: str) -> list[dict[str, Any]]:
    """Returns script lines that write methods, after a script in which they stall."""
    return [line for name in selectors for line in writes(name, f"def {name}(x):\n    return x * x")]


async def versions(kernel: Kernel, selector: str) -> int:
    told = await kernel.request("method_history", target_oid="genesis_obj", selector=selector)
    return len(told)


async def reaches(kernel: Kernel, mission_id: str, state: str) -> dict[str, Any]:
    """Waits until a mission is in this state and returns its record."""
    record: dict[str, Any] = {}

    async def is_there() -> bool:
        record.update(await kernel.request("mission", mission_id=mission_id))
        return bool(record["state"] == state)

    await becomes_true(is_there)
    return record


async def running(process: KernelProcess, mission_id: str, starts: int = 1) -> None:
    """Waits until a mission's method is being written."""
    cycle = f"{mission_id}.{starts}"
    await until(lambda: [prompt["cycle"] for prompt in thoughts(process, "prompt")].count(cycle) == 2)


async def test_what_was_acknowledged_is_done_once(start_kernel: Start, tmp_path: Path) -> None:
    names = [f"slow_{n}" for n in range(5)]
    process = start_kernel(scripted(tmp_path, [STALLS]))
    async with process.client() as kernel:
        begun = [await kernel.teach("genesis_obj", name, ["x"], wait=False) for name in names]
    process.kill()
    scripted(tmp_path, slow(*names))
    process.start()
    async with process.client() as kernel:
        for row in begun:
            await reaches(kernel, row["mission_id"], "complete")
        for name in names:
            assert await versions(kernel, name) == 1
        assert await kernel.request("missions", state="running") == []


async def test_a_kill_as_soon_as_the_commit_is_heard_of(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, slow("slow_a")))
    async with process.client() as kernel:
        teaching = asyncio.ensure_future(kernel.teach("genesis_obj", "slow_a", ["x"]))
        await until(lambda: any("unhandled" in c["note"] for c in thoughts(process, "commit")))
        process.kill()
        teaching.cancel()
        await asyncio.gather(teaching, return_exceptions=True)
    prompts = len(thoughts(process, "prompt"))
    process.start()
    async with process.client() as kernel:
        (row,) = await kernel.request("missions")
        assert (row["state"], row["starts"], row["deaths"]) == ("complete", 1, 0)
        assert await kernel.send("genesis_obj", "slow_a", 4) == 16
    assert "taken up" not in process.log
    assert len(thoughts(process, "prompt")) == prompts


async def test_two_kills_and_a_third_start(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS], WORKER_COUNT="1"))
    async with process.client() as kernel:
        bad = await kernel.teach("genesis_obj", "slow_bad", ["x"], wait=False)
        await running(process, bad["mission_id"])
        good = await kernel.teach("genesis_obj", "slow_good", ["x"], wait=False)
    process.kill()
    process.start()  # the innocent runs first: the suspect does not die with it
    await running(process, good["mission_id"])
    process.kill()
    process.start()
    await running(process, bad["mission_id"], starts=2)
    async with process.client() as kernel:
        assert (await kernel.request("mission", mission_id=good["mission_id"]))["deaths"] == 1
    process.kill()
    scripted(tmp_path, slow("slow_bad", "slow_good"))
    process.start()
    assert "quarantine: 1; see /missions quarantined" in process.log
    async with process.client() as kernel:
        (row,) = await kernel.request("missions", state="quarantined")
        assert (row["mission_id"], row["starts"], row["deaths"]) == (bad["mission_id"], 2, 2)
        cycles = row["error"]["details"]["cycles"]
        assert {prompt["cycle"] for prompt in thoughts(process, "prompt")} >= set(cycles)
        await reaches(kernel, good["mission_id"], "complete")
        again = await kernel.teach("genesis_obj", "slow_bad", ["x"])
        assert again["state"] == "COMPLETE"
        assert await versions(kernel, "slow_bad") == 1


async def test_sigterm_in_the_middle_of_a_generation(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS]))
    for starts in (1, 2, 3):
        async with process.client() as kernel:
            if starts == 1:
                waiter = asyncio.ensure_future(kernel.teach("genesis_obj", "slow_a", ["x"]))
            await until(lambda n=starts: len(thoughts(process, "prompt")) >= 2 * n)
            (row,) = await kernel.request("missions", state="running")
            assert await asyncio.to_thread(process.stop, 20) == 0  # the watchdog's patience
            if starts == 1:
                with pytest.raises(errors.ShuttingDown) as told:
                    await waiter
                assert told.value.details["mission_id"] == row["mission_id"]
        if starts == 3:
            scripted(tmp_path, slow("slow_a"))
        process.start()
    async with process.client() as kernel:
        record = await reaches(kernel, row["mission_id"], "complete")
        assert (record["starts"], record["deaths"]) == (4, 0)


async def test_deadlines_over_the_wire_and_over_a_restart(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS]))
    async with process.client() as kernel:
        with pytest.raises(errors.MissionExpired):
            await kernel.teach("genesis_obj", "slow_a", ["x"], deadline_s=0.2)
        wrong: Any
        for wrong in (0, -1, 1e9, float("nan"), "soon"):
            with pytest.raises(errors.InvalidField):
                await kernel.teach("genesis_obj", "slow_b", ["x"], deadline_s=wrong)
        begun = await kernel.teach("genesis_obj", "slow_c", ["x"], wait=False, deadline_s=1)
    process.kill()
    process.start()
    async with process.client() as kernel:
        row = await reaches(kernel, begun["mission_id"], "failed")
        assert row["error"]["type"] == "MissionExpired"


async def test_a_kill_while_missions_are_taken_up(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS], WORKER_COUNT="1"))
    async with process.client() as kernel:
        begun = [await kernel.teach("genesis_obj", f"slow_{n}", ["x"], wait=False) for n in range(3)]
    await running(process, begun[0]["mission_id"])
    process.kill()
    starting = asyncio.create_task(asyncio.to_thread(process.start))
    await until(lambda: any(c["note"] == "missions taken up" for c in thoughts(process, "commit")))
    process.kill()
    await asyncio.gather(starting, return_exceptions=True)  # it was live, or not yet
    scripted(tmp_path, slow("slow_0", "slow_1", "slow_2"))
    process.start()
    async with process.client() as kernel:
        records = [await reaches(kernel, row["mission_id"], "complete") for row in begun]
        assert records[0]["deaths"] == 1  # that of the kernel before, counted once
        assert [await versions(kernel, f"slow_{n}") for n in range(3)] == [1, 1, 1]


async def test_briefs_keep_references_and_numbers_over_a_kill(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS]))
    async with process.client() as kernel:
        await kernel.request("create_object", name="other_obj", slots={"mark": Fraction(1, 3)})
        other = Ref((await kernel.request("inspect", target_oid="other_obj"))["oid"])
        example = {"args": [other], "returns": (other, Fraction(1, 3))}
        row = await kernel.teach("genesis_obj", "slow_pair", ["x"], None, [example], wait=False)
        await running(process, row["mission_id"])
    process.kill()
    right = writes("slow_pair", "def slow_pair(self, x):\n    return (x, x.mark)")
    changed = writes("slow_pair", "def slow_pair(self, x):\n    '''Pairs.'''\n    return (x, x.mark)")
    scripted(tmp_path, [*right, *writes("seen", "def seen(self, x):\n    return x.mark"), *changed])
    process.start()
    async with process.client() as kernel:
        record = await reaches(kernel, row["mission_id"], "complete")
        assert record["brief"]["examples"] == [example]
        (logged,) = thoughts(process, "mission")[-1]["brief"]["examples"]
        assert logged["returns"] == [repr(other), "Fraction(1, 3)"]
        assert await kernel.send("genesis_obj", "seen", other) == Fraction(1, 3)  # a miss, learned
    process.kill()
    process.start()
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "seen", other) == Fraction(1, 3)
        again = await kernel.teach("genesis_obj", "slow_pair", ["x"], None, [], type="revision")
        assert again["state"] == "COMPLETE"
        for selector, trials in (("seen", [[other]]), ("slow_pair", [[other], [other]])):
            told = await kernel.request("method_history", target_oid="genesis_obj", selector=selector)
            kept = [one for version in told for one in version["trials"] if one["origin"] != "sample"]
            assert [one["args"] for one in kept] == trials
        methods = (await kernel.request("inspect", target_oid="genesis_obj"))["methods"]
        assert methods["slow_pair"]["trials"][-1]["returns"] == (other, Fraction(1, 3))
        back = await kernel.request("revert_method", target_oid="genesis_obj", selector="slow_pair")
        assert back[-1]["trials"] == back[0]["trials"] == [{**example, "kwargs": {}, "origin": "example"}]
