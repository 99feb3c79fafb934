"""`python -m evals attacks`: attacks from inside a hand, and which layer of the sandbox stops each one.

Nobody audits these methods: they begin where an escape from the guardian would end. Every attack runs behind
all layers, which must leave it nothing; the attacks on the system also run behind one layer alone, and behind
none, as the control that shows that the attack is real. `--user` repeats it all as an ordinary user.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from evals.attacks.cases import EXHAUSTION, SYSTEM, Attack
from evals.attacks.scene import Scene, scenery
from evals.attacks.users import run_as
from evals.report import Case, Report
from uvm.errors import BatosError, MethodRaised
from uvm.hands import sandbox
from uvm.hands.calls import Call, ObjectView
from uvm.hands.pool import HandPool

OID = f"{1:016x}"
TIMEOUT_S = 1.0
MEMORY_MIB = 256
OUTPUT_BYTES = 1 << 20
# The layers that can stop an attack on the system by themselves, in the order of the table.
ALONE = (
    *("seccomp", "namespaces", "landlock", "unprivileged"),
    *("descriptors", "files", "processes", "not_dumpable"),
)
TOGETHER = "all"
NONE = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this evaluation's own options."""
    parser.add_argument("--user", metavar="NAME", help="run as this ordinary user (needs root)")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table to this file")


def run(args: argparse.Namespace) -> Report:
    """Runs all attacks and returns which came to nothing behind all layers."""
    report = as_user(args.user) if args.user else asyncio.run(attacked())
    table = markdown(report)
    print(table)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    return report


async def attacked() -> Report:
    """Runs every attack behind every set of layers, as this process's user."""
    report = Report("attacks", summary={"user": _user()})
    with tempfile.TemporaryDirectory(prefix="batos-attacks-") as folder, scenery(Path(folder)) as scene:
        columns = {TOGETHER: (), NONE: sandbox.NAMES} | {layer: _all_but(layer) for layer in ALONE}
        found = {name: await _column(scene, without) for name, without in columns.items()}
        for group, attacks in SYSTEM.items():
            for attack in attacks:
                outcomes = {name: found[name][attack.name] for name in columns}
                report.add(_judged(group, attack, outcomes))
        for name, outcome in (await _exhaustion(scene)).items():
            report.add(Case(f"exhaustion: {name}", not outcome["harm"], outcome["seconds"], details=outcome))
    together = found[TOGETHER]
    report.summary |= {"tier": together["tier"], "hold": together["hold"], "control": _controls(report)}
    return report


def markdown(report: Report) -> str:
    """Returns the table of attack and layer, in Markdown."""
    lines = [f"As {report.summary['user']}:", "", _row("attack", NONE, *ALONE, "all"), _row(*["---"] * 11)]
    for case in report.cases:
        if "alone" in case.details:
            real = case.details["real"]  # else the system refuses it by itself, and no layer is to be thanked
            marks = ["stops" if real and layer in case.details["alone"] else "" for layer in ALONE]
            verdict = "stopped" if case.passed else "NOT STOPPED"
            lines.append(_row(case.id, "succeeds" if real else "refused", *marks, verdict))
    lines += ["", _row("exhaustion", "what ended it"), _row("---", "---")]
    for case in report.cases:
        if "alone" not in case.details:
            lines.append(_row(case.id.partition(": ")[2], case.details["ended"]))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _judged(group: str, attack: Attack, outcomes: dict[str, dict[str, Any]]) -> Case:
    harm, seconds = outcomes[TOGETHER]["harm"], outcomes[TOGETHER]["seconds"]
    details = {
        "alone": [layer for layer in ALONE if not outcomes[layer]["harm"]],
        "real": bool(outcomes[NONE]["harm"]),
        "ended": outcomes[TOGETHER]["ended"],
    }
    return Case(f"{group}: {attack.name}", not harm, seconds, harm, details)


def _controls(report: Report) -> str:
    system = [case for case in report.cases if "real" in case.details]
    return f"{sum(case.details['real'] for case in system)} of {len(system)} succeed without any layer"


def _all_but(layer: str) -> tuple[str, ...]:
    """Returns what to leave out so that one layer is alone; an ordinary user's filters need a second one."""
    kept = {layer, "no_new_privileges"} if layer in ("seccomp", "landlock") else {layer}
    return tuple(name for name in sandbox.NAMES if name not in kept)


async def _column(scene: Scene, without: tuple[str, ...]) -> dict[str, Any]:
    """Returns the outcome of each attack on the system with some layers left out."""
    pool = _pool(without)
    await pool.start()
    try:
        hold = ", ".join(name for name, holds in pool.layers.items() if holds)
        found: dict[str, Any] = {"tier": pool.tier, "hold": hold}
        for attack in (attack for attacks in SYSTEM.values() for attack in attacks):
            found[attack.name] = await _outcome(pool, scene, attack)
        return found
    finally:
        await pool.close()


async def _exhaustion(scene: Scene) -> dict[str, Any]:
    pool = _pool(())
    await pool.start()
    try:
        return {attack.name: await _outcome(pool, scene, attack) for attack in EXHAUSTION}
    finally:
        await pool.close()


def _pool(without: tuple[str, ...]) -> HandPool:
    return HandPool(
        count=1,
        timeout_s=TIMEOUT_S,
        memory_mib=MEMORY_MIB,
        output_bytes=OUTPUT_BYTES,
        allow_weak=True,
        without=without,
    )


async def _outcome(pool: HandPool, scene: Scene, attack: Attack) -> dict[str, Any]:
    """Returns `{harm, ended, seconds}` of one attack; `harm` is empty where it came to nothing."""
    told = scene.told()
    view = ObjectView(OID, "it", (), {}, {"attack": attack.source()})
    began = time.perf_counter()
    harm = ""
    try:
        outcome = await pool.run(Call(OID, "attack", [told], {}), _Garden(view))
        harm = "it got what it wanted" if outcome.result is True else ""
        ended = "came to nothing"
    except MethodRaised as error:
        ended = error.details["exception"]
    except BatosError as error:
        ended = type(error).__name__
    return {
        "harm": harm or scene.harmed(),
        "ended": ended,
        "seconds": time.perf_counter() - began,
    }


class _Garden:
    """The one object that an attack's method belongs to."""

    def __init__(self, view: ObjectView) -> None:
        self._view = view

    def view(self, oid: str) -> ObjectView | None:
        return self._view if oid == self._view.oid else None

    def taken(self, name: str) -> bool:
        return False

    async def use(
        self, holder: str, slot: str, verb: str, args: list[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        raise AssertionError("it has no grant")


def _user() -> str:
    return "root" if os.geteuid() == 0 else "an ordinary user"


def as_user(user: str) -> Report:
    """Returns what `attacked` finds as an ordinary user.

    Raises:
        ValueError: we are not root, or he can't run this project.
    """
    if os.geteuid() != 0:
        raise ValueError("--user needs root, to become somebody else")
    with tempfile.TemporaryDirectory(prefix="batos-user-") as place:
        told = Path(place) / "told.json"
        told.touch()
        told.chmod(0o666)
        ended = run_as(user, ["-m", "evals", "attacks", "--json", str(told)], Path(place))
        if ended.returncode:
            raise ValueError(f"as {user}: {ended.stderr.strip()[-2000:]}")
        found = json.loads(told.read_text(encoding="utf-8"))
    return Report(found["name"], [Case(**case) for case in found["cases"]], found["summary"])
