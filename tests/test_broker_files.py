"""Granted folders: what a method may do there, what leads out of them, how writes join the transaction."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from evals.kernels import PROJECT
from tests.broker import HOLDER, Call, Refused, World
from uvm import messenger
from uvm.awakening import CATALOG
from uvm.broker import broker, files, folder
from uvm.errors import (
    FilesNotWritten,
    HandDied,
    InvalidField,
    MalformedMessage,
    ShuttingDown,
    SlotNotFound,
)
from uvm.grant_options import FilesOptions
from uvm.hands.calls import Outcome, SlotChanges
from uvm.image.txn import Txn
from uvm.undoing import Undoing


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start()
    before = descriptors()
    yield world
    assert descriptors() == before  # whatever a test did, nothing stays open
    await world.close()


def descriptors() -> list[str]:
    """What is open of the file system, apart from the image's own."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(name for name in found if "/granted" in name or "/outside" in name)


async def refusal(call: Call, verb: str, *args: Any) -> str:
    with pytest.raises(Refused) as refused:
        await call.files(verb, *args)
    return refused.value.kind


# Verbs


async def test_a_call_sees_what_it_wrote_and_the_disk_only_what_was_committed(world: World) -> None:
    await world.grant_files()
    (world.folder / "old.txt").write_text("old\n")
    (world.folder / "sub").mkdir()
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        await call.files("write_text", "new.txt", "grüß\r\n")
        await call.files("append_text", "new.txt", "more")
        await call.files("append_text", "old.txt", "new\n")
        await call.files("write_bytes", "sub/raw", b"\x00\xff")
        assert await call.files("read_text", "new.txt") == "grüß\r\nmore"
        assert await call.files("read_text", "./old.txt") == "old\nnew\n"
        assert await call.files("read_bytes", "sub//raw") == b"\x00\xff"
        assert await call.files("list") == ["new.txt", "old.txt", "sub/"]
        assert await call.files("list", "sub") == ["raw"]
        assert [await call.files("exists", name) for name in ("new.txt", "sub", "none")] == [
            True,
            True,
            False,
        ]
        assert await call.files("size", "sub/raw") == 2
        await call.files("delete", "old.txt")
        assert await call.files("exists", "old.txt") is False
        assert await refusal(call, "read_text", "old.txt") == "FileNotFoundError"
        assert await refusal(call, "delete", "old.txt") == "FileNotFoundError"
        assert await refusal(call, "read_text", "sub/raw") == "ValueError"  # no text
        assert world.names() == ["old.txt", "sub"]
        call.uses.keep()
        second = world.call(txn)  # a later call of the same transaction
        assert await second.files("read_text", "new.txt") == "grüß\r\nmore"
        assert await second.files("list") == ["new.txt", "sub/"]
        assert world.names() == ["old.txt", "sub"]
    assert world.names() == ["new.txt", "sub"]
    assert (world.folder / "new.txt").read_bytes() == "grüß\r\nmore".encode()
    assert (world.folder / "sub" / "raw").read_bytes() == b"\x00\xff"


async def test_reading_grants_do_not_write(world: World) -> None:
    await world.grant_files(write=False)
    (world.folder / "a").write_text("a")
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        assert await call.files("read_text", "a") == "a"
        for verb, *args in (("write_text", "b", ""), ("append_text", "a", ""), ("delete", "a")):
            assert await refusal(call, verb, *args) == "PermissionError"
        call.uses.keep()
    assert world.text("a") == "a"


async def test_a_look_at_an_earlier_image_can_read_but_not_write(world: World) -> None:
    await world.grant_files()
    (world.folder / "a").write_text("a")
    async with world.image.reading(world.image.last_transaction()) as txn:
        call = world.call(txn)
        assert await call.files("read_text", "a") == "a"
        assert await refusal(call, "write_text", "a", "b") == "PermissionError"


async def test_a_replaced_file_keeps_its_rights(world: World) -> None:
    await world.grant_files()
    file = world.folder / "a"
    file.write_text("a")
    file.chmod(0o640)
    await world.once("files", "write_text", "a", "b")
    assert (file.stat().st_mode & 0o777, world.text("a")) == (0o640, "b")


