"""The coverage-guided half of `evals.fuzz`: runs `evals.fuzzing.target` and reads what it found."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from evals.fuzzing.frames import OTHERS, REQUESTS, valid

_RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERAGE = re.compile(r"cov: (\d+)")


@dataclass(frozen=True, slots=True)
class Decoded:
    """What came of a run.

    Attributes:
        inputs: how many byte strings were tried.
        branches: how many places of the decoder they reached, at the first look and in the end.
        failure: the end of what the process printed, where it found something; else empty.
    """

    inputs: int
    branches: tuple[int, int]
    failure: str


def is_possible() -> bool:
    """Returns whether atheris is here; there is one for Linux on x86-64 only."""
    return importlib.util.find_spec("atheris") is not None


def fuzz_decoder(folder: Path, *limits: str, seed: int = 1) -> Decoded:
    """Fuzzes the decoder in a process of its own.

    Args:
        folder: an empty folder, for the corpus and for inputs that fail.
        limits: of libFuzzer, such as `-runs=20000` or `-max_total_time=60`.
    """
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(len(REQUESTS + OTHERS)):
        (corpus / str(number)).write_bytes(valid(number))
    options = [*limits, f"-seed={seed}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=2048"]
    options += ["-print_final_stats=1", f"-artifact_prefix={folder}/"]
    done = subprocess.run(
        [sys.executable, "-m", "evals.fuzzing.target", str(corpus), *options],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    printed = done.stdout + done.stderr
    runs, coverage = _RUNS.search(printed), [int(found) for found in _COVERAGE.findall(printed)] or [0]
    failure = printed[-4000:] if done.returncode or runs is None else ""
    return Decoded(int(runs[1]) if runs else 0, (coverage[0], coverage[-1]), failure)
