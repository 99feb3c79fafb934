"""What the personas of a torture run recite: a right method for any selector, some of it slowly.

A selector is `KIND_NUMBER`, and the example that comes with it shows its edition, such as `self.add_17(5)
returns [5, 17, 2]` for the second. The method returns its argument, its number and its edition, so that
nobody can mistake one method, or one edition, for another. A request to mend shows no example: the persona
is at a loss then, and the machine asks afresh.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PERSONAS = ("ALFRED", "BRICK", "ROBIN", "BABS")
QUERIES = '{"queries": ["a method"], "sample_args": []}'
KINDS = {"add": 6, "slow": 2, "long": 2}  # of methods that come out right, with their weights
STALLS, FAILS = "stall", "bad"  # of missions that never end, and of those that can't come out right
LEDGER = "ledger_obj"
LAST = 9  # edition
SAMPLE = 5  # the argument of each example
_EXAMPLE = r"self\.{kind}_(\d+)\(5\) returns \[5, \d+, (\d)\]"
_MISSED = r"It was called as: self\.{kind}_(\d+)\(5\)"
_BUSY = "    for step in range(2_000_000):\n        pass\n"
_DWELL = "    for step in range(40_000_000 if number % 8 == 7 else 2_000_000):\n        pass\n"
_ENTER = (
    "    self.count = self.count + 1\n"
    "    self.entries = [*self.entries, number]\n"
    "    self._p_changed = True\n"
    "    return self.count\n"
)


def answer(selector: str, argument: int, edition: int) -> list[int]:
    """Returns what a method of this edition returns."""
    return [argument, int(selector.rpartition("_")[2]), edition]


def lines() -> list[dict[str, Any]]:
    """Returns the script."""
    return [
        {"pattern": r"(?s)self\.slow_\d+\(.*short search queries", "reply": QUERIES, "seconds": 0.15},
        {"pattern": "short search queries", "reply": QUERIES, "seconds": 0.01},
        {"pattern": "Write the whole corrected method", "reply": "I don't remember which one."},
        {"pattern": rf"self\.{STALLS}_\d+\(", "stall": True},
        *_methods("add"),
        *_methods("slow", seconds=0.25),
        *_methods("long", _BUSY),
        *_methods(FAILS, "    x = None\n"),
        *(
            _entering(selector, body)
            for selector, body in (("increment", _ENTER), ("dwell", _DWELL + _ENTER))
        ),
    ]


def _methods(kind: str, body: str = "", seconds: float = 0.0) -> list[dict[str, Any]]:
    """Returns the lines of a kind: where an example says the edition, and where a call was missed."""
    method = f"```python\ndef {kind}_\\1(self, x):\n{body}    return [x, \\1, {{edition}}]\n```"
    editions = {_EXAMPLE: r"\2", _MISSED: "1"}
    return [
        {
            "pattern": pattern.replace("{kind}", kind),
            "reply": method.format(edition=edition),
            "expand": True,
            "seconds": seconds,
        }
        for pattern, edition in editions.items()
    ]


def _entering(selector: str, body: str) -> dict[str, Any]:
    method = f"```python\ndef {selector}(self, number):\n{body}```"
    return {"pattern": rf"self\.{selector}\(0\)", "reply": method}


def settings(folder: Path) -> dict[str, str]:
    """Writes the script into a folder and returns the settings of a kernel that recites it."""
    path = folder / "script.json"
    path.write_text(json.dumps(lines()), encoding="utf-8")
    return {
        "PERSONA_MODELS": json.dumps(dict.fromkeys(PERSONAS, f"scripted:{path}")),
        "SENTENCE_TRANSFORMER_MODEL": "hashing",
        "HAND_TIMEOUT_S": "10",
        "HAND_MEMORY_MIB": "64",
        "HAND_COUNT": "2",
        "WORKER_COUNT": "3",
        "MAX_SYNTHESIS_ATTEMPTS": "5",
    }