async def test_sizes_and_numbers_are_limited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.grant_files(max_bytes=10)
    (world.folder / "large").write_text("x" * 11)
    monkeypatch.setattr("uvm.broker.files.MAX_STAGED_FILES", 2)
    monkeypatch.setattr("uvm.broker.files.MAX_STAGED_BYTES", 15)
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        assert await refusal(call, "read_text", "large") == "ValueError"
        assert await call.files("size", "large") == 11
        await call.files("write_text", "a", "x" * 10)
        assert await refusal(call, "append_text", "a", "x") == "ValueError"
        assert await call.files("read_text", "a") == "x" * 10
        assert await refusal(call, "write_text", "b", "x" * 6) == "ValueError"
        await call.files("write_text", "b", "x" * 5)
        assert await refusal(call, "write_text", "b", "x" * 6) == "ValueError"
        assert await call.files("read_text", "b") == "x" * 5  # what was staged stays
        assert await refusal(call, "write_text", "c", "") == "ValueError"
        monkeypatch.setitem(broker.MAX_USES, "files", 11)
        assert await call.files("exists", "a") is True
        for _ in range(broker.MAX_REFUSED):
            assert await refusal(call, "exists", "a") == "RuntimeError"
        with pytest.raises(HandDied, match="goes on"):
            await call.files("exists", "a")
        call.uses.keep()
    assert (world.names(), world.text("b")) == (["a", "b", "large"], "x" * 5)


@pytest.mark.parametrize(
    ("verb", "args", "kwargs"),
    [
        ("read_text", [], {}),
        ("read_text", ["a", "b"], {}),
        ("read_text", [1], {}),
        ("read_text", [b"a"], {}),
        ("write_text", ["a", b"b"], {}),
        ("write_bytes", ["a", "b"], {}),
        ("read_text", ["a"], {"path": "a"}),
        ("read_text", ["a"], {"encoding": "latin-1"}),
    ],
)
async def test_wrong_arguments_are_type_errors(
    world: World, verb: str, args: list[Any], kwargs: dict[str, Any]
) -> None:
    await world.grant_files()
    async with world.image.transaction("t") as txn:
        with pytest.raises(Refused, match="TypeError"):
            await world.call(txn).use("files", verb, *args, **kwargs)


async def test_what_an_honest_hand_does_not_ask_ends_the_call(world: World) -> None:
    await world.grant_files()
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        for slot, verb in (
            ("files", "chmod"),
            ("files", "__class__"),
            ("http", "get"),
            ("name", "read_text"),
        ):
            with pytest.raises(MalformedMessage):
                await call.use(slot, verb, "a")


# The way out


OUT = [
    "../outside/secret",
    "/etc/passwd",
    "sub/../../outside/secret",
    "sub/..",
    "..",
    "link",
    "inner",
    "dirlink/secret",
    "dirlink/other",
    "dirlink/new",
    "../outside/other",
]
ODD = [
    "a\x00b",
    "a\nb",
    "a\\b",
    ".batos-a",
    "sub/.batos-a",
    "x" * 256,
    "x/" * 40 + "x",
    "./" * 600 + "file",
    "\ud800",
    "é" * 200,
]
SPECIAL = ["fifo", "socket", "twice", "link/x", "fifo/x"]


@pytest.fixture
async def trapped(world: World) -> World:
    """A folder with every way out that a file system offers."""
    await world.grant_files()
    outside = world.home / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")  # has a second name, in the folder
    (outside / "other").write_text("other")
    (world.folder / "sub").mkdir()
    (world.folder / "file").write_text("file")
    (world.folder / "link").symlink_to(outside / "secret")
    (world.folder / "inner").symlink_to("file")
    (world.folder / "dirlink").symlink_to(outside)
    os.mkfifo(world.folder / "fifo")
    os.link(outside / "secret", world.folder / "twice")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(world.folder)  # a socket's path is short
        server.bind("socket")
        os.chdir(here)
    return world


