"""The process that atheris drives: bytes that it invents, for the decoder of the bridge.

`python -m evals.fuzzing.target CORPUS [options of libFuzzer]` ends with another status than 0 when an input
is neither a request nor refused. Imports `uvm` only inside of the instrumentation.
"""

from __future__ import annotations

import random
import sys

import atheris

with atheris.instrument_imports(include=["uvm"]):
    from evals.fuzzing.frames import mutated
    from uvm.messages import Rejected, Request, pack_error, parse_request


def decode(data: bytes) -> None:
    """Fails unless an input is a request or refused, and the refusal can be sent."""
    try:
        request = parse_request(data)
    except Rejected as rejected:
        pack_error(rejected.id, rejected.error)
    else:
        assert isinstance(request, Request)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Returns another input: half of them by libFuzzer, half with a part of the value replaced."""
    if seed % 2:
        return bytes(atheris.Mutate(data, most))
    return mutated(random.Random(seed), data)[:most]


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode, custom_mutator=mutate)
    atheris.Fuzz()
