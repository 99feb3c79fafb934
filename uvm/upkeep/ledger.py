"""What upkeep did last and how it ended: a small file, by which due times survive restarts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from uvm.upkeep import files

_NOTHING: dict[str, Any] = {"last": None, "tried": 0.0, "failures": 0}
_NEVER = 1e12  # no clock shows so many seconds, and nothing fails so often


class Ledger:
    """The file; it may be lost without harm."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def told(self, what: str) -> dict[str, Any]:
        """Returns `{last, tried, failures, error?, …}` of a kind of upkeep; times in Unix seconds."""
        kept = self._read().get(what)
        known = kept if isinstance(kept, dict) else {}
        entry = _NOTHING | known
        numbers = (entry["last"] or 0.0, entry["tried"], entry["failures"])
        sound = all(isinstance(number, (int, float)) and 0 <= number < _NEVER for number in numbers)
        return entry if sound else dict(_NOTHING)

    def done(self, what: str, result: dict[str, Any]) -> None:
        """Notes a success."""
        now = time.time()
        self._write(what, {"last": now, "tried": now, "failures": 0, **result})

    def failed(self, what: str, error: str) -> None:
        """Notes a failure; what the last success came to stays."""
        known = self.told(what)
        failures = known["failures"] + 1
        self._write(what, known | {"tried": time.time(), "failures": failures, "error": error})

    def _write(self, what: str, entry: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(self._path, self._read() | {what: entry})

    def _read(self) -> dict[str, Any]:
        try:
            return files.read_json(self._path) or {}
        except OSError:
            return {}
