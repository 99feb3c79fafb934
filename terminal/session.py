"""A conversation with a kernel: reads what is typed, sends it, follows its cycles, shows the answer.

Takes a kernel as `uvm.client.Kernel` is one, and a reader that turns text into readings; knows no terminal
but the display that it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from terminal.display import CycleView, Display
from uvm.errors import BatosError, CallerError, KernelUnreachable
from uvm.parser import Context, Reading, parse_exact
from uvm.states import FINAL

TOPICS = ("transition", "token", "finding")
DESTROYING = {"shutdown", "revert_method", "undo", "delete_slot", "cancel_mission"}
PAGE = 1000  # objects asked for at once
FOLLOWED_S = 5.0  # how long a command that may set off a cycle waits for the events
SIGN_OF_LIFE_S = 5.0  # how often, and for how long, a kernel that takes its time is asked whether it lives


class Connection(Protocol):
    """What a session needs of a kernel."""

    async def request(self, command: str, *, timeout_s: float | None = None, **fields: Any) -> Any: ...

    def events(self, *topics: str) -> AsyncIterator[dict[str, Any]]: ...

    async def caught_up(self) -> None: ...


Read = Callable[[str, Context], Awaitable[Reading]]
Confirm = Callable[[str], Awaitable[bool]]


class Doubtful(CallerError):
    """A sentence that was not understood well enough to act on it, with nobody there to ask."""


class Quit(Exception):
    """The user wants to leave."""


class Session:
    """One user's conversation with one kernel.

    Args:
        kernel: an open connection.
        read: turns a text into a reading.
        display: where answers go.
        confirm: asks the user a question; None where nobody can answer.
    """

    def __init__(
        self, kernel: Connection, read: Read, display: Display, confirm: Confirm | None = None
    ) -> None:
        self._kernel = kernel
        self._read = read
        self._display = display
        self._confirm = confirm
        self._cycles = _Cycles(CycleView(display))
        self._deaf = False  # events do not come: commands no longer wait for them
        self._follower: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Session:
        self._follower = asyncio.create_task(self._follow())
        await asyncio.sleep(0)  # it subscribes
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower

    async def say(self, text: str) -> tuple[str, Any]:
        """Does what `text` asks for and returns the command's name and its result, without showing them.

        Raises:
            BatosError: it could not be understood, or the kernel refused or failed.
            Quit: it asks to leave.
            asyncio.CancelledError: the user interrupted; its mission is cancelled.
        """
        command = await self._command(text)
        if command is None:
            return "nothing", None
        name = command["command"]
        if name == "quit":
            raise Quit
        if name == "help":
            return name, None
        return name, await self._send(name, {key: command[key] for key in command if key != "command"})

    def show(self, name: str, result: Any) -> None:
        """Shows what `say` returned."""
        if name == "help":
            self._display.help()
        elif name != "nothing":
            self._display.answer(name, result)

    async def context(self) -> Context:
        """Returns the objects that the kernel has now."""
        rows: list[dict[str, Any]] = []
        while True:
            after = {"after": rows[-1]["name"]} if rows else {}
            page = await self._request("list_objects", {"limit": PAGE, **after})
            rows += page
            if len(page) < PAGE:
                return Context.from_rows(rows)

    async def _command(self, text: str) -> dict[str, Any] | None:
        """Returns the command that `text` means, or None where the user takes it back."""
        exact = parse_exact(text)
        if exact is not None:
            return exact
        reading = await self._read(text, await self.context())
        question = reading.question
        if question is None and not reading.exact and reading.told()["command"] in DESTROYING:
            question = f"Shall I do {spell(reading.told())}?"
        elif question is not None and reading.command is not None:
            question = f"{question} Shall I do {spell(reading.command)}?"
        if question is None:
            return reading.told()
        if self._confirm is None:
            return self._unasked(reading)
        if reading.command is None:
            raise Doubtful(question)
        return reading.command if await self._confirm(question) else None

    @staticmethod
    def _unasked(reading: Reading) -> dict[str, Any]:
        if reading.question is not None:
            understood = f" (understood: {spell(reading.command)})" if reading.command else ""
            raise Doubtful(f"{reading.question}{understood}")
        return reading.told()

    async def _send(self, name: str, fields: dict[str, Any]) -> Any:
        """Sends the command that the user asked for, while its cycles are shown."""
        subject = _subject(name, fields)
        if subject is not None:
            await self._catch_up()
        self._cycles.begin(subject, nested=name == "send_message")
        try:
            return await (self._request if subject is None else self._followed)(name, fields)
        except asyncio.CancelledError:
            if subject is not None:
                await self._cancel_missions(*subject)
            raise
        finally:
            self._cycles.end()

    async def _request(self, name: str, fields: dict[str, Any]) -> Any:
        """Sends a command and waits for its result, as long as the kernel that has it lives."""
        kernel = await self._sign_of_life()
        request = asyncio.ensure_future(self._kernel.request(name, **fields))
        try:
            while not (await asyncio.wait({request}, timeout=SIGN_OF_LIFE_S))[0]:
                if await self._sign_of_life() != kernel:
                    raise KernelUnreachable(
                        "the kernel restarted before it answered; its missions: /missions"
                    )
            return await request
        finally:
            request.cancel()

    async def _sign_of_life(self) -> int:
        """Returns the kernel's process id."""
        return int((await self._kernel.request("ping", timeout_s=SIGN_OF_LIFE_S))["pid"])

    async def _cancel_missions(self, target: str, selector: str) -> None:
        """Cancels the mission that the interrupted request set off: as it was seen, or as the journal has it.

        Missions of other targets or selectors go on: whose they are, nobody can tell.
        """
        try:
            oid = (await self._kernel.request("inspect", target_oid=target, timeout_s=SIGN_OF_LIFE_S))["oid"]
            missions = [mission for mission, about in self._cycles.open.items() if about == oid]
            missions = missions or await self._open_missions(oid, selector)
        except BatosError as error:
            self._display.note(f"a mission that this began goes on ({error}); see /missions")
            return
        for mission_id in missions:
            with contextlib.suppress(BatosError):
                await self._kernel.request("cancel_mission", mission_id=mission_id, timeout_s=SIGN_OF_LIFE_S)

    async def _followed(self, name: str, fields: dict[str, Any]) -> Any:
        """Sends a command; what its cycles did is shown before its result, which may overtake the events."""
        try:
            result = await self._request(name, fields)
        except KernelUnreachable:
            raise
        except BatosError:
            await self._catch_up()
            raise
        await self._catch_up()
        return result

    async def _catch_up(self) -> None:
        """Waits, where cycles are shown, until all events so far have come and further ones will."""
        if self._deaf or not self._display.live:
            return
        try:
            async with asyncio.timeout(FOLLOWED_S):
                await self._kernel.caught_up()
        except TimeoutError:
            self._deaf = True

    async def _open_missions(self, oid: str, selector: str) -> list[str]:
        found = []
        for state in ("queued", "running"):
            fields = {"state": state, "limit": PAGE}
            rows = await self._kernel.request("missions", timeout_s=SIGN_OF_LIFE_S, **fields)
            found += [row for row in rows if (row["target"], row["brief"]["selector"]) == (oid, selector)]
        return [row["mission_id"] for row in found]

    async def _follow(self) -> None:
        try:
            async for event in self._kernel.events(*TOPICS):
                self._deaf = False
                self._cycles.take(event)
        except BatosError as error:  # commands are answered all the same
            self._display.note(f"cycles can't be followed: {error}")


