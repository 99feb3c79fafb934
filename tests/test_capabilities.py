"""Capabilities, end to end: real kernels, real folders, methods that the personas recite."""

import asyncio
import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.kernels import PROJECT, KernelProcess
from tests.conftest import Start, scripted, writes
from uvm import errors
from uvm.client import Kernel

pytestmark = pytest.mark.slow

REPORT = (
    "def report(self):\n"
    "    lines = self.files.read_text('notes.txt').splitlines()\n"
    "    self.files.write_text('report.txt', str(len(lines)))\n"
    "    self.counted = len(lines)\n"
    "    self._p_changed = True\n"
    "    return len(lines)"
)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "notes.txt").write_text("one\ntwo\nthree\n")
    return folder


def thoughts(process: KernelProcess, event: str) -> list[dict[str, Any]]:
    lines = (process.home / "metacognition.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def grant_files(
    kernel: Kernel, folder: Path, target: str = "genesis_obj", *, write: bool = True
) -> Any:
    options = {"path": str(folder), "write": write}
    return await kernel.request("grant", target_oid=target, kind="files", options=options)


async def learn(kernel: Kernel, selector: str, *parameters: str) -> None:
    """Has a method written whose first trial is not a call."""
    await kernel.teach("genesis_obj", selector, list(parameters), f"Do {selector}.")


async def test_a_granted_folder_is_read_and_written(start_kernel: Start, tmp_path: Path, notes: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("report", REPORT), MAX_SYNTHESIS_ATTEMPTS="1"))
    async with process.client() as kernel:
        with pytest.raises(errors.MissionFailed, match=r"no grant 'files'.*/grant genesis_obj files PATH"):
            await kernel.send("genesis_obj", "report")
        granted = await grant_files(kernel, notes)
        assert (granted["object"], granted["slot"], granted["options"]["path"]) == (
            "genesis_obj",
            "files",
            str(notes),
        )
        assert await kernel.send("genesis_obj", "report") == 3
        assert ((notes / "report.txt").read_text(), names(notes)) == ("3", ["notes.txt", "report.txt"])
        await kernel.request("create_object", name="child_obj", parents=["genesis_obj"])
    assert process.stop() == 0
    process.start()
    (notes / "notes.txt").write_text("one\n")
    async with process.client() as kernel:
        assert await kernel.send("child_obj", "report") == 1  # what its parent holds
        assert (notes / "report.txt").read_text() == "1"
        [inherited] = await kernel.request("grants", target_oid="child_obj")
        assert (inherited["object"], inherited["kind"]) == ("genesis_obj", "files")
        (notes / "report.txt").unlink()
        await kernel.request("revoke", target_oid="genesis_obj", slot="files")
        before = len(await kernel.request("missions"))
        for target in ("genesis_obj", "child_obj"):
            with pytest.raises(errors.GrantMissing, match=f"/grant {target} files PATH") as missing:
                await kernel.send(target, "report")
            assert missing.value.details["grant"] == "files"
        assert names(notes) == ["notes.txt"]
        assert len(await kernel.request("missions")) == before  # no mission for a missing method
    uses = [(one["verb"], one["what"], one["outcome"]) for one in thoughts(process, "capability")]
    assert ("write_text", "report.txt", "ok") in uses


async def test_trials_write_nothing_and_a_call_that_fails_neither(
    start_kernel: Start, tmp_path: Path, notes: Path
) -> None:
    fails = (
        "def fails(self, wrong):\n"
        "    self.files.write_text('report.txt', 'half')\n"
        "    self.files.delete('notes.txt')\n"
        "    return 1 // wrong"
    )
    process = start_kernel(scripted(tmp_path, writes("fails", fails)))
    async with process.client() as kernel:
        await grant_files(kernel, notes)
        await kernel.teach("genesis_obj", "fails", ["wrong"], examples=[{"args": [1], "returns": 1}])
        assert names(notes) == ["notes.txt"]
        with pytest.raises(errors.MethodRaised, match="ZeroDivisionError"):
            await kernel.send("genesis_obj", "fails", 0)
        assert names(notes) == ["notes.txt"]
        assert await kernel.send("genesis_obj", "fails", 1) == 1
        assert names(notes) == ["report.txt"]
        await kernel.request("revoke", target_oid="genesis_obj", slot="files")
        await grant_files(kernel, notes, write=False)
        with pytest.raises(errors.MethodRaised, match="PermissionError"):
            await kernel.send("genesis_obj", "fails", 1)


