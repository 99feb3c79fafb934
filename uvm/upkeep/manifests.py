"""One backup as its manifest has it, and the list of a chain's parts that `repozo` would restore from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from uvm.disk import whole
from uvm.upkeep import files

STAMP = "%Y-%m-%d-%H-%M-%S"
_NEVER = 1e12  # Unix seconds that no clock shows


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
        sums: of the blob files: relative name -> SHA-256; of older manifests, none.
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
    sums: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def full(self) -> bool:
        return self.stamp == self.chain

    @property
    def file(self) -> str:
        """Name of its file in the folder."""
        return f"{self.stamp}.{'fs' if self.full else 'deltafs'}"

    def told(self) -> str:
        """Returns one line about it."""
        kind = "full" if self.full else f"incremental, {self.bytes - self.start} bytes new"
        blobs = f", {len(self.blobs)} blobs" * bool(self.blobs)
        return (
            f"{self.stamp} ({kind}): {self.bytes} bytes, {self.transactions} transactions, "
            f"{self.objects} objects{blobs}, verified"
        )


def read(path: Path) -> Backup | None:
    """Returns the backup of a manifest; None where it can't be read, or is none."""
    try:
        found = Backup(**(files.read_json(path) or {}))
    except TypeError:
        return None
    return found if _is_sound(found) else None


def _is_sound(backup: Backup) -> bool:
    """Returns whether each value is of its kind; a manifest may be damaged as any file may be."""
    texts = (backup.stamp, backup.chain, backup.md5, backup.transaction_id)
    numbers = (backup.start, backup.bytes, backup.transactions, backup.objects)
    return (
        all(type(text) is str for text in texts)
        and all(type(number) is int and number >= 0 for number in numbers)
        and type(backup.verified) in (int, float)
        and 0 <= backup.verified < _NEVER
        and _is_map(backup.blobs, int)
        and _is_map(backup.sums, str)
    )


def _is_map(value: object, kind: type) -> bool:
    """Returns whether names of blob files have values of one kind."""
    return isinstance(value, dict) and all(type(one) is kind for one in value.values())


def write_dat(folder: Path, chain: list[Backup]) -> None:
    """Writes the list of a chain's parts as repozo has it, so that repozo alone could restore them."""
    lines = [f"{one.file} {one.start} {one.bytes} {one.md5}\n" for one in chain]
    path = folder / f"{chain[0].stamp}.dat"
    with whole(path) as file:
        file.write("".join(lines).encode())
