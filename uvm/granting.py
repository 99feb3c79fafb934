"""What the Architect lets objects use of the world: grants are given, taken back, and told. Layer 3.

A grant is a slot: the image keeps it, children inherit it, it can be undone. Only these verbs write it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from uvm.errors import ObjectNotFound, SlotNotFound, SlotProtected
from uvm.grant_options import FilesOptions, HttpOptions, NoOptions
from uvm.hands.natives import NATIVES, RESERVED
from uvm.image import history
from uvm.image.grants import Grant
from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmObject
from uvm.image.txn import Txn
from uvm.objects import USER

_BREATH = 200  # objects looked through before others get their turn


class Granting:
    """The grants of one image; each verb is one unit of work.

    Args:
        settled: checks the options of a new grant and returns them as they are kept.
    """

    def __init__(
        self, image: LivingImage, settled: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> None:
        self._image = image
        self._settled = settled

    async def grant(
        self, target: str, slot: str, options: FilesOptions | HttpOptions | NoOptions
    ) -> dict[str, Any]:
        """Grants, in place of what was granted in this slot before; returns the grant as it is listed.

        Raises:
            SlotProtected: the slot holds something else.
            InvalidField: what is to be granted is not there, or belongs to BAT OS itself.
        """
        chosen = await self._settled(options.model_dump(exclude={"kind"}))

        def unit(txn: Txn) -> dict[str, Any]:
            found = txn.find(target)
            check_is_grant(slot, found)
            grant = found._slots[slot] = Grant(options.kind, chosen)
            history.note_holder(txn, found)
            return _told(found, slot, grant)

        return await self._image.attempt(f"grant {target} {slot} {options.kind}", unit, user=USER)

    async def revoke(self, target: str, slot: str) -> None:
        """Takes a grant back that the object itself holds; what is running can't use it any more.

        Raises:
            SlotNotFound: it holds none there.
        """

        def unit(txn: Txn) -> None:
            found = txn.find(target)
            if slot not in found.grants():
                holders = [held[0].label for name, held in found.grants_in_reach().items() if name == slot]
                hint = f"; {holders[0]} holds it" if holders else ""
                raise SlotNotFound(f"{found.label} has no grant {slot!r} of its own{hint}", slot=slot)
            del found._slots[slot]

        await self._image.attempt(f"revoke {target} {slot}", unit, user=USER)

    async def listed(self, target: str | None) -> list[dict[str, Any]]:
        """Returns an object's grants, or all: `{object, oid, slot, kind, options, granted}`."""
        async with self._image.reading() as txn:
            if target is not None:
                held = txn.find(target).grants_in_reach()
                return [_told(owner, slot, grant) for slot, (owner, grant) in sorted(held.items())]
            rows = []
            for number, oid in enumerate(txn.root["holders"]):
                if number % _BREATH == 0:
                    await asyncio.sleep(0)
                    txn.trim_cache()
                with suppress(ObjectNotFound):  # whose making was undone
                    found = txn.find(oid)
                    rows += [_told(found, slot, grant) for slot, grant in found.grants().items()]
            return sorted(rows, key=lambda row: (row["object"], row["slot"]))


def check_is_grant(slot: str, target: UvmObject) -> None:
    """Checks that a grant of this name would hide nothing but grants.

    Raises:
        SlotProtected: it would hide data, a method or a native, or what an object delegates to.
    """
    held = target.lookup(slot)
    taken = slot in NATIVES or slot in RESERVED
    if taken or (held is not None and not isinstance(held[1], Grant)):
        raise SlotProtected(f"{slot!r} of {target.label} is no grant; choose another slot for it", slot=slot)


def _told(owner: UvmObject, slot: str, grant: Grant) -> dict[str, Any]:
    return {"object": owner.label, "oid": owner.oid, "slot": slot, **grant.record()}
