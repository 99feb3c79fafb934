"""Large images for tests and benches: `python -m bench.images PATH OBJECTS`.

Written through ZODB itself, so that the file is what a kernel would have written: named objects with a few
slots each, parents among them, some with a method, in transactions of many.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from uvm.image.defused import defuse
from uvm.image.loading import Database
from uvm.image.migrations import migrate
from uvm.image.prototypes import UvmMethod, UvmObject
from uvm.image.recovery import preflight
from uvm.image.storage import ImageStorage

BATCH = 10_000
EVERY = 100  # one object in so many has a method of its own
_SOURCE = "def total(self):\n    return self.price * self.count\n"


def name_of(number: int) -> str:
    """Returns the name of an object of a large image, which is also its place among the names."""
    return f"part_{number:09}"


def populate(path: Path, objects: int) -> None:
    """Writes an image of `objects` named objects at `path`, with its index.

    Raises:
        FileExistsError: there is a file already.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already")
    defuse()
    storage = ImageStorage(path, path.with_name(path.name + ".blob"), lambda file: preflight(file, print))
    database = Database(storage, cache_size=2 * BATCH)
    try:
        migrate(database)
        for first in range(0, objects, BATCH):
            _write(database, range(first, min(first + BATCH, objects)))
    finally:
        database.close()


def _write(database: Any, numbers: range) -> None:
    with database.transaction(f"objects {numbers.start} to {numbers.stop - 1}") as connection:
        names = connection.root()["names"]
        family = UvmObject(f"family_{numbers.start:09}", (), {"colour": "blue", "currency": "EUR"})
        connection.add(family)
        names[family.name] = family
        for number in numbers:
            slots = {
                "price": number % 997,
                "count": number % 13,
                "note": f"Part number {number}, as delivered",
            }
            made = UvmObject(name_of(number), (family,), slots)
            connection.add(made)
            names[made.name] = made
            if number % EVERY == 0:
                told = {"mission_id": "0" * 16, "model": "none"}
                made.total = UvmMethod("total", (), _SOURCE, "What they cost together.", told, [])
                connection.root()["holders"].add(made.oid)


def main(arguments: list[str]) -> int:
    """Writes an image and says how long it took."""
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("objects", type=int)
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    populate(options.path, options.objects)
    size = options.path.stat().st_size / (1 << 20)
    print(f"{options.objects:,} objects, {size:,.0f} MiB, {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