@pytest.mark.parametrize("path", [*OUT, *ODD, *SPECIAL])
async def test_no_path_leads_out(trapped: World, path: str) -> None:
    async with trapped.image.transaction("t") as txn:
        call = trapped.call(txn)
        for verb, *args in (
            ("read_text", path),
            ("read_bytes", path),
            ("write_text", path, "x"),
            ("append_text", path, "x"),
            ("delete", path),
            ("size", path),
        ):
            assert await refusal(call, verb, *args) in ("PermissionError", "FileNotFoundError")
        with contextlib.suppress(Refused):
            assert await call.files("exists", path) is False
        call.uses.keep()
    assert (trapped.home / "outside" / "secret").read_text() == "secret"
    assert sorted(os.listdir(trapped.home / "outside")) == ["other", "secret"]
    assert (trapped.home / "outside" / "other").read_text() == "other"


async def test_only_plain_files_and_folders_are_listed(trapped: World) -> None:
    assert await trapped.once("files", "list") == ["file", "sub/"]


@pytest.mark.parametrize("path", ["", ".", "./", "sub"])
async def test_a_folder_is_no_file(trapped: World, path: str) -> None:
    async with trapped.image.transaction("t") as txn:
        for verb, *args in (("read_text", path), ("write_text", path, "x"), ("append_text", path, "x")):
            assert await refusal(trapped.call(txn), verb, *args) == "IsADirectoryError"


async def test_a_folder_swapped_for_a_link_leads_nowhere(world: World) -> None:
    await world.grant_files()
    outside = world.home / "outside"
    for place, content in ((outside, "secret"), (world.folder / "sub", "mine")):
        place.mkdir()
        (place / "x").write_text(content)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.rename(world.folder / "sub", world.home / "aside")
            os.symlink(outside, world.folder / "sub")
            os.unlink(world.folder / "sub")
            os.rename(world.home / "aside", world.folder / "sub")

    thread = threading.Thread(target=swap)
    thread.start()
    seen: set[str] = set()
    try:
        for number in range(150):
            with contextlib.suppress(Refused):
                seen.add(await world.once("files", "read_text", "sub/x"))
            with contextlib.suppress(Refused, FilesNotWritten):
                await world.once("files", "write_text", "sub/y", str(number))
    finally:
        stop.set()
        thread.join()
    assert seen <= {"mine"}
    assert sorted(os.listdir(outside)) == ["x"]
    assert world.names() == ["sub"]


async def test_a_granted_folder_that_became_a_link_is_refused(world: World) -> None:
    await world.grant_files()
    (world.folder / "a").write_text("a")
    os.rename(world.folder, world.home / "moved")
    os.symlink(world.home / "moved", world.folder)
    async with world.image.transaction("t") as txn:
        for verb, *args in (("read_text", "a"), ("write_text", "a", "b"), ("list",)):
            assert await refusal(world.call(txn), verb, *args) == "FileNotFoundError"


async def test_a_link_in_the_path_of_a_grant_is_resolved_when_it_is_granted(world: World) -> None:
    (world.home / "door").symlink_to(world.folder)
    await world.grant_files(path=world.home / "door")
    [told] = await world.granting.listed(HOLDER)
    assert told["options"]["path"] == str(world.folder)
    await world.once("files", "write_text", "a", "a")
    assert world.text("a") == "a"


async def test_what_is_not_the_architects_to_grant(world: World) -> None:
    (world.folder / "file").write_text("")
    (world.home / "bat" / "sub").mkdir()
    (world.folder / "way").symlink_to(world.home / "bat")
    refused = [
        "/",
        "/proc",
        "/proc/self",
        "/sys",
        "/dev",
        world.home,
        world.home / "bat",
        world.home / "bat/sub",
    ]
    for path in [*refused, world.folder / "way", world.folder / "file", world.folder / "none"]:
        with pytest.raises(InvalidField, match=r"can't be granted|is no folder"):
            await world.granting.grant(HOLDER, "files", FilesOptions(kind="files", path=str(path)))
    assert await world.granting.listed(None) == []


# The transaction


async def test_what_is_aborted_doomed_or_not_kept_leaves_nothing(world: World) -> None:
    await world.grant_files()

    async def fail(txn: Txn) -> None:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await world.image.attempt("t", fail)
    async with world.image.transaction("t") as txn:
        txn.doom()
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
    async with world.image.transaction("t") as txn:  # as a trial does
        await world.call(txn).files("write_text", "a", "a")
        assert await world.call(txn).files("exists", "a") is False
    assert world.names() == []


