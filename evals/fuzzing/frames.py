"""Frames for a kernel under test: valid requests, and what noise, mistakes and malice make of them.

Everything is drawn from a seeded `random.Random`, so that a run can be repeated.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from uvm import codec
from uvm.codec import Ref
from uvm.errors import BatosError
from uvm.messages import PROTOCOL_VERSION, Rejected, Request, parse_request

Frame = list[bytes]  # the parts of one multi-part message; nearly always one

MAX_BYTES = 1 << 16  # what the kernel under test accepts, encrypted
_ENCRYPTION = 100  # bytes that CURVE may add to a frame

# What may be carried out a million times without making the image larger.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("ping", {}),
    ("status", {}),
    ("missions", {"limit": 3}),
    ("mission", {"mission_id": "none"}),
    ("list_objects", {"prefix": "genesis", "limit": 5}),
    ("inspect", {"target_oid": "genesis_obj"}),
    ("method_history", {"target_oid": "genesis_obj", "selector": "nothing"}),
    ("send_message", {"target_oid": "genesis_obj", "selector": "note", "on_missing": "error"}),
    (
        "send_message",
        {"target_oid": "genesis_obj", "selector": "nothing", "args": [1], "on_missing": "error"},
    ),
    ("send_message", {"target_oid": "traits_obj", "selector": "selectors", "on_missing": "error"}),
]
# What else the decoder must know; a kernel never gets these.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("set_slot", {"target_oid": "genesis_obj", "slot": "note", "value": {"a": (1, {2.5}, Ref("0" * 16))}}),
    ("create_object", {"name": "an_obj", "parents": ["genesis_obj"], "slots": {"n": 1}}),
    ("undo", {"transaction_id": "0" * 16}),
    ("remember", {"text": "a text"}),
    ("recall", {"query": "a text", "k": 3}),
    ("delete_slot", {"target_oid": "genesis_obj", "slot": "note"}),
    ("revert_method", {"target_oid": "genesis_obj", "selector": "f", "version": 1}),
    ("cancel_mission", {"mission_id": "none"}),
    (
        "initiate_cognitive_cycle",
        {
            "target_oid": "genesis_obj",
            "mission_brief": {"selector": "f", "args": ["x"], "examples": [{"args": [1], "returns": 2}]},
            "wait": False,
        },
    ),
    ("send_message", {"target_oid": "0" * 16, "selector": "f", "as_of": dt.datetime(2024, 1, 1)}),
]
_ALLOWED = {command for command, _ in REQUESTS}
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, -(2**70), 10**400, 0.5, float("nan"), float("inf"), 1j, "", "a", "_x",
    10**5000, [10**5000],
    "\u00e4\udc80", "x" * 101, "\x00", "0" * 16, "class", b"", b"\xc1", [], [[]], {}, {"a": {}}, {1: 2}, (),
    (1,), {1, 2}, frozenset({"a"}), Decimal("1.1"), Fraction(1, 3), dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    dt.date(1, 1, 1), dt.timedelta(1), Ref("f" * 16), [1, {"a": [2, (3,)]}], "genesis_obj", "note",
]  # fmt: skip


def deep_in_extensions(extensions: int, lists: int) -> bytes:
    """Returns lists in extensions in lists …: unpacked each inside the other, they exhausted the stack."""
    payload = b"\x01"
    for _ in range(extensions):
        payload = b"\x91" * lists + payload
        payload = b"\xc9" + len(payload).to_bytes(4, "big") + b"\x03" + payload
    return b"\x91" + payload


_BOMBS = [
    deep_in_extensions(60, 900),
    b"\x91" * 3000,
    b"\x91" + b"\xc8\x03\xe8\x03" * 60,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff\xa1v",
    b"\xc6\xff\xff\xff\xff",
    b"\xdc\xf0\x00" + b"\x90" * 0xF000,
    codec.encode({n * 61 for n in range(200)})[:-1],
    codec.encode({2**n for n in range(2000)}),
    b"\xc7\x20\x0d\x92\x01\x00",
    b"\xc7\x0c\x0c1E+999999999",
]


def valid(number: int) -> bytes:
    """Returns request `number` of all commands, counted around."""
    requests = REQUESTS + OTHERS
    command, fields = requests[number % len(requests)]
    return codec.encode(_message(str(number), command, fields))


def wild(rng: random.Random, number: int) -> Frame:
    """Returns a frame that a kernel may be sent: it does not change the image and ends no kernel."""
    while True:
        kind = rng.choices(_KINDS, _WEIGHTS)[0]
        frame = kind(rng, number)
        if _is_harmless(frame):
            return frame


def expected(frame: Frame) -> tuple[str, str]:
    """Returns what must answer a frame: repr of the id and type of the error, "*" where it is carried out."""
    if len(frame) > 2 or (len(frame) == 2 and frame[0]):
        return repr(None), "MalformedMessage"
    try:
        return repr(parse_request(frame[-1]).id), "*"
    except Rejected as rejected:
        return repr(rejected.id), type(rejected.error).__name__


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Returns a message with one of its parts replaced; what is no message gets other bytes."""
    try:
        message = codec.decode(data)
        _replace(rng, message)
        return codec.encode(message)
    except BatosError:
        return _flip(rng, data)


