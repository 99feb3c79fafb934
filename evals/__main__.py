"""`python -m evals NAME …`: runs one evaluation, prints its table, and writes it as JSON if asked.

An evaluation is a module here with `add_arguments(parser)` and `run(args) -> Report`; it is imported when it
is asked for, so that one evaluation's needs are not another's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from uvm.errors import BatosError

EVALUATIONS = {
    "attacks": "attacks on the machine, from inside a hand, that come to nothing",
    "damages": "damaged images that come back with all that was whole, or are refused untouched",
    "commits": "deaths in the middle of a mission's last commit, which is there in whole or not at all",
    "fuzz": "hostile bytes that are answered or refused, and leave the kernel as it was",
    "missions": "missions that become a method which does what was meant",
    "torture": "kills at random moments, after which nothing that was acknowledged is lost",
    "utterances": "sentences that become the right command",
}


def main(arguments: list[str]) -> int:
    """Runs the evaluation that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evals", description="Measures BAT OS.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, meaning in EVALUATIONS.items():
        one = names.add_parser(name, help=meaning, description=meaning)
        one.add_argument("--json", type=Path, metavar="OUT", help="write the result as JSON to this file")
        if name in arguments[:1]:
            importlib.import_module(f"evals.{name}").add_arguments(one)
    args = parser.parse_args(arguments)
    try:
        report = importlib.import_module(f"evals.{args.name}").run(args)
    except (BatosError, OSError, ValueError) as error:
        print(f"evals: {error}", file=sys.stderr)
        return 2
    report.show()
    if args.json:
        report.write(args.json)
    return 1 if report.must_pass and report.passed < len(report.cases) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