async def test_a_file_that_can_not_be_written_takes_the_image_with_it(world: World) -> None:
    await world.grant_files()
    (world.folder / "sub").mkdir()

    async def unit(txn: Txn) -> None:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        await call.files("write_text", "sub/b", "b")
        call.uses.keep()
        txn.find(HOLDER).count = 1
        (world.folder / "sub").rmdir()

    with pytest.raises(FilesNotWritten, match="sub/b was not written"):
        await world.image.attempt("t", unit)
    assert world.names() == []
    async with world.image.reading() as txn:
        assert "count" not in txn.find(HOLDER).data()


async def test_the_image_and_the_files_commit_together(world: World) -> None:
    await world.grant_files()
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
        txn.find(HOLDER).count = 1
    assert len(txn.tid) == 16
    assert world.text("a") == "a"
    async with world.image.transaction("files alone") as txn:
        call = world.call(txn)
        await call.files("delete", "a")
        call.uses.keep()
    assert (txn.tid, world.names()) == ("", [])


async def test_a_conflict_in_the_image_leaves_one_write(world: World) -> None:
    await world.grant_files()
    runs = 0

    async def unit(txn: Txn) -> None:
        nonlocal runs
        runs += 1
        found = txn.find(HOLDER)
        found.count = found.data().get("count", 0) + 1
        call = world.call(txn)
        await call.files("write_text", f"run{runs}", "x")
        call.uses.keep()
        if runs == 1:
            async with world.image.transaction("the other") as other:
                other.find(HOLDER).count = 10

    await world.image.attempt("t", unit)
    assert (runs, world.names()) == (2, ["run2"])


async def test_appends_at_the_same_time_are_all_there(world: World) -> None:
    await world.grant_files()
    await asyncio.gather(*(world.once("files", "append_text", "log", f"{n}\n") for n in range(4)))
    assert sorted(world.text("log").split()) == ["0", "1", "2", "3"]


async def test_a_file_that_somebody_else_changed_is_read_again(world: World) -> None:
    await world.grant_files()
    (world.folder / "a").write_text("1")
    runs = 0

    async def unit(txn: Txn) -> None:
        nonlocal runs
        runs += 1
        call = world.call(txn)
        number = int(await call.files("read_text", "a"))
        await call.files("write_text", "a", str(number + 1))
        call.uses.keep()
        if runs == 1:
            (world.folder / "a").write_text("100")

    await world.image.attempt("t", unit)
    assert (runs, world.text("a")) == (2, "101")


async def test_savepoints_neither_lose_nor_leak_writes(world: World) -> None:
    await world.grant_files()
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
        writes = {world.oid: SlotChanges({"count": 1}, ())}
        seen = {world.oid: txn.edition(txn.find(HOLDER))}
        assert messenger.lost_in_storage(txn, Outcome(None, writes, (), {}, "", 0.0, seen)) == []
        before = txn.savepoint()
        later = world.call(txn)
        await later.files("write_text", "b", "b")
        later.uses.keep()
        before.rollback()
    assert world.names() == ["a"]
    async with world.image.transaction("t") as txn:
        before = txn.savepoint()
        call = world.call(txn)
        await call.files("write_text", "c", "c")
        call.uses.keep()  # joins after the savepoint
        before.rollback()
        again = world.call(txn)
        assert await again.files("exists", "c") is False
        await again.files("write_text", "d", "d")
        again.uses.keep()
    assert world.names() == ["a", "d"]


