"""`python -m bench [NAME…] [--json OUT]`: runs the benches named, or all, one after the other."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.figures import Figure, table
from uvm.errors import BatosError

# Each module has a coroutine `run() -> list[Figure]`, and is imported when it is asked for.
BENCHES = {
    "dispatch": "bench.dispatch",
    "image": "bench.image",
    "mind": "bench.mind",
}


def main(arguments: list[str]) -> int:
    """Runs the benches; returns 1 if one could not be run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)}; none is all of them")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write {name, figures: [{name, value, unit, raw, ratio}]} there; of several benches, a list",
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHES]:
        parser.error(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    names = list(dict.fromkeys(options.names)) or list(BENCHES)
    try:
        results = [_result(name) for name in names]
    except BatosError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        told = results[0] if len(results) == 1 else results
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


def _result(name: str) -> dict[str, Any]:
    figures: list[Figure] = asyncio.run(import_module(BENCHES[name]).run())
    print(table(name, figures), flush=True)
    return {"name": name, "figures": [figure.record() for figure in figures]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