def _message(request_id: Any, command: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"v": PROTOCOL_VERSION, "id": request_id, "command": command, **fields}


def _is_harmless(frame: Frame) -> bool:
    if any(len(part) > MAX_BYTES - _ENCRYPTION for part in frame):
        return False
    try:
        request: Request = parse_request(frame[-1])
    except Rejected:
        return True
    fields = request.command.model_dump()
    return fields["command"] in _ALLOWED and fields.get("on_missing") != "create"


def _request(rng: random.Random, number: int) -> bytes:
    command, fields = rng.choice(REQUESTS)
    return codec.encode(_message(number, command, fields))


def _whole(rng: random.Random, number: int) -> Frame:
    return [_request(rng, number)]


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _flipped(rng: random.Random, number: int) -> Frame:
    return [_flip(rng, _request(rng, number))]


def _cut(rng: random.Random, number: int) -> Frame:
    data = _request(rng, number)
    return [data[: rng.randrange(len(data))]]


def _extended(rng: random.Random, number: int) -> Frame:
    return [_request(rng, number) + rng.randbytes(rng.randint(1, 8))]


def _noise(rng: random.Random, number: int) -> Frame:
    return [rng.randbytes(rng.randint(0, 64))]


def _replaced(rng: random.Random, number: int) -> Frame:
    return [mutated(rng, _request(rng, number))]


def _version(rng: random.Random, number: int) -> Frame:
    return [codec.encode({**_message(number, "ping", {}), "v": rng.choice([0, 2, True, 1.0, "1", None, -1])})]


def _bomb(rng: random.Random, number: int) -> Frame:
    bomb, request = rng.choice(_BOMBS), _request(rng, number)
    return [bomb if rng.random() < 0.5 else request[:-1] + bomb]


def _parts(rng: random.Random, number: int) -> Frame:
    parts = [rng.choice([b"", b"x", rng.randbytes(5)]) for _ in range(rng.randint(1, 3))]
    return [*parts, _request(rng, number)]


def _replace(rng: random.Random, part: Any) -> None:
    """Replaces, removes or adds one part of a map or list, at any depth."""
    while type(part) in (dict, list) and part:
        key = rng.choice(list(part)) if type(part) is dict else rng.randrange(len(part))
        if type(part[key]) not in (dict, list) or not part[key] or rng.random() < 0.3:
            if rng.random() < 0.2:
                del part[key]
            elif rng.random() < 0.2 and type(part) is dict:
                part[rng.choice(["v", "id", "command", "args", "limit", "more"])] = rng.choice(_ODD)
            else:
                part[key] = rng.choice(_ODD)
            return
        part = part[key]


_KINDS: list[Callable[[random.Random, int], Frame]]
_KINDS = [_whole, _flipped, _cut, _extended, _noise, _replaced, _version, _bomb, _parts]
_WEIGHTS = [8, 24, 10, 6, 18, 22, 4, 4, 4]