async def test_a_method_can_catch_what_is_refused(start_kernel: Start, tmp_path: Path, notes: Path) -> None:
    tries = (
        "def tries(self, path):\n"
        "    if not hasattr(self, 'files'):\n"
        "        return 'no files'\n"
        "    try:\n"
        "        return self.files.read_text(path)\n"
        "    except FileNotFoundError as error:\n"
        "        return 'missing'\n"
        "    except PermissionError as error:\n"
        "        return str(error)"
    )
    odd = "def odd(self):\n    return self.files.chmod('notes.txt', 7)"
    hand_over = "def hand_over(self):\n    return self.files"
    keep = "def keep(self):\n    self.files = 3\n    self._p_changed = True"
    lines = [
        line for source in (tries, odd, hand_over, keep) for line in writes(source[4:].split("(")[0], source)
    ]
    process = start_kernel(scripted(tmp_path, lines, MAX_SYNTHESIS_ATTEMPTS="1"))
    (tmp_path / "secret").write_text("secret")
    (notes / "link").symlink_to(tmp_path / "secret")
    async with process.client() as kernel:
        assert await kernel.send("genesis_obj", "tries", "notes.txt") == "no files"
        await learn(kernel, "keep")
        await grant_files(kernel, notes)
        assert await kernel.send("genesis_obj", "tries", "notes.txt") == "one\ntwo\nthree\n"
        assert await kernel.send("genesis_obj", "tries", "none") == "missing"
        for path, reason in (
            ("../secret", "without"),
            (str(tmp_path), "relative"),
            ("link", "no plain file"),
        ):
            assert reason in await kernel.send("genesis_obj", "tries", path)
        with pytest.raises(errors.MethodRaised, match="IsADirectoryError"):
            await kernel.send("genesis_obj", "tries", ".")
        with pytest.raises(errors.MissionFailed, match=r"'chmod'; it offers self.files.read_text\(path\)"):
            await kernel.send("genesis_obj", "odd")
        with pytest.raises(errors.MissionFailed, match="Facade is not plain data"):
            await kernel.send("genesis_obj", "hand_over")
        with pytest.raises(errors.MethodRaised, match="'files' is a grant of genesis_obj"):
            await kernel.send("genesis_obj", "keep")


async def test_a_grant_is_no_data(start_kernel: Start, tmp_path: Path, notes: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("files", "def files(self):\n    return 1")))
    async with process.client() as kernel:
        await kernel.request("set_slot", target_oid="genesis_obj", slot="clock", value="a data slot")
        with pytest.raises(errors.SlotProtected):
            await kernel.request("grant", target_oid="genesis_obj", kind="clock")
        assert await kernel.send("genesis_obj", "clock") == "a data slot"
        with pytest.raises(errors.GrantMissing, match="/grant genesis_obj files PATH"):
            await kernel.send("genesis_obj", "files")
        await grant_files(kernel, notes)
        for field in ({"value": 1}, {}):
            command = "set_slot" if field else "delete_slot"
            with pytest.raises(errors.SlotProtected):
                await kernel.request(command, target_oid="genesis_obj", slot="files", **field)
        with pytest.raises(errors.SlotProtected):
            await kernel.request("create_object", name="a_obj", parents=["genesis_obj"], slots={"files": 1})
        with pytest.raises(errors.InvalidField):
            await kernel.send("genesis_obj", "files")
        with pytest.raises(errors.MissionFailed, match="is a grant"):
            await learn(kernel, "files")
        told = await kernel.request("inspect", target_oid="genesis_obj")
        assert told["slots"] == {"clock": "a data slot"}
        assert told["grants"]["files"]["options"]["path"] == str(notes)
        assert "files" not in told["understands"]


async def test_granting_can_be_undone_and_refuses_what_is_our_own(
    start_kernel: Start, tmp_path: Path, notes: Path
) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        for path in (process.home, process.home / "keys", process.home.parent, PROJECT / "uvm", PROJECT):
            with pytest.raises(errors.InvalidField, match="can't be granted"):
                await grant_files(kernel, path)
        await grant_files(kernel, notes)
        note = "grant genesis_obj files files"
        [transaction] = [one["transaction_id"] for one in thoughts(process, "commit") if one["note"] == note]
        await kernel.request("undo", transaction_id=transaction)
        assert await kernel.request("grants") == []
        with pytest.raises(errors.SlotNotFound):
            await kernel.request("revoke", target_oid="genesis_obj", slot="files")


async def test_an_image_named_by_a_uri_can_not_be_granted(start_kernel: Start, tmp_path: Path) -> None:
    image, blobs = tmp_path / "elsewhere", tmp_path / "blobs"
    for folder in (image, blobs):
        folder.mkdir()
    place = f"file://{image}/image.fs?blobstorage_dir={blobs}"
    process = start_kernel(scripted(tmp_path, [], DB_FILE=place))
    async with process.client() as kernel:
        assert (image / "image.fs").exists()
        for path in (image, blobs):
            with pytest.raises(errors.InvalidField, match="can't be granted"):
                await grant_files(kernel, path)
        assert await kernel.request("grants") == []


