"""Trials: a candidate method on the real objects, its writes discarded.

What the user showed decides: his examples, and the call that was not understood. A sample call that a model
made up only shows whether the code runs at all. Layer 3, used by the PSM alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uvm import codec, prompts
from uvm.errors import (
    BatosError,
    DoesNotUnderstand,
    GrantMissing,
    HandTimeout,
    MethodRaised,
    RetryLater,
    ValueNotStorable,
)
from uvm.guardian import Finding
from uvm.hands.calls import Outcome
from uvm.image import history
from uvm.image.prototypes import UvmObject
from uvm.image.txn import Txn
from uvm.messages import Example, MissionBrief
from uvm.messenger import Messenger, lost_in_storage

# What a made-up call may legitimately provoke: the values, not the code, may be at fault.
_TOLERATED = frozenset(
    {"TypeError", "ValueError", "KeyError", "IndexError", "ZeroDivisionError", "OverflowError"}
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One call of a candidate, and what must come of it; `origin` is example, call, sample or history."""

    args: list[Any]
    kwargs: dict[str, Any]
    origin: str
    example: Example | None = None

    @classmethod
    def of(cls, stored: dict[str, Any], origin: str) -> Trial:
        """Returns a trial as a method keeps it; without an outcome it only must not raise."""
        fields = {name: value for name, value in stored.items() if name != "origin"}
        shown = Example(**fields) if "returns" in stored or "raises" in stored else None
        return cls(stored["args"], stored["kwargs"], origin, shown)

    def stored(self) -> dict[str, Any]:
        """Returns the trial as a method keeps it."""
        record = {"args": self.args, "kwargs": self.kwargs, "origin": self.origin}
        if self.example is not None:
            outcome = "raises" if self.example.raises else "returns"
            record[outcome] = getattr(self.example, outcome)
        return record


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a trial: the findings, empty where it passed; a stale one counts neither way."""

    trial: Trial
    told: str
    findings: list[Finding]
    stale: bool = False

    def outdated(self) -> Verdict:
        """Returns the verdict of a trial that the world has overtaken."""
        return Verdict(self.trial, f"{self.told} (as before)", [], stale=True)

    def record(self) -> dict[str, Any]:
        """Returns the verdict as the log keeps it."""
        call = prompts.arguments(self.trial.args, self.trial.kwargs)
        return {"origin": self.trial.origin, "call": call, "outcome": self.told, "passed": not self.findings}


def trials_of(brief: MissionBrief, sample_args: list[Any] | None, target: UvmObject) -> list[Trial]:
    """Returns a mission's trials: examples, the missed call, a sample; in a revision the old examples."""
    trials = [Trial(example.args, example.kwargs, "example", example) for example in brief.examples]
    call = brief.call()
    if call is not None:
        trials.append(Trial(*call, "call"))
    if not trials and brief.arity() == 0:
        trials.append(Trial([], {}, "sample"))
    if not trials and sample_args is not None:
        trials.append(Trial(sample_args, {}, "sample"))
    return trials + (_remembered(brief, target) if brief.type == "revision" else [])


def _remembered(brief: MissionBrief, target: UvmObject) -> list[Trial]:
    """Returns the examples that the replaced method had to satisfy and the brief does not restate."""
    restated = [(example.args, example.kwargs) for example in brief.examples]
    stored = history.trials(history.own_method(target, brief.selector))
    return [
        Trial.of(trial, "history")
        for trial in stored
        if trial["origin"] in ("example", "history") and (trial["args"], trial["kwargs"]) not in restated
    ]


class TrialRunner:
    """Runs trials in hands."""

    def __init__(self, messenger: Messenger) -> None:
        self._messenger = messenger

    async def run(
        self, txn: Txn, target: UvmObject, selector: str, source: str | None, trial: Trial
    ) -> Verdict:
        """Returns the verdict of one trial; `txn` is left as it was.

        Args:
            source: of a candidate, which shadows what is installed; None tries the method that is installed.

        Raises:
            RetryLater: it can't be tried now.
        """
        overlay = None if source is None else {selector: source}
        call = f"self.{selector}({prompts.arguments(trial.args, trial.kwargs)})"
        try:
            outcome = await self._messenger.run(
                txn, target, selector, trial.args, trial.kwargs, overlay=overlay
            )
            lost = lost_in_storage(txn, outcome)
        except RetryLater:  # says nothing of the method: no memory, no hand
            raise
        except BatosError as error:
            return self._failed(trial, call, error)
        findings = [Finding("persistence", 1, f"{place} was not stored as written.") for place in lost]
        return Verdict(
            trial, f"returned {prompts.short(outcome.result)}", findings + _expected(trial, call, outcome)
        )

    def _failed(self, trial: Trial, call: str, error: BatosError) -> Verdict:
        told = f"{type(error).__name__}: {error}"
        raised = error.details.get("exception") if isinstance(error, MethodRaised) else None
        expected = trial.example.raises if trial.example else None
        if expected is not None and raised == expected:
            return Verdict(trial, told, [])
        if trial.origin == "sample" and raised in _TOLERATED:
            return Verdict(trial, told, [])
        return Verdict(trial, told, [Finding("trial", 1, _explained(call, error, expected))])


def _explained(call: str, error: BatosError, expected: str | None) -> str:
    """Returns one sentence that a model can act on."""
    wanted = f" instead of raising {expected}" if expected else ""
    if isinstance(error, DoesNotUnderstand):
        return (
            f"{call}: there is no method self.{error.selector}; do that work inside this method, "
            f"with a nested function if need be."
        )
    if isinstance(error, GrantMissing):
        return f"{call} uses self.{error.details['grant']}, which it may not: {error}. Do without it."
    if isinstance(error, HandTimeout):
        return f"{call} did not end in time{wanted}; make sure that every loop and recursion ends."
    if isinstance(error, ValueNotStorable):
        return f"{call}: {error}{wanted}"
    where = error.details.get("traceback") or []
    line = f" at: {where[-1]}" if where else ""
    return f"{call} failed: {error}{line}{wanted}"[:500]


def _expected(trial: Trial, call: str, outcome: Outcome) -> list[Finding]:
    if trial.example is None:
        return []
    if trial.example.raises is not None:
        message = (
            f"{call} must raise {trial.example.raises}, but it returned {prompts.short(outcome.result)}."
        )
        return [Finding("example", 1, message)]
    if codec.matches(trial.example.returns, outcome.result):
        return []
    wanted, got = trial.example.returns, outcome.result
    kinds = (
        f" (a {type(got).__name__}, not a {type(wanted).__name__})" if type(wanted) is not type(got) else ""
    )
    message = (
        f"{call} must return {prompts.short(wanted, 300)}, but it returned {prompts.short(got, 300)}{kinds}."
    )
    return [Finding("example", 1, message)]
