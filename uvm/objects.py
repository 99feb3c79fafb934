"""What the Architect does to objects directly: look, list, create, and change data. Layer 3.

Code never enters here: a data slot may not hide a method, a native or a grant.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from uvm.errors import SlotNotFound, SlotProtected
from uvm.hands.natives import NATIVES, RESERVED
from uvm.image import history
from uvm.image.grants import Grant
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmObject, is_data
from uvm.image.txn import Txn
from uvm.messenger import selectors

USER = "architect"
_BREATH = 100  # objects between two looks at the memory


class Objects:
    """The objects of one image, as commands see them; each verb is one unit of work."""

    def __init__(self, image: LivingImage, root: str) -> None:
        self._image = image
        self._root = root

    async def inspect(self, target: str, as_of: dt.datetime | str | None) -> dict[str, Any]:
        """Returns an object's slots, parents, methods with source and provenance, grants, and messages."""
        async with self._image.reading(as_of) as txn:
            found = txn.find(target)
            return {
                "name": found.name,
                "oid": found.oid,
                "parents": [parent.label for parent in found.parents],
                "slots": txn.plain(found.data()),
                "methods": {name: history.told(method) for name, method in found.methods().items()},
                "grants": {slot: grant.record() for slot, grant in found.grants().items()},
                "understands": selectors(found),
            }

    async def listed(
        self, prefix: str, limit: int, after: str | None, as_of: dt.datetime | str | None
    ) -> list[dict[str, Any]]:
        """Returns up to `limit` named objects after `after`, by name: `{name, oid, selectors}`."""
        start = max(after or "", prefix)
        rows: list[dict[str, Any]] = []
        async with self._image.reading(as_of) as txn:
            for name, found in txn.names.items(min=start, excludemin=start == after):
                if len(rows) == limit or not name.startswith(prefix):
                    break
                methods = {key: [*method.parameters] for key, method in found.methods().items()}
                rows.append({"name": name, "oid": found.oid, "selectors": methods})
                if len(rows) % _BREATH == 0:
                    txn.trim_cache()
        return rows

    async def create(self, name: str, parents: list[str] | None, slots: dict[str, Any]) -> str:
        """Creates an object and returns its oid; without parents it delegates to the root."""

        def unit(txn: Txn) -> str:
            found = tuple(txn.find(parent) for parent in parents or [self._root])
            for slot in slots:
                check_is_data(slot, found)
            return txn.create(name, found, txn.storable(slots)).oid

        return await self._image.attempt(f"create_object {name}", unit, user=USER)

    async def set_slot(self, target: str, slot: str, value: Any) -> None:
        """Writes a data slot."""

        def unit(txn: Txn) -> None:
            found = txn.find(target)
            check_is_data(slot, (found,))
            found._slots[slot] = txn.storable(value)

        await self._image.attempt(f"set_slot {target} {slot}", unit, user=USER)

    async def delete_slot(self, target: str, slot: str) -> None:
        """Deletes a data slot that the object itself holds."""

        def unit(txn: Txn) -> None:
            found = txn.find(target)
            check_is_data(slot, (found,))
            if slot not in found._slots:
                raise SlotNotFound(f"{found.label} has no slot {slot!r} of its own", slot=slot)
            del found._slots[slot]

        await self._image.attempt(f"delete_slot {target} {slot}", unit, user=USER)


def check_is_data(slot: str, holders: tuple[UvmObject, ...]) -> None:
    """Checks that a data slot of this name would hide nothing but data.

    Raises:
        SlotProtected: it would hide a method, a native or a grant, or what an object delegates to.
    """
    if slot in RESERVED:
        raise SlotProtected(f"{slot!r} is what it delegates to", slot=slot)
    if slot in NATIVES:
        raise SlotProtected(f"{slot!r} is a method of every object; choose another slot", slot=slot)
    for holder in holders:
        held = holder.lookup(slot)
        if held is not None and not is_data(held[1]):
            is_grant = isinstance(held[1], Grant)
            reason = "is a grant; revoke it first" if is_grant else "is a method; teach a revision instead"
            raise SlotProtected(f"{held[0].label}.{slot} {reason}", slot=slot)
