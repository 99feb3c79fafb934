"""From older schemas of the image to the newest: every step that is missing, in one transaction.

A kill in the middle leaves the older schema whole. A newer schema than this kernel knows is refused. Layer 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from BTrees.OOBTree import OOTreeSet

from uvm.errors import ImageDamaged
from uvm.image.allowed import foundations

_BREATH = 1_000  # objects between two looks at the memory
_BATCH = 50_000  # changes that are kept in memory before they go to a temporary file

Step = Callable[[Any], None]


def _find_holders(connection: Any) -> None:
    """1 -> 2: `holders`, the oids of the objects that hold a method or a grant."""
    root = connection.root()
    holders = root["holders"] = OOTreeSet()
    for number, found in enumerate(root["names"].values(), 1):
        if found.methods() or found.grants():
            holders.add(found.oid)
        if number % _BREATH == 0:
            connection.cacheGC()
        if number % _BATCH == 0:
            connection.transaction_manager.savepoint(optimistic=True)


STEPS: dict[int, Step] = {1: _find_holders}
SCHEMA = max(STEPS) + 1


def migrate(database: Any) -> str:
    """Lays the foundations of a new image, or brings an older one to the newest schema.

    Returns:
        What was done, as the note of its transaction; empty where there was nothing to do.

    Raises:
        ImageDamaged: the schema is newer than this kernel, or is none.
    """
    with database.transaction() as connection:
        schema = connection.root().get("schema")
    if schema is None:
        note = "foundations of a new image"
        with database.transaction(note) as connection:
            connection.root().update(foundations(), schema=SCHEMA)
        return note
    if schema == SCHEMA:
        return ""
    if type(schema) is not int or schema not in STEPS:
        raise ImageDamaged(
            f"the image has schema {schema!r:.40}, this kernel knows {SCHEMA}; use a newer kernel",
            schema=str(schema),
        )
    note = f"schema {schema} -> {SCHEMA}"
    with database.transaction(note) as connection:
        for older in range(schema, SCHEMA):
            STEPS[older](connection)
        connection.root()["schema"] = SCHEMA
    return note
