"""`python -m evals commits [--stride N]`: a mission's last commit is whole or not there, wherever it dies.

Method, version, provenance, memory entry and mission row come in one commit. Here its process dies at every
line of Python that takes part in it, before and within every write, and a finished file is cut at many
places; after each death the image is opened as a kernel opens it, and either all five are there or none.
Where none is, the next run must make all. `evals.dying` does the dying.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.report import Case, Report

KINDS = {"unhandled_message": "a new method", "revision": "a revision"}
WAYS = {
    "line": "killed at a line of Python",
    "write": "killed before a write",
    "half a write": "killed in the middle of a write",
    "cut": "the file cut within the commit",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this evaluation."""
    parser.add_argument("--stride", type=int, default=1, help="only every N-th line, and N times fewer cuts")


def run(args: argparse.Namespace) -> Report:
    """Runs the evaluation and returns its report."""
    report = Report("commits")
    counts: Counter[str] = Counter()
    for kind, named in KINDS.items():
        began = time.monotonic()
        outcomes = list(_outcomes(kind, args.stride))
        for way, meaning in WAYS.items():
            deaths = [outcome for outcome in outcomes if outcome["way"] == way]
            found = Counter(outcome["found"] for outcome in deaths)
            wrong = [
                told for told in deaths if told["found"] not in ("all", "none") or told["again"] != "all"
            ]
            share = (time.monotonic() - began) * len(deaths) / len(outcomes)
            told = f"{len(deaths)} points: none {found['none']}, all {found['all']}, else {len(wrong)}"
            first = f"; first: {wrong[0]}" if wrong else ""
            passed = bool(deaths) and not wrong
            report.add(Case(f"{named}, {meaning}", passed, share, told + first, {"wrong": wrong}))
            counts += Counter({"none": found["none"], "all": found["all"], "else": len(wrong)})
    report.summary["points"] = sum(counts.values())
    report.summary |= {name: counts[name] for name in ("none", "all", "else")}
    return report


def _outcomes(kind: str, stride: int) -> Iterator[dict[str, Any]]:
    """Yields what `evals.dying` prints; its process has one thread, so that it may fork."""
    with tempfile.TemporaryDirectory(prefix="batos-commits-") as folder:
        home = Path(folder)
        command = [sys.executable, "-m", "evals.dying", str(home / "images"), kind, str(stride)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with (home / "errors").open("w+") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )
            with child:
                assert child.stdout is not None
                yield from map(json.loads, child.stdout)
            if child.returncode:
                errors.seek(0)
                raise OSError(f"evals.dying ended with {child.returncode}: {errors.read()[-2000:]}")
