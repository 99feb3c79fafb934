"""A bounded run of what `python -m evals fuzz` does for minutes: hostile bytes for decoder and kernel."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from evals.__main__ import main
from evals.fuzzing.coverage import fuzz_decoder, is_possible
from evals.fuzzing.flood import Flooded, flood
from evals.fuzzing.frames import OTHERS, REQUESTS, expected, valid, wild
from uvm.messages import parse_request

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not is_possible(), reason="atheris is not installed: it is for Linux on x86-64 only")
def test_invented_inputs_are_requests_or_refused(tmp_path: Path) -> None:
    done = fuzz_decoder(tmp_path, "-runs=20000")
    assert done.failure == ""
    assert done.inputs >= 20_000
    assert done.branches[1] > done.branches[0] > 0  # it is led by coverage, and found more than it was given


def test_each_wild_frame_is_answered_and_the_kernel_stays_as_it_was() -> None:
    done = flood(5000)
    assert (done.alive, done.lost, done.wrong) == (True, 0, [])
    assert done.sent == done.answers.total() == 5000
    assert {"ok", "MalformedMessage", "InvalidField", "UnknownCommand", "UnsupportedVersion"} <= set(
        done.answers
    )
    assert done.oversize == (10, 10)
    assert done.memory_is_flat, done.rss_mib
    assert done.descriptors_are_flat, done.descriptors


def test_all_requests_of_the_corpus_are_valid() -> None:
    commands = [parse_request(valid(number)).command for number in range(len(REQUESTS + OTHERS))]
    assert [type(command).__name__ for command in commands[:2]] == ["Ping", "Status"]


def test_wild_frames_can_be_drawn_again() -> None:
    once, again = ([wild(rng, n) for n in range(300)] for rng in (random.Random(7), random.Random(7)))
    assert once == again
    assert len({expected(frame)[1] for frame in once}) > 4


def test_growth_and_leaks_are_seen() -> None:
    flat = Flooded(rss_mib=[30.0, 60.0, *[70.0, 71.0] * 24], descriptors=[20, *[25] * 49])
    assert flat.memory_is_flat
    assert flat.descriptors_are_flat
    growing = Flooded(rss_mib=[60.0 + n for n in range(50)], descriptors=list(range(20, 70)))
    assert not growing.memory_is_flat
    assert not growing.descriptors_are_flat


def test_the_evaluation_prints_and_writes_its_cases(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    assert main(["fuzz", "--minutes", "0", "--frames", "300", "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    assert (told["name"], told["n"]) == ("fuzz", 6)
    assert [case["id"] for case in told["cases"] if not case["passed"]] == []
