"""The result of an evaluation: its cases, a table of its figures, its JSON. Imports nothing of BAT OS."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Case:
    """One case of an evaluation.

    Attributes:
        seconds: how long it took.
        reason: why it failed; empty where it passed.
        details: what else is worth keeping; goes into the JSON beside the rest.
    """

    id: str
    passed: bool
    seconds: float
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """An evaluation's cases, and figures about all of them by their names.

    Attributes:
        must_pass: whether one case that does not pass is a fault, and no figure.
    """

    name: str
    cases: list[Case] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    must_pass: bool = False

    @property
    def passed(self) -> int:
        return sum(case.passed for case in self.cases)

    @property
    def rate(self) -> float:
        return self.passed / len(self.cases) if self.cases else 0.0

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases)

    def add(self, case: Case) -> None:
        """Adds a case and says how it went."""
        self.cases.append(case)
        mark = "ok  " if case.passed else "MISS"
        reason = f"  {case.reason}" if case.reason else ""
        print(f"{len(self.cases):4} {mark} {case.seconds:7.2f} s  {case.id}{reason}", flush=True)

    def show(self) -> None:
        """Prints the figures as a table."""
        table = Table(title=self.name, show_header=False)
        table.add_row("passed", f"{self.passed} of {len(self.cases)} ({self.rate:.1%})")
        table.add_row("seconds", f"{self.seconds:.1f}")
        for name, figure in self.summary.items():
            table.add_row(name, str(figure))
        Console().print(table)

    def write(self, path: Path) -> None:
        """Writes `{name, n, passed, rate, seconds, summary, cases}` as JSON."""
        told = {
            "name": self.name,
            "n": len(self.cases),
            "passed": self.passed,
            "rate": self.rate,
            "seconds": self.seconds,
            "summary": self.summary,
            "cases": [asdict(case) for case in self.cases],
        }
        path.write_text(json.dumps(told, ensure_ascii=False, indent=1, default=repr) + "\n", encoding="utf-8")
