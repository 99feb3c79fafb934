"""Plain objects in place of an image for hands to work on, and a look at the processes around them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uvm.hands.calls import Call, ObjectView, Outcome
from uvm.hands.pool import HandPool

HANG = """def hang(self):
    import random
    self.clone(f"pid{random._os.getpid()}")
    while True:
        pass"""


class Garden:
    """Objects that hands work on.

    Attributes:
        asked: oids that hands asked for, in order.
        found: names that hands asked for, in order.
    """

    def __init__(self, pool: HandPool) -> None:
        self.pool = pool
        self.views: dict[str, ObjectView] = {}
        self.asked: list[str] = []
        self.found: list[str] = []

    def plant(self, name: str | None, *sources: str, parents: tuple[str, ...] = (), **slots: Any) -> str:
        """Adds an object whose methods are `sources`; returns its oid, of which the first is 1."""
        methods = {selector(source): source for source in sources}
        oid = f"{len(self.views) + 1:016x}"
        self.views[oid] = ObjectView(oid, name, parents, slots, methods)
        return oid

    def view(self, oid: str) -> ObjectView | None:
        self.asked.append(oid)
        return self.views.get(oid)

    def taken(self, name: str) -> bool:
        self.found.append(name)
        return any(view.name == name for view in self.views.values())

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        raise AssertionError("no plant has a grant")

    async def send(self, target: str, selector: str, *args: Any, **kwargs: Any) -> Outcome:
        """Sends a message."""
        return await self.pool.run(Call(target, selector, list(args), kwargs), self)

    async def do(self, source: str, *args: Any, **slots: Any) -> Outcome:
        """Calls the one method of a new object called `it`."""
        return await self.send(self.plant("it", source, **slots), selector(source), *args)

    async def hang(self) -> tuple[asyncio.Task[Outcome], int, int]:
        """Returns a call that never ends by itself, the pid of its worker and that of the zygote."""
        task = asyncio.create_task(self.do(HANG))
        await until(lambda: bool(self.found), "the method runs")
        worker, zygote = int(self.found.pop().removeprefix("pid")), self.pool.zygote_pid
        assert worker > 1
        assert zygote is not None
        return task, worker, zygote


def selector(source: str) -> str:
    """Returns the name of the function that `source` defines."""
    found = re.search(r"def (\w+)", source)
    assert found
    return found[1]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition, 20 s at most."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    """Returns whether a process has ended, though its parent may not have taken notice."""
    found = _stat(pid)
    return found is None or found[0] in "ZX"


def children(parent: int) -> set[int]:
    """Returns the pids of the living children of a process."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {pid for pid in pids if (found := _stat(pid)) and found[1] == parent and not gone(pid)}


def zombies(parent: int) -> set[int]:
    """Returns the pids of ended children that their parent has not taken notice of."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {pid for pid in pids if (found := _stat(pid)) and found == ("Z", parent)}


def state_of(pid: int) -> str:
    """Returns the letter of a process's state, such as R while it runs; empty where there is none."""
    return (_stat(pid) or ("", 0))[0]


def _stat(pid: int) -> tuple[str, int] | None:
    """Returns state letter and parent of a process, or None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1])
