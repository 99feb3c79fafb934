"""`python -m evals utterances FILE --context FILE`: how many sentences become the command they stand for.

Each row has a sentence (`say`) and what its command must have; `expects` says how rows are read. A question
back counts as a miss. Runs the parser as `chat_client.py --parse` does. In `evals/data` there are two sets,
each with its context, written before the parser was tuned.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import Settings
from evals.report import Case, Report
from terminal.reader import open_parser
from uvm.errors import BatosError
from uvm.parser import Context, Parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this evaluation."""
    parser.add_argument("file", type=Path, help="sentences, one JSON object a line")
    parser.add_argument("--context", type=Path, required=True, help="the objects that exist, as JSON")
    parser.add_argument("--limit", type=int, help="only the first N sentences")


def run(args: argparse.Namespace) -> Report:
    """Runs the evaluation and returns its report."""
    lines = args.file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()][: args.limit]
    context = Context.from_json(json.loads(args.context.read_text(encoding="utf-8")))
    parser, report = open_parser(Settings()), Report("utterances")
    for row in rows:
        report.add(_one(parser, context, row))
    report.summary |= _summary(report.cases, rows)
    return report


def _one(parser: Parser, context: Context, row: dict[str, Any]) -> Case:
    started = time.monotonic()
    try:
        told = parser.read(row["say"], context).told()
    except BatosError as error:
        told = {"command": "error", "message": str(error)}
    seconds = time.monotonic() - started
    passed = expects(row, told)
    reason = "" if passed else f"understood as {json.dumps(told, ensure_ascii=False)}"
    return Case(row["say"], passed, seconds, reason, {"told": told})


def expects(row: dict[str, Any], told: dict[str, Any]) -> bool:
    """Returns whether a command is what a row stands for.

    `command`, `target_oid` and `name` must be equal. `selector` is a regular expression for the selector,
    `text` one for the text of a memory or a query. `params` lists the parameters' names, or counts them.
    `args` lists the arguments; one that starts with `~` is a substring in any case of letters.
    """
    brief = told.get("mission_brief", {})
    parameters, args = brief.get("parameters") or [], told.get("args", [])
    checks: dict[str, Callable[[Any], Any]] = {
        "command": lambda want: told["command"] == want,
        "target_oid": lambda want: told.get("target_oid") == want,
        "name": lambda want: told.get("name") == want,
        "selector": lambda want: re.search(want, brief.get("selector") or told.get("selector", "")),
        "text": lambda want: re.search(want, told.get("text") or told.get("query", "")),
        "params": lambda want: want is None or want in (parameters, len(parameters)),
        "args": lambda want: len(want) == len(args) and all(map(_matches, want, args)),
    }
    return all(check(row[name]) for name, check in checks.items() if name in row)


def _matches(want: Any, got: Any) -> bool:
    if isinstance(want, str) and want.startswith("~"):
        return isinstance(got, str) and want[1:].casefold() in got.casefold()
    return bool(want == got) and isinstance(want, str) == isinstance(got, str)


def _summary(cases: list[Case], rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not cases:
        return {}
    summary: dict[str, Any] = {"seconds (median)": round(statistics.median(c.seconds for c in cases), 2)}
    for name, case in zip(("first", "second"), cases, strict=False):
        summary[f"seconds ({name} sentence)"] = round(case.seconds, 2)
    styles: dict[str, list[bool]] = {}
    for case, row in zip(cases, rows, strict=True):
        styles.setdefault(row.get("style", ""), []).append(case.passed)
    if set(styles) != {""}:
        summary |= {style: f"{sum(passed)} of {len(passed)}" for style, passed in styles.items()}
    return summary
