"""`python -m evals missions FILE`: how many missions become a method that does what was meant.

Starts a fresh kernel, sends every mission over the wire with the examples that its brief shows, then the
hidden checks by `send_message`. A mission is fulfilled when its cycle completes and every check holds; a
tuple counts as the list that it is in JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from evals.kernels import running
from evals.report import Case, Report
from uvm.client import Kernel
from uvm.codec import matches
from uvm.errors import BatosError, MissionFailed

TARGET = "genesis_obj"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this evaluation."""
    parser.add_argument("file", type=Path, help="missions, one JSON object a line")
    parser.add_argument("--limit", type=int, help="only the first N missions")
    parser.add_argument("--model", help="asset name or GGUF file for all personas")


def run(args: argparse.Namespace) -> Report:
    """Runs the evaluation and returns its report."""
    lines = args.file.read_text(encoding="utf-8").splitlines()
    missions = [json.loads(line) for line in lines if line.strip()][: args.limit]
    settings = {}
    if args.model:
        personas = ("ALFRED", "BRICK", "ROBIN", "BABS")
        settings["PERSONA_MODELS"] = json.dumps(dict.fromkeys(personas, args.model))
    return asyncio.run(_run(missions, settings))


async def _run(missions: list[dict[str, Any]], settings: dict[str, str]) -> Report:
    report = Report("missions")
    with tempfile.TemporaryDirectory(prefix="batos-missions-") as home:
        async with running(Path(home), settings) as kernel:
            for mission in missions:
                report.add(await _one(kernel, mission))
    report.summary |= _summary(report.cases)
    return report


async def _one(kernel: Kernel, mission: dict[str, Any]) -> Case:
    started = time.monotonic()
    details: dict[str, Any] = {}
    try:
        learned = await kernel.teach(
            TARGET, mission["selector"], mission["args"], mission["description"], mission["examples"]
        )
        details = {key: learned[key] for key in ("attempts", "tokens")} | {
            "source": learned["method"]["source"]
        }
        reason = await _first_failure(kernel, mission)
    except MissionFailed as failure:
        details = {key: failure.details.get(key, 0) for key in ("attempts", "tokens")}
        reason = str(failure)
    return Case(mission["id"], not reason, time.monotonic() - started, reason, details)


async def _first_failure(kernel: Kernel, mission: dict[str, Any]) -> str:
    """Returns why the first hidden check that does not hold fails; empty where all hold."""
    for check in mission["checks"]:
        call = f"{mission['selector']}({', '.join(map(repr, check['args']))})"
        try:
            got = await kernel.request(
                "send_message",
                target_oid=TARGET,
                selector=mission["selector"],
                args=check["args"],
                on_missing="error",
            )
        except BatosError as error:
            return f"{call}: {error}"[:300]
        if not matches(check["returns"], _as_json(got)):
            return f"{call} returned {got!r}, not {check['returns']!r}"[:300]
    return ""


def _as_json(value: Any) -> Any:
    """Returns a value as it would look after JSON: tuples are lists."""
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return value


def _summary(cases: list[Case]) -> dict[str, Any]:
    completed = [case for case in cases if "source" in case.details]
    return {
        "completed": len(completed),
        "completed but wrong": sum(not case.passed for case in completed),
        "attempts (mean)": round(statistics.fmean(case.details["attempts"] for case in cases), 2),
        "tokens written (mean)": round(statistics.fmean(case.details["tokens"] for case in cases)),
        "seconds (median)": round(statistics.median(case.seconds for case in cases), 1),
    }
