"""What a torture run's clients were told: each writes down what it sent, and what was acknowledged.

The books live in the harness, which nobody kills; `evals.torture.wire` and `evals.torture.image` hold
the kernel and its image against them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Taught:
    """A mission that was acknowledged by its id.

    Attributes:
        edition: which edition of the method it asks for; 1 is the first.
        complete: whether the client was told that it is complete.
        cancelled: whether the client was told that it is cancelled.
    """

    target: str
    selector: str
    edition: int
    complete: bool = False
    cancelled: bool = False


@dataclass
class Slot:
    """A data slot: its last acknowledged value, and the one whose writing was never acknowledged."""

    acknowledged: int | None = None
    doubtful: int | None = None

    @property
    def possible(self) -> set[int | None]:
        """The values that it may have now; None stands for no slot."""
        return {self.acknowledged, self.doubtful} - ({None} if self.acknowledged is not None else set())


@dataclass
class Book:
    """What one client sent and what was acknowledged.

    Attributes:
        missions: mission id -> what it teaches.
        known: target, selector -> the highest edition that the client was told is installed.
        missed: selectors that were sent without being taught, some of them more than once.
        entries: numbers sent to the ledger; `acknowledged` those that were answered.
        objects: name -> mark, of objects to be made; `made` name -> oid of those acknowledged.
        done: operation -> how many were acknowledged.
        errors: type of error -> how many; `unexpected` the texts of those that may not come.
        broken: what a read showed to be wrong while the run went on.
    """

    name: str
    missions: dict[str, Taught] = field(default_factory=dict)
    known: dict[tuple[str, str], int] = field(default_factory=dict)
    missed: set[str] = field(default_factory=set)
    entries: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    slots: dict[str, Slot] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> str:
        """The object with the client's entries and their count."""
        return f"ledger_{self.name}_obj"

    @property
    def store(self) -> str:
        """The object whose slots the client sets."""
        return f"store_{self.name}_obj"

    @property
    def pupil(self) -> str:
        """The object that the client teaches."""
        return f"pupil_{self.name}_obj"
