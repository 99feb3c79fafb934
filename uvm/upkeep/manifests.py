"""One backup as its manifest has it, and the list of a chain's parts that `repozo` would restore from."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import dataclass, field
from pathlib import Path

from uvm.upkeep import files

STAMP = "%Y-%m-%d-%H-%M-%S"


@dataclass(frozen=True)
class Backup:
    """One verified backup, as its manifest has it.

    Attributes:
        stamp: when it was begun, UTC, as in the names of its files.
        chain: stamp of the full backup that it builds on; its own where it is one.
        start: offset in the image at which its file begins.
        bytes: size of the image that it restores, without blobs.
        md5: of its file.
        transaction_id: the last transaction in it.
        blobs: the blob files that belong to it: relative name -> size in bytes.
        verified: Unix seconds of the last time that a restored copy of it was verified.
    """

    stamp: str
    chain: str
    start: int
    bytes: int
    md5: str
    transaction_id: str
    transactions: int
    objects: int
    blobs: dict[str, int] = field(repr=False)
    verified: float

    @property
    def full(self) -> bool:
        return self.stamp == self.chain

    @property
    def file(self) -> str:
        """Name of its file in the folder."""
        return f"{self.stamp}.{'fs' if self.full else 'deltafs'}"

    @property
    def made(self) -> float:
        """Unix seconds."""
        return dt.datetime.strptime(self.stamp, STAMP).replace(tzinfo=dt.UTC).timestamp()

    def told(self) -> str:
        """Returns one line about it."""
        kind = "full" if self.full else f"incremental, {self.bytes - self.start} bytes new"
        blobs = f", {len(self.blobs)} blobs" * bool(self.blobs)
        return (
            f"{self.stamp} ({kind}): {self.bytes} bytes, {self.transactions} transactions, "
            f"{self.objects} objects{blobs}, verified"
        )


def read(path: Path) -> Backup | None:
    """Returns the backup of a manifest; None where it can't be read."""
    try:
        return Backup(**(files.read_json(path) or {}))
    except TypeError:
        return None


def write_dat(folder: Path, chain: list[Backup]) -> None:
    """Writes the list of a chain's parts as repozo has it, so that repozo alone could restore them."""
    lines = [f"{one.file} {one.start} {one.bytes} {one.md5}\n" for one in chain]
    path = folder / f"{chain[0].stamp}.dat"
    part = path.with_name(path.name + files.PART)
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)
