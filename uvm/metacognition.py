"""The metacognition log: every thought as one JSON object a line, on disk before the cycle moves on.

Whoever thinks calls `record`; the same record then goes to the listeners (the bridge publishes it). Layer 1:
knows nothing of who thinks or listens.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiologger import Logger
from aiologger.formatters.base import Formatter
from aiologger.handlers.files import AsyncFileHandler

_MOST_BITS = 10_000  # Python writes no int of more than 4,300 digits, which have 14,285 bits

Listener = Callable[[str, dict[str, Any]], None]


class _JsonLine(Formatter):  # type: ignore[misc]
    def format(self, record: Any) -> str:
        try:
            line = json.dumps(record.msg, ensure_ascii=False, default=repr)
            line.encode()
        except (TypeError, ValueError):  # what a message may hold, but JSON or UTF-8 may not
            return json.dumps(_as_json(record.msg), default=_text)
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


class _Handler(AsyncFileHandler):  # type: ignore[misc]
    async def handle_error(self, record: Any, exception: Exception) -> None:
        raise exception  # a thought that is not on disk must not count as logged


class MetacognitionLog:
    """Appends records to a JSON Lines file.

    Args:
        path: the file; a last line that a kill cut short is closed off, so that it spoils no other.
        listeners: called with `(event, fields)` after each record is on disk.
    """

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seq = _resume(path)
        self._listeners = list(listeners)
        self._lock = asyncio.Lock()
        self._logger = Logger(name="metacognition")
        handler = _Handler(str(path), encoding="utf-8")
        handler.formatter = _JsonLine()
        self._logger.add_handler(handler)

    def listen(self, listener: Listener) -> None:
        """Adds a listener."""
        self._listeners.append(listener)

    async def record(self, event: str, **fields: Any) -> None:
        """Writes one record `{ts, seq, event, …}`: `ts` in UTC, `seq` rising by one, also over restarts.

        Raises:
            OSError: the line could not be written.
        """
        async with self._lock:
            self._seq += 1
            stamp = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
            await self._logger.info({"ts": stamp, "seq": self._seq, "event": event, **fields})
        self.announce(event, **fields)

    def announce(self, event: str, **fields: Any) -> None:
        """Tells the listeners of something too fleeting for the log, such as a token."""
        for listener in self._listeners:
            listener(event, fields)

    async def close(self) -> None:
        """Flushes and closes the file."""
        async with self._lock:
            await self._logger.shutdown()


def _resume(path: Path) -> int:
    """Returns the last `seq` in the file, and ends a last line that was cut short."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        file.seek(max(0, os.path.getsize(path) - (1 << 20)))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.write(b"\n")
    for line in reversed(tail.splitlines()):
        try:
            return int(json.loads(line)["seq"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
