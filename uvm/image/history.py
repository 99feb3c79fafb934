"""The history of methods: every version is kept, told, and can be brought back. Layer 1."""

from __future__ import annotations

import difflib
import time
from itertools import pairwise
from typing import Any

from uvm.errors import MethodNotFound, SlotProtected
from uvm.image import values
from uvm.image.grants import Grant
from uvm.image.prototypes import UvmMethod, UvmObject, is_data
from uvm.image.txn import Txn

MAX_DIFF_LINES = 400
MAX_COMPARED_LINES = 2000  # of one version; comparing takes the square of it at worst


def own_method(target: UvmObject, selector: str) -> UvmMethod:
    """Returns the method that `target` itself holds.

    Raises:
        MethodNotFound: it holds none of this selector.
    """
    method = target._slots.get(selector)
    if not isinstance(method, UvmMethod):
        raise MethodNotFound(
            f"{target.label} has no method {selector!r} of its own", target=target.label, selector=selector
        )
    return method


def check_place(target: UvmObject, selector: str) -> None:
    """Checks that a method of this name hides no grant and replaces no data.

    Raises:
        SlotProtected: it would.
    """
    own = target._slots.get(selector)
    if own is not None and is_data(own):
        raise SlotProtected(
            f"{target.label}.{selector} is a data slot; choose another selector", slot=selector
        )
    for owner in target.chain():
        if isinstance(owner._slots.get(selector), Grant):
            raise SlotProtected(
                f"{owner.label}.{selector} is a grant; choose another selector", slot=selector
            )


def note_holder(txn: Txn, target: UvmObject) -> None:
    """Notes that an object holds a method or a grant, so that it is found without a walk."""
    holders = txn.root["holders"]
    if target.oid not in holders:
        holders.add(target.oid)


def installed(target: UvmObject, selector: str) -> str:
    """Returns what differs once the method that `target` itself holds is another: its transaction, or ""."""
    method = target._slots.get(selector)
    return method.transaction_id if isinstance(method, UvmMethod) else ""


def install(txn: Txn, target: UvmObject, method: UvmMethod) -> None:
    """Puts a method into its target; the version that it replaces becomes its history.

    Its trials refer to objects as slots do: what a method was tried with stays, and a record names no `Ref`.

    Raises:
        SlotProtected: the method would hide a grant or replace data.
    """
    check_place(target, method.selector)
    note_holder(txn, target)
    method.trials = txn.storable(method.trials)
    earlier = target._slots.get(method.selector)
    target._slots[method.selector] = earlier.succeed(method) if isinstance(earlier, UvmMethod) else method


def told(method: UvmMethod) -> dict[str, Any]:
    """Returns a method's current version as plain data, with its number, the oldest being 1."""
    return {
        **_plain(method.record()),
        "version": method.version,
        "transaction_id": method.transaction_id,
    }


def trials(method: UvmMethod) -> list[dict[str, Any]]:
    """Returns the trials that a method passed, as plain data."""
    return list(values.to_plain(method.trials))


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "trials": values.to_plain(record["trials"])}


def versions(method: UvmMethod) -> list[dict[str, Any]]:
    """Returns all versions, the oldest first: as `told`, with who, when, why, and what differs."""
    rows = [{**_plain(row), **_origin(row["provenance"])} for row in method.lineage()]
    diffs = ["", *(diff(one, other) for one, other in pairwise(rows))]
    return [{**row, "diff": text} for row, text in zip(rows, diffs, strict=True)]


def _origin(provenance: dict[str, Any]) -> dict[str, Any]:
    """Returns what every version tells of itself at once: who, when, why, by which model."""
    reverted = provenance.get("reverted_from")
    why = provenance.get("description") or f"mission {provenance.get('mission_id', 'unknown')}"
    if reverted is not None:
        why = f"version {provenance.get('reverted_to', 'unknown')} again"
    return {
        "user": provenance.get("reverted_by" if reverted is not None else "origin"),
        "created": provenance.get("reverted" if reverted is not None else "created"),
        "reason": why,
        "model": provenance.get("model"),
        "model_sha256": provenance.get("model_sha256"),
        "reverted_from": reverted,
        "reverted_to": provenance.get("reverted_to"),
    }


def diff(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Returns the unified diff of two versions' sources, cut to `MAX_DIFF_LINES` lines."""
    sources = [row["source"].splitlines() for row in (one, other)]
    if max(map(len, sources)) > MAX_COMPARED_LINES:
        return f"(more than {MAX_COMPARED_LINES} lines: not compared)"
    names = [f"version {row['version']}" for row in (one, other)]
    lines = list(difflib.unified_diff(sources[0], sources[1], names[0], names[1], lineterm=""))
    left = len(lines) - MAX_DIFF_LINES
    return "\n".join([*lines[:MAX_DIFF_LINES], *([f"({left} more lines)"] if left > 0 else [])])


def earlier(target: UvmObject, selector: str, version: int | None) -> tuple[int, UvmMethod]:
    """Returns an earlier version as a method that can be installed again, and its number.

    Args:
        version: its number; None takes the version before the current one.

    Raises:
        MethodNotFound: there is no such method or no such version.
    """
    method = own_method(target, selector)
    current = method.version
    wanted = current - 1 if version is None else version
    if not 1 <= wanted < current:
        name = f"{target.label}.{selector}"
        reason = f"{name} is at version {current} already" if wanted == current else None
        reason = reason or (f"{name} has {current} versions" if version else f"{name} has no earlier version")
        raise MethodNotFound(reason, target=target.label, selector=selector, versions=current)
    record = method.lineage()[wanted - 1]
    for name in ("sha256", "transaction_id", "version"):
        del record[name]
    return wanted, UvmMethod(**record)


def revert(txn: Txn, target: UvmObject, selector: str, version: int | None, user: str) -> UvmMethod:
    """Installs an earlier version again, as a new one, which says who did it and when.

    Raises:
        MethodNotFound: there is no such method or no such version.
        SlotProtected: its place has been taken by a grant since.
    """
    wanted, again = earlier(target, selector, version)
    again.provenance = {
        **again.provenance,
        "reverted_from": own_method(target, selector).version,
        "reverted_to": wanted,
        "reverted_by": user,
        "reverted": time.time(),
    }
    install(txn, target, again)
    return again
