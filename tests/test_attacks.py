"""Attacks on the machine from inside a hand, behind all layers, behind one, and behind none as control."""

from __future__ import annotations

import os
import pwd
from typing import Any

import pytest
import pytest_asyncio

from evals import attacks
from evals.attacks.cases import EXHAUSTION, SYSTEM
from evals.report import Case, Report
from uvm.hands.linux import landlock_version
from uvm.hands.seccomp import compile_filter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(compile_filter() is None, reason="no seccomp here: tier C is no sandbox"),
]

NAMED = {f"{group}: {attack.name}": attack for group, listed in SYSTEM.items() for attack in listed}
# What seccomp needs no help for, and who else would stop it: one witness for each further layer.
WITNESSES = {
    "namespaces": "reading: read a secret file",
    "landlock": "network: connect over TCP",
    "descriptors": "descriptors: write to what it inherited",
    "files": "writing: change a file",
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def report() -> Report:
    return await attacks.attacked()


@pytest.fixture
def cases(report: Report) -> dict[str, Case]:
    return {case.id: case for case in report.cases}


@pytest.mark.parametrize("name", NAMED)
async def test_an_attack_on_the_system_comes_to_nothing(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    assert case.reason == ""
    assert "seccomp" in case.details["alone"]


async def test_most_attacks_are_real(cases: dict[str, Case]) -> None:
    real = {name for name in NAMED if cases[name].details["real"]}
    assert len(real) >= 40  # some systems refuse some of them by themselves
    assert {"reading: read a secret file", "writing: change a file", "processes: fork"} <= real


@pytest.mark.parametrize("attack", EXHAUSTION, ids=lambda attack: attack.name)
async def test_what_uses_up_the_machine_is_ended(cases: dict[str, Case], attack: Any) -> None:
    case = cases[f"exhaustion: {attack.name}"]
    assert case.reason == ""
    assert case.details["ended"] in {"HandTimeout", "HandOutOfMemory", "HandDied", "PermissionError"}


@pytest.mark.parametrize(("layer", "name"), WITNESSES.items())
async def test_each_layer_stops_something_by_itself(
    report: Report, cases: dict[str, Case], layer: str, name: str
) -> None:
    if layer not in report.summary["hold"]:
        pytest.skip(f"this system has no {layer}")
    if layer == "landlock" and landlock_version() < 4:
        pytest.skip("this Landlock knows no TCP")
    assert layer in cases[name].details["alone"]


async def test_the_table_has_a_row_for_each_attack(report: Report) -> None:
    table = attacks.markdown(report)
    assert all(name in table for name in NAMED)
    assert "NOT STOPPED" not in table


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else; as above")
async def test_an_ordinary_user_is_as_safe() -> None:
    nobody = pwd.getpwuid(65534).pw_name
    try:
        report = attacks.as_user(nobody)
    except ValueError as error:
        pytest.skip(str(error))  # an interpreter or a project that only root may read
    assert report.summary["user"] == "an ordinary user"
    assert [case.id for case in report.cases if not case.passed] == []
    assert len(report.cases) == len(NAMED) + len(EXHAUSTION)
