"""The awakening: what a new image holds before anybody speaks to it. Layer 3.

All of it comes in one transaction; on an image that has it already nothing is written.
"""

from __future__ import annotations

from uvm.image.image import LivingImage
from uvm.image.prototypes import UvmObject
from uvm.image.txn import Txn
from uvm.memory.catalog import KnowledgeCatalog
from uvm.psm import OWN_PERSONA_SLOT

ROOT = "traits_obj"
GENESIS = "genesis_obj"
CATALOG = "knowledge_catalog_obj"
PERSONAS = ("ALFRED", "BRICK", "ROBIN", "BABS")


async def awaken(image: LivingImage) -> bool:
    """Creates the primordial objects where they are missing; returns whether it created any."""
    async with image.reading() as txn:
        if all(name in txn.names for name in primordial()):
            return False
    async with image.transaction("prototypal awakening") as txn:
        _create(txn)
    return True


def prototype_of(persona: str) -> str:
    """Returns the name of a persona's prototype."""
    return f"{persona.lower()}_prototype_obj"


def primordial() -> list[str]:
    """Returns the names of the objects that every image has."""
    return [ROOT, GENESIS, CATALOG, *map(prototype_of, PERSONAS)]


def _create(txn: Txn) -> None:
    root = txn.names.get(ROOT) or txn.create(ROOT, (), {})
    for name in primordial():
        if name not in txn.names:
            txn.create(name, (root,), {}, KnowledgeCatalog if name == CATALOG else UvmObject)
    for persona in PERSONAS:
        txn.names[prototype_of(persona)]._slots.setdefault(OWN_PERSONA_SLOT, persona)
