"""The history of methods: every version is kept, told, and can be brought back. Layer 1."""

from __future__ import annotations

from typing import Any

from uvm.errors import MethodNotFound, SlotProtected
from uvm.image.grants import Grant
from uvm.image.prototypes import UvmMethod, UvmObject, is_data


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
    """Checks that a method of this name would hide no grant and replace no data.

    Raises:
        SlotProtected: it would.
    """
    own = target._slots.get(selector)
    if own is not None and is_data(own):
        raise SlotProtected(
            f"{target.label}.{selector} is a data slot; choose another selector", slot=selector
        )
    held = target.lookup(selector)
    if held is not None and isinstance(held[1], Grant):
        raise SlotProtected(f"{held[0].label}.{selector} is a grant; choose another selector", slot=selector)


def note_holder(target: UvmObject) -> None:
    """Notes that an object of the image holds a method or a grant, so that it is found without a walk."""
    if target._p_jar is not None:
        holders = target._p_jar.root()["holders"]
        if target.oid not in holders:
            holders.add(target.oid)


def install(target: UvmObject, method: UvmMethod) -> None:
    """Puts a method into its target; the version that it replaces becomes its history.

    Raises:
        SlotProtected: the method would hide a grant or replace data.
    """
    check_place(target, method.selector)
    note_holder(target)
    earlier = target._slots.get(method.selector)
    target._slots[method.selector] = earlier.succeed(method) if isinstance(earlier, UvmMethod) else method


def told(method: UvmMethod) -> dict[str, Any]:
    """Returns a method's current version as plain data, with its number, the oldest being 1."""
    transaction_id = method._p_serial.hex() if method._p_jar is not None else ""
    return {**method.record(), "version": len(method.versions) + 1, "transaction_id": transaction_id}


def versions(method: UvmMethod) -> list[dict[str, Any]]:
    """Returns all versions, the oldest first, each with its number."""
    earlier = [{**record, "version": number} for number, record in enumerate(method.versions, 1)]
    return [*earlier, told(method)]


def revert(target: UvmObject, selector: str, version: int | None) -> UvmMethod:
    """Installs an earlier version again, as a new one; None takes the version before the current.

    Raises:
        MethodNotFound: there is no such method or no such version.
    """
    method = own_method(target, selector)
    wanted = len(method.versions) if version is None else version
    if not 1 <= wanted <= len(method.versions):
        raise MethodNotFound(
            f"{target.label}.{selector} has no earlier version {wanted}",
            target=target.label,
            selector=selector,
            versions=len(method.versions) + 1,
        )
    record = dict(method.versions[wanted - 1])
    record.pop("sha256")
    record["provenance"] = {**record["provenance"], "reverted_from": len(method.versions) + 1}
    again = UvmMethod(**record)
    install(target, again)
    return again
