"""What a bench measures, and how it is told: on the terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured.
        value: in `unit`.
        raw: the same by the tool underneath alone, where there is one.
        ratio: `value` to `raw`.
    """

    name: str
    value: float
    unit: str
    raw: float | None = None
    ratio: float | None = None

    def record(self) -> dict[str, Any]:
        """Returns the figure as plain data."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "raw": self.raw,
            "ratio": self.ratio,
        }


def beside(name: str, value: float, unit: str, raw: float) -> Figure:
    """Returns a figure with its raw limit and their ratio."""
    return Figure(name, value, unit, raw, value / raw)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the value below which `percent` of all lie, by the nearest rank.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def table(name: str, figures: Sequence[Figure]) -> str:
    """Returns a bench's figures as a table for the terminal."""
    rows = [("", "measured", "raw", "ratio")]
    rows += [
        (figure.name, f"{figure.value:.4g} {figure.unit}", _told(figure.raw), _told(figure.ratio))
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"  {first:<{widths[0]}}  "
        + "  ".join(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    ]
    return "\n".join([name, *lines])


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