@pytest.mark.parametrize("broken", ["flock", "fsync"])
async def test_a_disk_that_fails_leaves_no_temporary_file(
    world: World, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    await world.grant_files()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(*((fcntl, "flock", fail) if broken == "flock" else (os, "fsync", fail)))
    with pytest.raises(FilesNotWritten, match="No locks available"):
        await world.once("files", "write_text", "a", "a")
    assert world.names() == []


async def test_an_abort_takes_back_what_it_can_and_closes_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.grant_files()
    (world.folder / "sub").mkdir()
    unlink = os.unlink
    refused: list[str] = []

    def refuse_one(name: Any, **where: Any) -> None:
        if not refused:
            refused.append(name)
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(name, **where)

    async def unit(txn: Txn) -> None:
        call = world.call(txn)
        for name in ("a", "b", "sub/c"):
            await call.files("write_text", name, name)
        call.uses.keep()
        (world.folder / "sub").rmdir()
        monkeypatch.setattr(os, "unlink", refuse_one)

    with pytest.raises(FilesNotWritten, match="sub/c was not written"):
        await world.image.attempt("t", unit)
    assert world.names() == refused  # the other one is gone; the fixture sees to what stays open


async def test_files_that_fail_after_the_image_has_committed_are_told_as_such(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.grant_files()
    granted = len(world.commits)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def unit(txn: Txn) -> None:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
        txn.find(HOLDER).count = 1
        monkeypatch.setattr(os, "rename", fail)

    with pytest.raises(FilesNotWritten, match="the image has committed") as failure:
        await world.image.attempt("half", unit, user="somebody")
    assert failure.value.details == {"committed": True}
    tid = world.image.last_transaction()
    assert world.commits[granted:] == [(tid, "half", "somebody")]
    async with world.image.reading() as now:
        assert now.find(HOLDER).count == 1
    await Undoing(world.image, CATALOG, frozenset()).undo(tid, "somebody")
    async with world.image.reading() as now:
        assert "count" not in now.find(HOLDER).data()


# Revoking, leftovers


async def test_revoking_takes_effect_at_once(world: World) -> None:
    await world.grant_files()
    (world.folder / "a").write_text("a")
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        assert await call.files("read_text", "a") == "a"
        await world.granting.revoke(HOLDER, "files")
        assert await refusal(call, "read_text", "a") == "PermissionError"
    async with world.image.reading(txn.tid or world.image.last_transaction()) as past:
        with pytest.raises(MalformedMessage):
            await world.call(past).files("read_text", "a")
    with pytest.raises(SlotNotFound):
        await world.granting.revoke(HOLDER, "files")


async def test_an_earlier_image_brings_no_power_back(world: World) -> None:
    await world.grant_files()
    (world.folder / "a").write_text("a")
    granted = world.image.last_transaction()
    await world.granting.revoke(HOLDER, "files")
    async with world.image.reading(granted) as past:
        assert await refusal(world.call(past), "read_text", "a") == "PermissionError"


async def test_what_was_staged_before_the_revoking_is_not_written(world: World) -> None:
    await world.grant_files()

    async def unit(txn: Txn) -> None:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
        await world.granting.revoke(HOLDER, "files")

    with pytest.raises(FilesNotWritten, match="revoked"):
        await world.image.attempt("t", unit)
    assert world.names() == []


async def test_a_narrower_grant_counts_at_once(world: World) -> None:
    await world.grant_files()
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        await world.grant_files(write=False)
        assert await refusal(call, "write_text", "a", "a") == "PermissionError"


KILLED = """
import asyncio, os, sys
from ZODB.FileStorage import FileStorage
from pathlib import Path
from tests.broker import World

async def main():
    world = World(Path(sys.argv[1]))
    await world.start()
    await world.grant_files()
    (world.folder / "old").write_text("old")
    (world.folder / "gone").write_text("gone")
    os.rename = lambda *_, **__: os._exit(9)  # the power goes after the image's commit
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        await call.files("write_text", "old", "new")
        await call.files("delete", "gone")
        call.uses.keep()
        txn.find("genesis_obj").count = 1

asyncio.run(main())
"""


async def _cut_short(home: Path, script: str) -> World:
    """Returns the world after a kernel that ran `script` and was gone at once."""
    killed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, str(home)], cwd=PROJECT, check=False
    )
    assert killed.returncode == 9
    world = World(home)
    await world.start()
    return world


def _temporary(world: World) -> list[str]:
    return [name for name in world.names() if name.startswith(folder.TEMPORARY)]


