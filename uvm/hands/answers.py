"""What a hand hands in, checked: frames become an `Outcome`, an `Audit` or an error of the tree.

The kernel trusts nothing that comes back: keys and types are exact, a hand can write only objects that it
was shown or made, and refer only to what it can reach. Kernel's side; no I/O here.
"""

from __future__ import annotations

from collections.abc import Set
from itertools import islice
from typing import Any

from uvm.capabilities import KINDS
from uvm.codec import REF, decode, exceeds, is_oid, references
from uvm.errors import (
    DoesNotUnderstand,
    GrantMissing,
    MalformedMessage,
    MethodRaised,
    ValueNotStorable,
    WriteSetRefused,
)
from uvm.guardian import Audit, Finding
from uvm.hands.calls import Created, Outcome, SlotChanges
from uvm.hands.frames import MAX_PRINTED
from uvm.hands.natives import MAX_NAME, is_public
from uvm.hands.shown import Shown

MAX_TEXT = 4000  # characters of an error's text, or of a line of its traceback
MAX_LINES = 50
# Bounds of one write set, far above what a method does by intent; its depth is bounded by the codec.
MAX_CREATED = 1000  # objects
MAX_WRITTEN = 10_000  # objects, created ones included
MAX_SLOTS = 100_000  # slots written, deleted or discarded, on all objects together
MAX_WRITE_BYTES = 8 << 20  # of the values of all slots written
MAX_VALUES = 250_000  # in the result and all slots together; each is walked several times on its way
MAX_MISSED_CALL = 64 << 10  # bytes of the arguments of a missed message; what is longer counts as unknown
MAX_DISCARDED = 20  # objects, and slots of each, that are told of those that the method did not keep
MAX_PARAMETERS = 100  # of a missed message
_REF_CODE = bytes([REF])  # without this byte there is no reference in encoded data


def returned(payload: Any, shown: Shown, seconds: float) -> Outcome:
    """Returns the outcome of a `returned` frame.

    Args:
        shown: what the hand may refer to and change.

    Raises:
        MalformedMessage: the payload is not what an honest hand sends.
        WriteSetRefused: the write set is over one of the bounds above.
    """
    result, writes, created, discarded, printed = _fields(
        payload, result=bytes, writes=dict, created=list, discarded=dict, printed=str
    )
    _demand(len(printed) <= MAX_PRINTED, "too much print")
    _demand(all(type(slots) is list for slots in discarded.values()), "no list of slots")
    sizes = [_size(changes) for changes in writes.values()]
    _bound("created objects", len(created), MAX_CREATED)
    _bound("written objects", len(writes) + len(discarded), MAX_WRITTEN)
    slots = sum(count for count, _ in sizes) + sum(map(len, discarded.values()))
    _bound("changed slots", slots, MAX_SLOTS)
    _bound("bytes of slots", sum(length for _, length in sizes), MAX_WRITE_BYTES)
    data = b"".join([result, *(value for assigned, _ in writes.values() for value in assigned.values())])
    if exceeds(data, MAX_VALUES):
        raise WriteSetRefused(
            f"one message may return and write at most {MAX_VALUES:,} values", bound="values", most=MAX_VALUES
        )
    made = _created(created, shown)
    new = {one.oid for one in made}
    for oid in writes.keys() - new:
        _demand(shown.may_change(oid), "a change of an object that it has no hold of")
    _demand(discarded.keys() <= shown.objects | new, "a change of an object that it was not shown")
    return Outcome(
        result=_value(result, shown, new),
        writes={oid: _changes(changes, shown, new) for oid, changes in writes.items()},
        created=made,
        discarded={
            oid: tuple(_names(slots)[:MAX_DISCARDED])
            for oid, slots in islice(discarded.items(), MAX_DISCARDED)
        },
        printed=printed,
        seconds=seconds,
    )


def raised(payload: Any, shown: Shown) -> MethodRaised | GrantMissing:
    """Returns the error of a `raised` frame."""
    grant = payload.pop("grant", None) if type(payload) is dict else None
    message, exception, traceback, selector = _fields(
        payload, message=str, exception=str, traceback=list, selector=str
    )
    lines = [line[:MAX_TEXT] for line in _texts(traceback)[:MAX_LINES]]
    if grant is not None:
        target, kind = _items(grant, str, str)
        _demand(target in shown.objects and kind in KINDS, "a grant of no kind is missing")
        return GrantMissing(
            message[:MAX_TEXT], target=target, grant=kind, traceback=lines, selector=selector[:MAX_NAME]
        )
    return MethodRaised(
        message[:MAX_TEXT],
        exception=exception[:MAX_NAME],
        traceback=lines,
        selector=selector[:MAX_NAME],
    )