async def test_clock_memory_and_persona(start_kernel: Start, tmp_path: Path) -> None:
    sources = {
        "moment": "def moment(self):\n    return [self.clock.now(), self.clock.today()]",
        "find": "def find(self, query):\n    return [hit['text'] for hit in self.recall(query, k=1)]",
        "wonder": "def wonder(self, what):\n    return self.ask('How is ' + what + '?', max_tokens=9)",
        "nobody": "def nobody(self):\n    return self.ask('Who?', persona='NOBODY')",
    }
    lines = [line for name, source in sources.items() for line in writes(name, source)]
    lines += [{"pattern": "How is the weather", "reply": "Sunny."}]
    process = start_kernel(scripted(tmp_path, lines, MAX_SYNTHESIS_ATTEMPTS="1"))
    async with process.client() as kernel:
        for kind in ("clock", "recall", "ask"):
            await kernel.request("grant", target_oid="genesis_obj", kind=kind)
        await kernel.request("remember", text="Bees like lavender.")
        now, today = await kernel.send("genesis_obj", "moment")
        assert (now.tzinfo, type(today)) == (dt.UTC, dt.date)
        assert await kernel.send("genesis_obj", "find", "lavender bees") == ["Bees like lavender."]
        assert await kernel.send("genesis_obj", "wonder", "the weather") == "Sunny."
        with pytest.raises(errors.MissionFailed, match="ValueError"):
            await kernel.send("genesis_obj", "nobody")


async def test_waiting_for_the_world_is_not_the_hands_time(start_kernel: Start, tmp_path: Path) -> None:
    fetch = "def fetch(self, url):\n    return self.http.get(url)['text']"
    process = start_kernel(scripted(tmp_path, writes("fetch", fetch), HAND_TIMEOUT_S="1.5"))

    async def slow(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2)  # longer than a hand may take
        out.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")
        out.close()

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, process.client() as kernel:
        options = {"hosts": [place]}
        await kernel.request("grant", target_oid="genesis_obj", kind="http", options=options)
        assert await kernel.send("genesis_obj", "fetch", f"http://{place}/") == "slow"


async def test_revoking_does_not_wait_for_the_calls_that_it_stops(
    start_kernel: Start, tmp_path: Path
) -> None:
    fetch = "def fetch(self, url):\n    self.http.get(url)\n    return self.http.get(url)['text']"
    process = start_kernel(
        scripted(tmp_path, writes("fetch", fetch), HAND_COUNT="2", MAX_SYNTHESIS_ATTEMPTS="1")
    )
    hung = 0
    both, go = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        nonlocal hung
        if b"/hang" in await reader.readuntil(b"\r\n\r\n"):
            hung += 1
            (both.set if hung == 2 else both.clear)()
            await go.wait()
        out.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")
        out.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, process.client() as kernel:
        options = {"hosts": [place], "timeout_s": 60}
        await kernel.request("grant", target_oid="genesis_obj", kind="http", options=options)
        assert await kernel.send("genesis_obj", "fetch", f"http://{place}/") == "done"
        hanging = (kernel.send("genesis_obj", "fetch", f"http://{place}/hang") for _ in range(2))
        calls = [asyncio.create_task(call) for call in hanging]
        async with asyncio.timeout(20):
            await both.wait()
            assert (await kernel.request("status"))["queue"]["messages"]["running"] == 2
            assert len(await kernel.request("grants")) == 1
            await kernel.request("revoke", target_oid="genesis_obj", slot="http")
            assert await kernel.request("grants") == []
            go.set()
            for call in calls:
                with pytest.raises(errors.MethodRaised, match="revoked"):
                    await call
    assert hung == 2  # neither came to its second use


async def test_the_writing_model_knows_the_grants(start_kernel: Start, tmp_path: Path, notes: Path) -> None:
    process = start_kernel(scripted(tmp_path, writes("square", "def square(self, x):\n    return x * x")))
    async with process.client() as kernel:
        await grant_files(kernel, notes, write=False)
        await kernel.request("create_object", name="child_obj", parents=["genesis_obj"])
        await kernel.send("child_obj", "square", 2)
    asked = thoughts(process, "prompt")[-1]["messages"][0]["content"]
    assert "It may use self.files, the files of one folder" in asked
    assert "self.files.read_text(path)" in asked
    assert "write_text" not in asked
    assert str(notes) not in asked


def test_the_terminal_grants_lists_and_revokes(start_kernel: Start, tmp_path: Path, notes: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))

    def say(text: str) -> str:
        told = subprocess.run(
            [sys.executable, str(PROJECT / "chat_client.py"), "-c", text],
            env=process.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return told.stdout + told.stderr

    shown = f"genesis_obj.inbox  files  path {notes}, write True, max_bytes 1048576\n"
    assert say("/grant genesis_obj.inbox files notes write") == shown
    assert say("/grants genesis_obj") == say("/grants") == shown
    assert "inbox: may use files" in say("/inspect genesis_obj")
    assert say("/revoke genesis_obj.inbox") == ""
    assert say("/grants") == ""
    assert "say /grant OBJECT" in say("/grant genesis_obj rockets")
    assert "/grant OBJECT[.SLOT] KIND" in say("/help")
