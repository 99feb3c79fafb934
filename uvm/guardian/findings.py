"""What an audit says: findings, each with a rule, a line and a sentence, and the audit that holds them.

The bottom of the guardian. Imports nothing of BAT OS: the guardian also runs in a hand.
"""

from __future__ import annotations

from dataclasses import dataclass


class TooComplex(Exception):
    """The analysis reached its limit of steps: the source is nested or tangled beyond reason."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the guardian has to say about a source.

    `line` counts from 1 in the submitted source. `message` is one sentence that a small model can act on.
    `mended` says that the guardian has put it right by itself.
    """

    rule: str
    line: int
    message: str
    mended: bool = False


@dataclass(frozen=True, slots=True)
class Audit:
    """The outcome of one audit.

    `source` is what may be installed: the submitted text, mended where a rule could mend it; where the audit
    is not `ok` it is the submitted text. `parameters` are the method's own, without `self`, a star kept
    (`*numbers`). `doc` is its docstring.
    """

    source: str
    findings: tuple[Finding, ...]
    parameters: tuple[str, ...]
    doc: str

    @property
    def ok(self) -> bool:
        """Whether nothing is left that the author would have to mend."""
        return all(finding.mended for finding in self.findings)