@pytest.mark.slow
async def test_what_was_committed_is_put_in_its_place_after_a_power_cut(tmp_path: Path) -> None:
    world = await _cut_short(tmp_path, KILLED)
    try:
        async with world.image.reading() as txn:
            assert txn.find(HOLDER).count == 1
        assert world.names() == [*_temporary(world), "gone", "old"]
        assert await world.once("files", "list") == ["gone", "old"]  # and does not sweep what is waited for
        told = await world.broker.finish_moves()
        assert [line.partition(" ")[0].rpartition("/")[2] for line in told] == ["a", "gone", "old"]
        assert (world.names(), world.text("a"), world.text("old")) == (["a", "old"], "a", "new")
        assert await world.broker.finish_moves() == []
    finally:
        await world.close()


@pytest.mark.slow
async def test_what_was_not_committed_is_swept_after_a_power_cut(tmp_path: Path) -> None:
    world = await _cut_short(tmp_path, KILLED.replace("os.rename = ", "FileStorage._finish = "))
    try:
        async with world.image.reading() as txn:
            assert "count" not in txn.find(HOLDER).data()
        assert len(_temporary(world)) == 2
        assert await world.broker.finish_moves() == []
        assert await world.once("files", "list") == ["gone", "old"]
        assert (world.names(), world.text("old")) == (["gone", "old"], "old")
    finally:
        await world.close()


@pytest.mark.slow
async def test_what_somebody_changed_after_the_power_cut_is_left_as_it_is(tmp_path: Path) -> None:
    world = await _cut_short(tmp_path, KILLED)
    try:
        (world.folder / "old").write_text("mine")
        (world.folder / "gone").write_text("back again")
        told = await world.broker.finish_moves()
        assert sum("changed by somebody else" in line for line in told) == 2
        await world.once("files", "list")
        assert (world.text("old"), world.text("gone"), world.names()) == (
            "mine",
            "back again",
            ["a", "gone", "old"],
        )
    finally:
        await world.close()


@pytest.mark.slow
async def test_a_folder_that_is_away_is_waited_for(tmp_path: Path) -> None:
    world = await _cut_short(tmp_path, KILLED)
    try:
        world.folder.rename(tmp_path / "away")
        [line, *_] = await world.broker.finish_moves()
        assert "still can't be written: the folder granted is no longer where it was" in line
        (tmp_path / "away").rename(world.folder)
        assert len(await world.broker.finish_moves()) == 3
        assert world.text("a") == "a"
    finally:
        await world.close()


@pytest.mark.slow
async def test_what_is_in_doubt_is_decided_by_the_next_start(tmp_path: Path) -> None:
    """The image fails in its last step, with the transaction whole on the disk."""
    world = World(tmp_path)
    await world.start()
    await world.grant_files()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def unit(txn: Txn) -> None:
        call = world.call(txn)
        await call.files("write_text", "a", "a")
        call.uses.keep()
        txn.find(HOLDER).count = 1

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[FileStorage.__module__], "fsync", fail)
        with pytest.raises(ShuttingDown, match="a look will tell"):
            await world.image.attempt("in doubt", unit)
    await world.close()
    again = World(tmp_path)
    await again.start()
    try:
        async with again.image.reading() as txn:
            assert txn.find(HOLDER).count == 1
        assert len(await again.broker.finish_moves()) == 1
        assert again.text("a") == "a"
    finally:
        await again.close()


async def test_an_entry_of_the_moves_log_that_can_not_be_read_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = world.home / "bat" / "moves"
    moves.mkdir()
    (moves / "00.json").write_text(json.dumps({"token": "00", "since": "0" * 16, "moves": []}))

    def fail(_: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fail)
        [line] = await world.broker.finish_moves()
    assert "can't be read: Too many open files" in line
    assert len(list(moves.iterdir())) == 1


async def test_what_is_no_entry_of_the_moves_log_is_removed(world: World) -> None:
    moves = world.home / "bat" / "moves"
    moves.mkdir()
    entry = {"token": "00", "since": "0" * 16, "moves": []}
    out = {"root": str(world.folder), "parts": [".."], "temporary": None, "target": [0, 0, 0, 0]}
    for name, content in {
        "00.json": {**entry, "moves": [out]},
        "01.json": entry,
        "02.json": [],
        "03.half": {**entry, "token": "03"},
        "04.json": {**entry, "token": "04", "moves": [{**out, "parts": ["a"], "temporary": "a"}]},
    }.items():
        (moves / name).write_text(json.dumps(content))
    (moves / "05.json").write_bytes(b"\xff{")
    assert await world.broker.finish_moves() == []
    assert list(moves.iterdir()) == []


