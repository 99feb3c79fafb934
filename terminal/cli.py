"""The command line of the terminal client: how it is started, where its input comes from, how it ends.

Loads no model until a sentence needs one, and no kernel where none is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any

from config import Settings
from terminal.display import Display
from terminal.reader import Reader
from terminal.session import Quit, Session
from terminal.values import JSON_FORMS, as_json
from uvm.client import Kernel
from uvm.errors import BatosError, HomeError, InvalidField, MindError, to_wire
from uvm.parser import Context

FAILED, USAGE = 1, 2
PROMPT = "BAT OS> "
_PROMPT_STYLE = "bold fg:ansidefault"  # with a colour, the space at its end is written like the rest
_DESCRIPTION = "The terminal client of BAT OS: plain sentences, obj.method(values) and /commands (see /help)."
_EPILOG = f"""\
Without options it is interactive; text from a pipe is taken line by line and only answers are printed.
--json prints {{"ok": true, "command", "result"}} or {{"ok": false, "error": {{type, message, details}}}}
for each input.
{JSON_FORMS}
--parse prints a command as docs/PROTOCOL.md has it; a doubtful reading as {{"command": "clarify", "question",
"reading"}}, what can't be read as {{"command": "error", "error"}}.

Exit status: 0, or {FAILED} if anything failed (one line on standard error says what), or {USAGE} for wrong
options or settings."""


class Client:
    """One run of the client."""

    def __init__(self, options: argparse.Namespace, settings: Settings) -> None:
        self._options = options
        self._settings = settings
        self._display = Display()
        self._reader = Reader(settings, self._display.note)
        self._status = 0

    async def run(self) -> int:
        """Does what the command line asks for and returns the exit status."""
        options = self._options
        try:
            if options.parse:
                await self._parse_lines(sys.stdin)
                return self._status
            async with self._kernel() as kernel:
                watched = options.command is None and sys.stdin.isatty() and self._display.live
                confirm = self._ask if watched and not options.json else None
                async with Session(kernel, self._reader.read, self._display, confirm) as session:
                    if watched:
                        await self._converse(session)
                    else:
                        lines = sys.stdin if options.command is None else [options.command]
                        await self._take_lines(session, lines)
        except BatosError as error:
            self._fail(error)
        return self._status

    def _kernel(self) -> Kernel:
        settings = self._settings
        return Kernel(settings.ZMQ_ENDPOINT, settings.ZMQ_EVENTS_ENDPOINT, settings.KEYS_DIR)

    # Where input comes from

    async def _converse(self, session: Session) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory

        run = self._settings.HOME / "run"
        run.mkdir(parents=True, exist_ok=True)
        prompt: PromptSession[str] = PromptSession(history=FileHistory(str(run / "chat_history")))
        self._display.note("BAT OS. Say what you want; /help shows what can be said, Ctrl-D leaves.")
        with contextlib.suppress(EOFError, KeyboardInterrupt, Quit):
            while True:
                line = await prompt.prompt_async([(_PROMPT_STYLE, PROMPT)])
                if line.strip():
                    await self._interruptible(self._one(session, line))
        self._status = 0

    async def _take_lines(self, session: Session, lines: Iterable[str]) -> None:
        with contextlib.suppress(Quit):
            for line in lines:
                if line.strip() or self._options.command is not None:
                    await self._interruptible(self._one(session, line))

    async def _parse_lines(self, lines: Iterable[str]) -> None:
        """Prints a command for each line, which needs a kernel only to learn what objects there are."""
        context = self._given_context() or await self._kernel_context()
        for line in filter(str.strip, lines):
            try:
                told = (await self._reader.read(line, context)).told()
            except (HomeError, MindError):
                raise
            except BatosError as error:
                told, self._status = {"command": "error", "error": to_wire(error)}, FAILED
            print(json.dumps(as_json(told), ensure_ascii=False), flush=True)

    def _given_context(self) -> Context | None:
        path = self._options.context
        if path is None:
            return None
        try:
            return Context.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InvalidField(f"{path} can't be read as a context: {error}", field="context") from None

    async def _kernel_context(self) -> Context:
        async with self._kernel() as kernel:
            return await Session(kernel, self._reader.read, self._display).context()

    # One input

    async def _one(self, session: Session, text: str) -> None:
        try:
            name, result = await session.say(text)
        except BatosError as error:
            self._fail(error)
            return
        if self._options.json:
            self._print_json({"ok": True, "command": name, "result": result})
        else:
            session.show(name, result)

    async def _interruptible(self, work: Awaitable[None]) -> None:
        """Runs `work`; Ctrl-C cancels it, not the client."""
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel))
        try:
            await task
        except asyncio.CancelledError:
            self._display.error("interrupted")
            self._status = FAILED
        finally:
            signal.signal(signal.SIGINT, before)

    async def _ask(self, question: str) -> bool:
        from prompt_toolkit import PromptSession

        try:
            answer = await PromptSession[str]().prompt_async(f"{question} [y/N] ")
        except (EOFError, KeyboardInterrupt):
            return False
        return answer.strip().casefold() in ("y", "yes")

    def _fail(self, error: BatosError) -> None:
        self._status = FAILED
        if self._options.json:
            self._print_json({"ok": False, "error": to_wire(error)})
        self._display.error(error.message)

    @staticmethod
    def _print_json(value: Any) -> None:
        print(json.dumps(as_json(value), ensure_ascii=False), flush=True)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the options on the command line."""
    parser = argparse.ArgumentParser(
        prog="chat_client.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-c", dest="command", metavar="TEXT", help="do one thing, then leave")
    what.add_argument(
        "--parse", action="store_true", help="print what each line of the input means, do nothing"
    )
    parser.add_argument(
        "--context", type=Path, metavar="FILE", help="for --parse: objects, as JSON; no kernel"
    )
    parser.add_argument("--json", action="store_true", help="print results as JSON, one a line")
    options = parser.parse_args(arguments)
    if options.context is not None and not options.parse:
        parser.error("--context needs --parse")
    return options


def main(arguments: list[str]) -> int:
    """Runs the client and returns its exit status."""
    options = parse_arguments(arguments)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        settings = Settings()
    except HomeError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if sys.platform == "win32":  # pyzmq needs a loop with add_reader
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    try:
        return asyncio.run(Client(options, settings).run())
    except KeyboardInterrupt:
        return FAILED
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
