"""The metacognition log: every thought as one JSON object a line, on disk before the cycle moves on.

Whoever thinks calls `record`; the same record then goes to the listeners (the bridge publishes it). Layer 1:
knows nothing of who thinks or listens.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from aiologger import Logger
from aiologger.formatters.base import Formatter
from aiologger.handlers.base import Handler

_MOST_BITS = 10_000  # Python writes no int of more than 4,300 digits, which have 14,285 bits

Listener = Callable[[str, dict[str, Any]], None]
Report = Callable[[BaseException], None]


class _JsonLines(Formatter):  # type: ignore[misc]
    def format(self, record: Any) -> str:
        return "\n".join(map(_line, record.msg))


def _line(told: dict[str, Any]) -> str:
    try:
        line = json.dumps(told, ensure_ascii=False, default=repr)
        line.encode()
    except (TypeError, ValueError):  # what a message may hold, but JSON or UTF-8 may not
        return json.dumps(_as_json(told), default=_text)
    return line


def _as_json(value: Any) -> Any:
    """Returns a value with text for keys that are none and for ints too long to be written as decimals."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(_as_json(key)): _as_json(value[key]) for key in value}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_as_json(item) for item in value]
    return hex(value) if isinstance(value, int) and value.bit_length() > _MOST_BITS else value


def _text(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # a Fraction of such ints
        return f"a {type(value).__name__}"


class _Handler(Handler):  # type: ignore[misc]
    """Appends whole lines, or nothing, and says so: a thought that is not on disk must not count as logged.

    There is no buffer, in which a line would wait that its writer was told could not be written.
    """

    def __init__(self, path: Path, torn: bool) -> None:
        super().__init__()
        self._path = path
        self._torn = torn  # whether the file ends with a part of a line
        self._file: FileIO | None = None
        self._turn = threading.Lock()  # a cancelled writer's thread may still be at work

    @property
    def initialized(self) -> bool:
        return self._file is not None

    async def emit(self, record: Any) -> None:
        line = f"{self.formatter.format(record)}\n".encode()
        await asyncio.to_thread(self._append, line)

    async def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: bytes) -> None:
        with self._turn:
            if self._file is None:
                self._file = FileIO(self._path, "a")
            end = os.fstat(self._file.fileno()).st_size
            try:
                _write(self._file, b"\n" + line if self._torn else line)
            except BaseException:
                self._take_back(end)
                raise
            self._torn = False

    def _take_back(self, end: int) -> None:
        """Cuts off what there is of a line; where that can't be done either, the next one begins afresh."""
        assert self._file is not None
        try:
            self._file.truncate(end)
        except OSError:
            self._torn = True


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A record that waits for its turn."""

    since: dt.datetime
    event: str
    fields: dict[str, Any]
    written: asyncio.Future[None]

    def line(self, seq: int) -> dict[str, Any]:
        stamp = self.since.isoformat(timespec="milliseconds")
        return {"ts": stamp, "seq": seq, "event": self.event, **self.fields}


class MetacognitionLog:
    """Appends records to a JSON Lines file.

    Args:
        path: the file; a last line that a kill cut short is closed off, so that it spoils no other.
        listeners: called with `(event, fields)` after each record is on disk.
        max_mib: a file that is larger at the start is renamed, with the time in its name; 0 never does.
        report: told of what a listener raises, which keeps neither the log nor other listeners from theirs.
    """

    def __init__(
        self,
        path: Path,
        listeners: tuple[Listener, ...] = (),
        max_mib: int = 0,
        report: Report = traceback.print_exception,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seq, torn = _resume(path)
        if max_mib and path.exists() and path.stat().st_size > max_mib << 20:
            _set_aside(path)
            torn = False
        self._listeners = list(listeners)
        self._report = report
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        self._logger = Logger(name="metacognition")
        handler = _Handler(path, torn)
        handler.formatter = _JsonLines()
        self._logger.add_handler(handler)

    def listen(self, listener: Listener) -> None:
        """Adds a listener."""
        self._listeners.append(listener)

    async def record(self, event: str, **fields: Any) -> None:
        """Writes one record `{ts, seq, event, …}`: `ts` in UTC, `seq` rising by one, also over restarts.

        Raises:
            OSError: the line could not be written.
        """
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        written.add_done_callback(lambda done: done.exception())  # seen, also where who waited was cancelled
        self._waiting.append(_Waiting(dt.datetime.now(dt.UTC), event, fields, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await asyncio.shield(written)

    async def _write(self) -> None:
        """Writes whatever waits, all that came meanwhile at once, until nothing does."""
        while batch := self._waiting:
            self._waiting = []
            try:
                await self._logger.info([waiting.line(self._seq + n) for n, waiting in enumerate(batch, 1)])
            except Exception as error:
                for waiting in batch:
                    waiting.written.set_exception(error)
            else:
                self._seq += len(batch)
                for waiting in batch:
                    waiting.written.set_result(None)
                for waiting in batch:
                    self.announce(waiting.event, **waiting.fields)

    def announce(self, event: str, **fields: Any) -> None:
        """Tells the listeners of something too fleeting for the log, such as a token."""
        for listener in self._listeners:
            try:
                listener(event, fields)
            except Exception as error:
                with suppress(Exception):  # whatever else fails: the log goes on
                    self._report(error)

    async def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is not None:
            await self._writer
        await self._logger.shutdown()


def _resume(path: Path) -> tuple[int, bool]:
    """Returns the last `seq`, and whether the file ends with a line that was cut short."""
    if not path.exists():
        earlier = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))  # set aside, and nothing came after
        return (_resume(earlier[-1])[0] if earlier else 0), False
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - (1 << 20)))
        tail = file.read()
    torn = bool(tail) and not tail.endswith(b"\n")
    for line in reversed(tail.splitlines()):
        try:
            return int(json.loads(line)["seq"]), torn
        except (ValueError, KeyError, TypeError):
            continue
    return 0, torn


def _set_aside(path: Path) -> None:
    """Gives the file a name of its own; nothing of it is ever deleted here."""
    now = dt.datetime.now(dt.UTC)
    while True:
        aside = path.with_name(f"{path.stem}-{now:%Y%m%dT%H%M%S.%fZ}{path.suffix}")
        if not aside.exists():
            path.rename(aside)
            return
        now += dt.timedelta(microseconds=1)
