"""`python -m evals fuzz --minutes N [--frames N]`: hostile bytes for the bridge's decoder and for a kernel.

First atheris invents inputs for the decoder, led by the branches that they reach: each must be a request or
refused. Then wild frames go to a real kernel over a real socket: each must be answered as the protocol says,
or close its connection where it is too long, and the kernel must not grow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from evals.fuzzing.coverage import fuzz_decoder, is_possible
from evals.fuzzing.flood import Flooded, flood
from evals.report import Case, Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this evaluation."""
    parser.add_argument("--minutes", type=float, default=1.0, help="how long inputs are invented (1)")
    parser.add_argument("--frames", type=int, default=100_000, help="frames over the socket (100,000)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn at random (1)")


def run(args: argparse.Namespace) -> Report:
    """Runs the evaluation and returns its report."""
    report = Report("fuzz")
    if args.minutes > 0:
        _decoder(report, args.minutes, args.seed)
    if args.frames > 0:
        _flood(report, flood(args.frames, args.seed, tell=print))
    return report


def _decoder(report: Report, minutes: float, seed: int) -> None:
    if not is_possible():
        report.summary["inputs invented"] = "none: atheris is not installed (Linux on x86-64 only)"
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="batos-fuzz-") as folder:
        done = fuzz_decoder(Path(folder), f"-max_total_time={max(1, round(minutes * 60))}", seed=seed)
    report.add(
        Case("each input is a request or refused", not done.failure, time.monotonic() - began, done.failure)
    )
    report.summary["inputs invented"] = f"{done.inputs:,}"
    report.summary["branches reached (first, last)"] = "{} to {}".format(*done.branches)


def _flood(report: Report, done: Flooded) -> None:
    closed, tried = done.oversize
    checks = {
        "the kernel is alive": (done.alive, "it ended"),
        "each frame is answered": (not done.lost, f"{done.lost} without an answer"),
        "each answer is the right one": (not done.wrong, "; ".join(done.wrong)),
        "what is too long closes its connection": (closed == tried, f"{closed} of {tried}"),
        "memory is flat": (done.memory_is_flat, f"{done.growth_mib:.1f} MiB more"),
        "descriptors are flat": (done.descriptors_are_flat, str(done.descriptors)),
    }
    for name, (passed, reason) in checks.items():
        report.add(Case(name, passed, done.seconds / len(checks), "" if passed else reason))
    report.cases[-1].details.update(rss_mib=done.rss_mib, descriptors=done.descriptors)
    report.summary["frames sent"] = f"{done.sent:,} in {done.seconds:.0f} s"
    report.summary |= {
        f"answered: {'carried out' if kind == 'ok' else kind}": f"{count:,}"
        for kind, count in done.answers.most_common()
    }
    report.summary["too long, connection closed"] = f"{closed} of {tried}"
    if done.rss_mib:
        first, last = done.rss_mib[len(done.rss_mib) // 5], done.rss_mib[-1]
        report.summary["memory (warm, end)"] = f"{first:.0f} to {last:.0f} MiB"
