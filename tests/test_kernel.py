"""The kernel as a real process: every command, bad input, kills and restarts. The personas recite scripts."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from evals.fuzzing.frames import deep_in_extensions
from evals.kernels import PROJECT, KernelProcess
from tests.conftest import Start, scripted, writes
from uvm import codec, errors
from uvm.client import Kernel
from uvm.codec import Ref
from uvm.messages import COMMANDS, pack_request, unpack

pytestmark = pytest.mark.slow

SQUARE = "def square(self, x):\n    return x * x"
INCREMENT = (
    "def increment(self):\n"
    "    if not hasattr(self, 'count'):\n"
    "        self.count = 0\n"
    "    self.count += 1\n"
    "    return self.count"
)
STALLS = {"pattern": "Write `def slow", "stall": True}


def thoughts(kernel: KernelProcess, event: str) -> list[dict[str, Any]]:
    lines = (kernel.home / "metacognition.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Waits until `condition()` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what it waits for happens in another process)
            await asyncio.sleep(0.02)


async def test_a_miss_is_learned_once_and_for_ever(start_kernel: Start, tmp_path: Path) -> None:
    settings = scripted(tmp_path, writes("square", SQUARE))
    process = start_kernel(settings)
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "square", 12) == 144
        assert await kernel.send("genesis_obj", "square", 5) == 25
    assert len(thoughts(process, "prompt")) == 2  # BRICK and ALFRED, once
    process.kill()
    process.start()
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "square", 3) == 9
        told = await kernel.request("inspect", target_oid="genesis_obj")
    assert len(thoughts(process, "prompt")) == 2
    method = told["methods"]["square"]
    assert method["provenance"]["persona"] == "ALFRED"
    assert len(method["provenance"]["model_sha256"]) == 64
    assert method["provenance"]["prompt"][0]["role"] == "user"
    assert method["trials"] == [{"args": [12], "kwargs": {}, "origin": "call"}]
    states = [record["state"] for record in thoughts(process, "transition")]
    assert states == ["IDLE", "DECOMPOSING", "DELEGATING", "SYNTHESIZING", "VALIDATING", "COMPLETE"]


async def test_state_counts_across_restarts_and_the_covenant_is_mended(
    start_kernel: Start, tmp_path: Path
) -> None:
    process = start_kernel(scripted(tmp_path, writes("increment", INCREMENT)))
    async with process.client() as kernel:
        assert [await kernel.send("genesis_obj", "increment") for _ in range(3)] == [1, 2, 3]
    assert any(finding["mended"] for finding in thoughts(process, "finding"))
    assert process.stop() == 0
    process.start()
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "increment") == 4


async def test_the_same_miss_of_many_callers_is_one_mission(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("square", SQUARE)))
    async with process.client() as kernel:
        answers = await asyncio.gather(*(kernel.send("genesis_obj", "square", n) for n in range(8)))
        assert answers == [n * n for n in range(8)]
        assert len(await kernel.request("missions")) == 1


async def test_a_miss_inside_a_method_is_learned_too(start_kernel: Start, tmp_path: Path) -> None:
    caller = "def quadruple(self, x):\n    return self.double(self.double(x))"
    double = "def double(self, x):\n    return x + x"
    lines = [*writes("quadruple", caller), *writes("double", double)]
    process = start_kernel(scripted(tmp_path, lines))
    async with process.client() as kernel:
        await kernel.send("genesis_obj", "double", 1)
        assert await kernel.send("genesis_obj", "quadruple", 3) == 12
        oid = await kernel.request("create_object", name="other_obj", parents=["genesis_obj"])
        assert len(oid) == 16
        assert await kernel.send("other_obj", "quadruple", "ab") == "abababab"


async def test_generated_code_that_runs_wild_is_a_typed_error(start_kernel: Start, tmp_path: Path) -> None:
    bodies = {
        "spin": "    while x:\n        pass\n    return 0",
        "swell": "    data = [0]\n    while x:\n        data = data + data\n    return 0",
        "leave": "    random._os._exit(3) if x else None\n    return 0",
        "crash": "    return 1 // (1 - x)",
    }
    sources = {name: f"import random\ndef {name}(self, x):\n{body}" for name, body in bodies.items()}
    lines = [line for name, source in sources.items() for line in writes(name, source)]
    process = start_kernel(scripted(tmp_path, lines, MAX_SYNTHESIS_ATTEMPTS="1"))
    async with process.client() as kernel:
        for name in ("spin", "swell", "crash"):
            await kernel.teach(
                "genesis_obj", name, ["x"], examples=[{"args": [0], "returns": 0 if name != "crash" else 1}]
            )
        before = await kernel.request("inspect", target_oid="genesis_obj")
        with pytest.raises(errors.HandTimeout):
            await kernel.send("genesis_obj", "spin", 1)
        with pytest.raises(errors.HandOutOfMemory):
            await kernel.send("genesis_obj", "swell", 1)
        with pytest.raises(errors.MethodRaised, match="ZeroDivisionError"):
            await kernel.send("genesis_obj", "crash", 1)
        with pytest.raises(errors.MissionFailed, match="_exit"):
            await kernel.teach("genesis_obj", "leave", ["x"], examples=[{"args": [0], "returns": 0}])
        assert await kernel.send("genesis_obj", "crash", 0) == 1
        assert await kernel.request("inspect", target_oid="genesis_obj") == before


async def test_a_failed_cycle_leaves_nothing_but_its_row(start_kernel: Start, tmp_path: Path) -> None:
    answers = [
        "I would rather talk about it.",
        "def wrong_name(self, x):\n    return x",
        "def answer(self, x):\n    return x\ndef other(self, x):\n    return x",
        "def answer(self, x):\n    return " + "x + " * 400 + "x",
        "def answer(self, x):\n    return 41",
    ]
    lines = [
        line for text in answers for line in writes("answer", text if "def" in text else f"```\n{text}\n```")
    ]
    process = start_kernel(scripted(tmp_path, lines, MAX_SYNTHESIS_ATTEMPTS="5", MAX_SYNTHESIS_TOKENS="200"))
    async with process.client() as kernel:
        before = [await kernel.request("inspect", target_oid=row["oid"]) for row in await objects(kernel)]
        with pytest.raises(errors.MissionFailed, match="must return 42, but it returned 41") as failure:
            await kernel.teach("genesis_obj", "answer", ["x"], examples=[{"args": [1], "returns": 42}])
        after = [await kernel.request("inspect", target_oid=row["oid"]) for row in await objects(kernel)]
        assert after == before
        record = await kernel.request("mission", mission_id=failure.value.details["mission_id"])
        assert (record["state"], record["attempts"]) == ("failed", 5)
        assert "41" in record["error"]["message"]
    rules = [finding["rule"] for finding in thoughts(process, "finding")]
    assert len(rules) >= 5
    assert "endless" in rules
    process.stop()
    dump = subprocess.run(  # noqa: ASYNC221 (nothing else runs in this test)
        [sys.executable, "-m", "ZODB.FileStorage.fsdump", str(process.home / "live_image.fs")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "UvmMethod" not in dump
    assert "MissionRow" in dump


async def objects(kernel: Kernel) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = await kernel.request("list_objects")
    return rows


async def test_every_command_answers(start_kernel: Start, tmp_path: Path) -> None:
    v2 = "def square(self, x):\n    return x ** 2"
    process = start_kernel(scripted(tmp_path, writes("square", SQUARE, v2)))
    answered = set()
    async with process.client() as kernel:

        async def ask(command: str, **fields: Any) -> Any:
            answered.add(command)
            return await kernel.request(command, **fields)

        assert (await ask("ping"))["pid"] == process.pid
        oid = await ask("create_object", name="shop_obj", slots={"stock": {"apple": 3}, "tags": ("a", "b")})
        assert await ask("set_slot", target_oid="shop_obj", slot="owner", value=Ref(oid)) is None
        told = await ask("inspect", target_oid=oid)
        assert told["slots"] == {"stock": {"apple": 3}, "tags": ("a", "b"), "owner": Ref(oid)}
        assert told["parents"] == ["traits_obj"]
        assert await ask("send_message", target_oid="shop_obj", selector="stock") == {"apple": 3}
        assert await ask("delete_slot", target_oid="shop_obj", slot="owner") is None
        brief = {"selector": "square", "args": [3]}
        done = await ask("initiate_cognitive_cycle", target_oid="shop_obj", mission_brief=brief)
        assert (done["state"], done["result"], done["method"]["parameters"]) == ("COMPLETE", 9, ["x"])
        with pytest.raises(errors.SlotProtected):
            await ask("set_slot", target_oid="shop_obj", slot="square", value=1)
        brief = {"selector": "square", "type": "revision", "description": "use a power", "parameters": ["x"]}
        await ask("initiate_cognitive_cycle", target_oid="shop_obj", mission_brief=brief)
        versions = await ask("method_history", target_oid="shop_obj", selector="square")
        assert ["**" in version["source"] for version in versions] == [False, True]
        await ask("revert_method", target_oid="shop_obj", selector="square")
        assert "**" not in (await ask("inspect", target_oid="shop_obj"))["methods"]["square"]["source"]
        rows = await ask("list_objects", prefix="shop", limit=1)
        assert rows == [{"name": "shop_obj", "oid": oid, "selectors": {"square": ["x"]}}]
        await ask("set_slot", target_oid="shop_obj", slot="n", value=1)
        await ask("set_slot", target_oid="shop_obj", slot="n", value=2)
        last = thoughts(process, "commit")[-1]["transaction_id"]
        await ask("undo", transaction_id=last)
        assert await kernel.send("shop_obj", "n") == 1
        past = await kernel.request("send_message", target_oid="shop_obj", selector="n", as_of=last)
        assert past == 2
        granted = await ask("grant", target_oid="shop_obj", kind="clock", slot="watch")
        assert await ask("grants") == await ask("grants", target_oid="shop_obj") == [granted]
        assert (granted["object"], granted["slot"], granted["kind"]) == ("shop_obj", "watch", "clock")
        assert await ask("revoke", target_oid="shop_obj", slot="watch") is None
        await ask("remember", text="The moon is made of green cheese.", source="a test")
        (found, *_) = await ask("recall", query="moon cheese")
        assert (found["source"], found["kind"]) == ("a test", "document")
        missions = await ask("missions", state="complete")
        assert [m["brief"].get("type", "") for m in missions] == ["revision", ""]
        assert (await ask("mission", mission_id=missions[0]["mission_id"]))["state"] == "complete"
        assert (await ask("cancel_mission", mission_id=missions[0]["mission_id"]))["state"] == "complete"
        assert (await ask("upkeep", what="backup"))["what"] == "backup"
        status = await ask("status")
        assert status["upkeep"]["backup"]["bytes"] == status["image"]["bytes"]
        assert status["home"] == str(process.home)
        assert status["image"]["records"] > 8
        assert status["sandbox"]["tier"]
        assert (await ask("shutdown"))["pid"] == process.pid
        assert answered == COMMANDS.keys()
    assert process.process is not None
    assert await asyncio.to_thread(process.process.wait, 20) == 0


async def test_wrong_requests_are_typed_errors(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        before = await objects(kernel)
        genesis, revision = {"target_oid": "genesis_obj"}, {"selector": "x", "type": "revision"}
        wrong: list[tuple[type[errors.BatosError], str, dict[str, Any]]] = [
            (errors.UnknownCommand, "explode", {}),
            (errors.InvalidField, "send_message", {"target_oid": "genesis_obj", "selector": "not a name"}),
            (errors.InvalidField, "send_message", {"target_oid": "genesis_obj"}),
            (errors.ObjectNotFound, "send_message", {"target_oid": "nobody", "selector": "x"}),
            (errors.ObjectNotFound, "inspect", {"target_oid": "f" * 16}),
            (errors.DoesNotUnderstand, "send_message", {**genesis, "selector": "x", "on_missing": "error"}),
            (errors.InvalidField, "remember", {"text": ""}),
            (errors.ObjectExists, "create_object", {"name": "genesis_obj"}),
            (errors.ObjectNotFound, "create_object", {"name": "x", "slots": {"a": Ref("f" * 16)}}),
            (errors.SlotNotFound, "delete_slot", {"target_oid": "genesis_obj", "slot": "x"}),
            (errors.GrantMissing, "send_message", {**genesis, "selector": "files"}),
            (errors.SlotNotFound, "revoke", {**genesis, "slot": "files"}),
            (errors.InvalidField, "grant", {**genesis, "kind": "rockets"}),
            (errors.InvalidField, "grant", {**genesis, "kind": "files"}),
            (errors.InvalidField, "grant", {**genesis, "kind": "files", "options": {"path": "here"}}),
            (errors.InvalidField, "grant", {**genesis, "kind": "files", "options": {"path": "/none"}}),
            (errors.InvalidField, "grant", {**genesis, "kind": "http", "options": {"hosts": ["http://a"]}}),
            (errors.InvalidField, "grant", {**genesis, "kind": "clock", "options": {"path": "/tmp"}}),
            (errors.SlotProtected, "grant", {**genesis, "kind": "clock", "slot": "clone"}),
            (errors.ObjectNotFound, "grants", {"target_oid": "nobody"}),
            (errors.SlotProtected, "set_slot", {"target_oid": "genesis_obj", "slot": "clone", "value": 1}),
            (errors.SlotProtected, "set_slot", {"target_oid": "genesis_obj", "slot": "parents", "value": []}),
            (errors.InvalidField, "set_slot", {"target_oid": "genesis_obj", "slot": "_slots", "value": 1}),
            (errors.MethodNotFound, "method_history", {"target_oid": "genesis_obj", "selector": "x"}),
            (errors.MissionNotFound, "mission", {"mission_id": "none"}),
            (errors.TransactionNotFound, "undo", {"transaction_id": "0" * 16}),
            (errors.MissionFailed, "initiate_cognitive_cycle", {**genesis, "mission_brief": revision}),
        ]  # fmt: skip
        for kind, command, fields in wrong:
            with pytest.raises(kind):
                await kernel.request(command, **fields)
        assert await objects(kernel) == before


async def test_bad_frames_are_answered_and_forgotten(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        frames = [b"", b"\xc1", b"\x91" * 5000, codec.encode([1]), codec.encode({"v": 1}), os.urandom(500)]
        frames += [deep_in_extensions(60, 900)]  # 54 KB that once took the kernel's stack
        frames += [pack_request("1", "ping", {})[:-1], pack_request("1", "ping", {}) + b"\x00"]
        for frame in frames:
            await kernel._socket.send(frame)
        await kernel._socket.send_multipart([b"two", b"frames"])
        assert (await kernel.request("ping"))["pid"] == process.pid


async def test_requests_from_a_req_socket(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        socket = kernel._keyed(zmq.REQ)
        socket.connect(kernel._endpoint)
        await socket.send(pack_request("x", "ping", {}))
        assert unpack(await socket.recv())["id"] == "x"
        socket.close(linger=0)


async def test_cancelling_a_mission_stops_its_generation(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, [STALLS, *writes("square", SQUARE)]))
    async with process.client() as kernel:
        begun = await kernel.teach("genesis_obj", "slow", ["x"], wait=False)
        mission = begun["mission_id"]
        await until(lambda: any("slow" in str(p["messages"][-1]) for p in thoughts(process, "prompt")[1:]))
        assert (await kernel.request("mission", mission_id=mission))["state"] == "running"
        assert (await kernel.request("cancel_mission", mission_id=mission))["state"] == "cancelled"
        assert await kernel.send("genesis_obj", "square", 4) == 16


async def test_a_full_queue_is_a_typed_error_and_control_goes_on(start_kernel: Start, tmp_path: Path) -> None:
    settings = scripted(tmp_path, [STALLS], QUEUE_LIMIT="2", WORKER_COUNT="1")
    process = start_kernel(settings)
    async with process.client() as kernel:
        for n in range(3):
            await kernel.teach("genesis_obj", f"slow_{n}", ["x"], wait=False)
            await until(lambda n=n: len(thoughts(process, "commit")) > n)
        with pytest.raises(errors.QueueFull):
            await kernel.teach("genesis_obj", "slow_3", ["x"], wait=False)
        assert (await kernel.request("status"))["queue"]["missions"]["waiting"] == 2
        assert len(await kernel.request("missions")) == 3


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_mission_survives_the_end_of_its_kernel(
    start_kernel: Start, tmp_path: Path, end: str
) -> None:
    lines = [STALLS, *writes("slow_square", SQUARE.replace("square", "slow_square"))]
    process = start_kernel(scripted(tmp_path, lines))
    async with process.client() as kernel:
        begun = await kernel.teach(
            "genesis_obj", "slow_square", ["x"], examples=[{"args": [3], "returns": 9}], wait=False
        )
    await until(lambda: len(thoughts(process, "prompt")) == 2)
    await asyncio.to_thread(getattr(process, end))
    scripted(tmp_path, lines[1:])  # the same file: this time the model answers
    process.start()
    async with process.client() as kernel:
        assert "taken up from the journal: 1" in process.log
        assert await kernel.send("genesis_obj", "slow_square", 5) == 25
        record = await kernel.request("mission", mission_id=begun["mission_id"])
        assert (record["state"], record["starts"]) == ("complete", 2)


async def test_events_tell_of_a_cycle(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("square", SQUARE)))
    async with process.client() as kernel:
        heard: list[dict[str, Any]] = []

        async def listen() -> None:
            async for event in kernel.events("transition", "token"):
                heard.append(event)

        listener = asyncio.create_task(listen())
        while not heard:  # a subscription takes effect a moment after it is made
            with contextlib.suppress(errors.MissionFailed):
                await kernel.teach("genesis_obj", "square", ["x"], "Square x.")
        await until(lambda: any(event.get("state") == "COMPLETE" for event in heard))
        assert any(event["event"] == "token" for event in heard)
        listener.cancel()


def test_the_heavy_libraries_are_not_loaded_before_the_kernel_is_live(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys, batos\n"
        "from config import Settings\n"
        "async def main():\n"
        "    closing = []\n"
        "    await batos.Kernel(Settings())._start(closing)\n"
        "    heavy = {'torch', 'transformers', 'llama_cpp', 'sentence_transformers'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
        "    for close in reversed(closing):\n"
        "        closed = close()\n"
        "        if closed is not None: await closed\n"
        "asyncio.run(main())\n"
    )
    kernel = KernelProcess(tmp_path / "home")
    for _ in range(2):  # a new image, then an existing one
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=kernel.environment,
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=True,
        )
        *_, live, modules = done.stdout.splitlines()
        assert live == "[UVM] System is live. Awaiting Architect's command..."
        assert modules == "[]"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"HAND_COUNT": "none"}, "BATOS_HAND_COUNT"),
        ({"PERSONA_MODELS": '{"ALFRED": "no-such-model"}'}, "no-such-model"),
        ({"ZMQ_ENDPOINT": "tcp://192.0.2.1:5555"}, "can't listen"),
    ],
)
def test_a_kernel_that_can_not_start_says_why_in_one_line(
    tmp_path: Path, settings: dict[str, str], reason: str
) -> None:
    kernel = KernelProcess(tmp_path / "home", settings)
    with pytest.raises(RuntimeError, match=reason):
        kernel.start()
    assert kernel.process is not None
    assert kernel.process.returncode == 2
    assert [line for line in kernel.log.splitlines() if "can't start" in line] == kernel.log.splitlines()[-1:]


async def test_two_kernels_do_not_share_an_image(start_kernel: Start, tmp_path: Path) -> None:
    settings = scripted(tmp_path, [])
    start_kernel(settings)
    with pytest.raises(RuntimeError, match=r"another kernel has .* open"):
        start_kernel(settings)