class _Cycles:
    """The cycles that a request set off, as far as the events tell.

    Events carry no sender: while a request is under way, a cycle about its selector counts as its own. A
    method that is sent may miss others, so while it runs, other cycles are shown too, and no more than that.

    Attributes:
        open: missions about the request's selector -> oid of their target.
    """

    def __init__(self, view: CycleView) -> None:
        self._view = view
        self._selector: str | None = None
        self._nested = False
        self._listening = False
        self._shown: set[str] = set()
        self.open: dict[str, str] = {}

    def begin(self, subject: tuple[str, str] | None, *, nested: bool) -> None:
        """A request starts, which may set off a mission about its subject and, if `nested`, others."""
        self._selector = subject[1] if subject is not None else None
        self._nested = nested
        self._listening = subject is not None
        self._shown.clear()
        self.open.clear()

    def end(self) -> None:
        """The request is over."""
        self._listening = False
        self._view.rest()

    def take(self, event: dict[str, Any]) -> None:
        """Takes one event and shows it if it belongs to the request."""
        mission = event.get("mission")
        if not self._listening or not isinstance(mission, str):
            return
        is_transition = event["event"] == "transition"
        is_own = is_transition and event.get("selector") == self._selector
        if is_own:
            self.open[mission] = event["target"]
        if is_own or (is_transition and self._nested):
            self._shown.add(mission)
        if mission in self._shown:
            self._view.show(event)
        if is_transition and event.get("state") in FINAL:
            self._shown.discard(mission)
            self.open.pop(mission, None)


def _subject(name: str, fields: dict[str, Any]) -> tuple[str, str] | None:
    """Returns target and selector of the mission that a command may set off; None where it sets off none."""
    if name == "send_message":
        return fields["target_oid"], fields["selector"]
    if name == "initiate_cognitive_cycle":
        return fields["target_oid"], fields["mission_brief"]["selector"]
    return None


def spell(command: dict[str, Any]) -> str:
    """Returns a command as a person would type it, or close to it."""
    name, target = command["command"], command.get("target_oid", "")
    if name == "send_message":
        named = [f"{key}={value!r}" for key, value in command.get("kwargs", {}).items()]
        return f"{target}.{command['selector']}({', '.join([*map(repr, command.get('args', ())), *named])})"
    if name == "initiate_cognitive_cycle":
        brief = command["mission_brief"]
        verb = "change" if brief["type"] == "revision" else "learn"
        parameters = f"({', '.join(brief['parameters'])})" if "parameters" in brief else ""
        return f"{verb} {target}.{brief['selector']}{parameters}"
    words = [str(value) for key, value in command.items() if key not in ("command", "target_oid", "selector")]
    subject = ".".join(filter(None, [target, command.get("selector", "")]))
    return " ".join(filter(None, [name.replace("_", " "), subject, *words]))