async def test_only_our_own_leftovers_are_swept(world: World) -> None:
    own = [".batos-", ".batos-notes", f".batos-{'0' * 16}.txt", f".batos-{'A' * 16}", f".batos-{'0' * 15}"]
    for name in (*own, f".batos-{'0' * 16}"):
        (world.folder / name).write_text("")
    await world.grant_files()
    await world.once("files", "write_text", "a", "a")
    assert world.names() == sorted([*own, "a"])


# Limits of the whole


async def test_the_time_of_all_uses_is_limited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "MAX_WAIT_S", 0.0)
    await world.grant_files()
    async with world.image.transaction("t") as txn:
        assert await refusal(world.call(txn), "exists", "a") == "TimeoutError"


@pytest.fixture
def stuck(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Folders that don't answer before the event is set."""
    answer, opened = threading.Event(), folder.opened

    def hang(root: str) -> contextlib.AbstractContextManager[int]:
        answer.wait(20)
        return opened(root)

    monkeypatch.setattr(folder, "opened", hang)
    yield answer
    answer.set()
    world.broker._disk._pool.shutdown()  # all have ended


async def test_folders_that_hang_hold_nobody_else_up(
    world: World, monkeypatch: pytest.MonkeyPatch, stuck: threading.Event
) -> None:
    monkeypatch.setattr(broker, "MAX_WAIT_S", 0.3)
    await world.grant_files(write=False)
    async with world.image.transaction("t") as txn, asyncio.timeout(10):
        many = [refusal(world.call(txn), "exists", "a") for _ in range(broker.MAX_THREADS + 8)]
        waiting = asyncio.gather(*many)
        await asyncio.sleep(0)
        async with world.image.transaction("another") as other:
            other.find(HOLDER).count = 1
        assert not waiting.done()
        assert set(await waiting) == {"TimeoutError"}
        assert not stuck.is_set()  # no call waited for the folder


ENDLESS = """
import asyncio, os, threading, time
from uvm.broker.threads import Threads

async def main():
    task = asyncio.create_task(Threads("folders", 1).run(lambda: time.sleep(600)))
    while threading.active_count() == 1:
        await asyncio.sleep(0)

asyncio.run(main())
os._exit(7)  # as the kernel ends
"""


async def test_a_folder_that_hangs_does_not_keep_the_kernel_from_ending() -> None:
    ended = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", ENDLESS], cwd=PROJECT, check=False, timeout=20
    )
    assert ended.returncode == 7


async def test_a_write_that_was_given_up_is_not_staged_later(
    world: World, monkeypatch: pytest.MonkeyPatch, stuck: threading.Event
) -> None:
    monkeypatch.setattr(broker, "MAX_WAIT_S", 0.3)
    ended = threading.Event()
    stage = files.Attempt._stage

    def told(*args: Any) -> None:
        stage(*args)
        ended.set()

    monkeypatch.setattr(files.Attempt, "_stage", told)
    await world.grant_files()
    world.broker._swept.add(str(world.folder))
    async with world.image.transaction("t") as txn:
        call = world.call(txn)
        assert await refusal(call, "write_text", "a", "a") == "TimeoutError"
        call.uses.keep()
        stuck.set()
        assert await asyncio.to_thread(ended.wait, 20)
        call.uses.keep()
        assert await refusal(call, "write_text", "b", "b") == "TimeoutError"
        call.uses.keep()
    assert world.names() == []


async def test_each_use_is_told_without_contents(world: World) -> None:
    await world.grant_files()
    await world.once("files", "write_text", "a", "s3cret")
    with pytest.raises(Refused):
        await world.once("files", "read_text", "none")
    told = [event for event in world.events if event["event"] == "capability"]
    assert [(one["verb"], one["what"], one["outcome"]) for one in told] == [
        ("write_text", "a", "ok"),
        ("read_text", "none", "FileNotFoundError"),
    ]
    assert (told[0]["target"], told[0]["slot"], told[0]["kind"]) == (HOLDER, "files", "files")
    assert "s3cret" not in str(world.events)