def missed(payload: Any, shown: Shown) -> DoesNotUnderstand:
    """Returns the error of a `missed` frame; what is not known of the message is None."""
    message, target, selector, parameters, call = _fields(
        payload,
        message=str,
        target=str,
        selector=str,
        parameters=(list, type(None)),
        call=(bytes, type(None)),
    )
    known = shown.may_change(target) and is_public(selector)
    _demand(known, "a miss of no message to an object that it knows")
    names = [] if parameters is None else _names(parameters)
    usable = len(set(names)) == len(names) <= MAX_PARAMETERS and "self" not in names
    _demand(usable, "names that no parameters can have")
    told = call is not None and len(call) <= MAX_MISSED_CALL
    args, kwargs = _call(_value(call, shown, set())) if told else (None, None)
    return DoesNotUnderstand(
        message[:MAX_TEXT],
        target=target,
        selector=selector,
        args=args,
        kwargs=kwargs,
        parameters=parameters,
    )


def unstorable(payload: Any) -> ValueNotStorable:
    """Returns the error of an `unstorable` frame."""
    message, path, kind = _fields(payload, message=str, path=str, type=str)
    return ValueNotStorable(message[:MAX_TEXT], path=path[:MAX_TEXT], type=kind[:MAX_NAME])


def audited(payload: Any) -> Audit:
    """Returns the audit of an `audited` frame."""
    source, findings, parameters, doc = _fields(payload, source=str, findings=list, parameters=list, doc=str)
    return Audit(source, tuple(map(_finding, findings)), tuple(_texts(parameters)), doc)


def checked(payload: Any) -> dict[str, bool]:
    """Returns which layers of the sandbox hold, as a `checked` frame says."""
    _demand(type(payload) is dict and all(type(holds) is bool for holds in payload.values()), "no layers")
    return dict(payload)


def compiled(payload: Any, count: int) -> list[bytes | None]:
    """Returns the bytecode of `count` methods, as a `compiled` frame says."""
    _demand(type(payload) is list and len(payload) == count, "not as many methods as it was given")
    _demand(all(type(code) in (bytes, type(None)) for code in payload), "no bytecode")
    return list(payload)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MalformedMessage(otherwise)


def _fields(payload: Any, **kinds: type | tuple[type, ...]) -> list[Any]:
    """Returns the values of a map that has exactly these keys with exactly these types."""
    _demand(type(payload) is dict and payload.keys() == kinds.keys(), f"not a map of {', '.join(kinds)}")
    for key, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        _demand(type(payload[key]) in allowed, f"{key} is a {type(payload[key]).__name__}")
    return [payload[key] for key in kinds]


def _items(value: Any, *kinds: type) -> list[Any]:
    _demand(type(value) is list and [type(item) for item in value] == list(kinds), "not the expected items")
    return list(value)


def _texts(value: Any) -> list[str]:
    _demand(type(value) is list and all(type(item) is str for item in value), "not a list of texts")
    return list(value)


def _names(value: Any) -> list[str]:
    names = _texts(value)
    _demand(all(map(is_public, names)), "a name that no slot can have")
    return names


def _bound(what: str, count: int, most: int) -> None:
    if count > most:
        text = f"one message may have at most {most:,} {what}, not {count:,}"
        raise WriteSetRefused(text, bound=what, most=most)


def _size(changes: Any) -> tuple[int, int]:
    """Returns how many slots an object's changes touch, and the bytes of the values that they write."""
    assigned, deleted = _items(changes, dict, list)
    _demand(all(type(data) is bytes for data in assigned.values()), "a slot without a value")
    return len(assigned) + len(deleted), sum(map(len, assigned.values()))


def _value(data: bytes, shown: Shown, new: Set[str]) -> Any:
    """Returns a value whose references lead to what the hand can reach or has made."""
    value = decode(data)
    if _REF_CODE in data:
        known = all(oid in new or shown.reaches(oid) for oid in references(value))
        _demand(known, "a reference to an object that it can't reach")
    return value


def _created(rows: list[Any], shown: Shown) -> tuple[Created, ...]:
    made: dict[str, Created] = {}
    for number, row in enumerate(rows, 1):
        oid, name, parents = _items(row, str, str, list)
        _demand(oid == f"new:{number}" and is_public(name) and not is_oid(name), "an object of no name")
        held = all(parent in made or shown.may_change(parent) for parent in _texts(parents))
        _demand(bool(parents) and held, "parents that it has no hold of")
        made[oid] = Created(oid, name, tuple(parents))
    return tuple(made.values())


def _changes(value: Any, shown: Shown, new: Set[str]) -> SlotChanges:
    assigned, deleted = value
    names = _names([*assigned, *deleted])
    _demand(len(set(names)) == len(names), "a slot both written and deleted, or deleted twice")
    values = {slot: _value(data, shown, new) for slot, data in assigned.items()}
    return SlotChanges(values, tuple(deleted))


def _call(value: Any) -> list[Any]:
    args, kwargs = _items(value, list, dict)
    _demand(all(type(name) is str for name in kwargs), "a parameter without a name")
    return [args, kwargs]


def _finding(value: Any) -> Finding:
    return Finding(*_items(value, str, int, str, bool))
