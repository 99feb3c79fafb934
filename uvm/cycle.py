"""One cognitive cycle's knowledge: what the state machine has found out so far, and what it makes of it.

Plain data without behaviour of its own but to tell itself: as a mission's outcome, as a method with its
provenance, as a memory. Layer 3, filled by `uvm.psm`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from uvm.errors import RetryLater, to_wire
from uvm.guardian import Finding
from uvm.image.prototypes import UvmMethod
from uvm.memory.catalog import Hit
from uvm.memory.fractal import method_text
from uvm.messages import MissionBrief
from uvm.mind.backends import Message
from uvm.mind.mind import Reply
from uvm.pressure import exhausted
from uvm.states import State
from uvm.trials import Trial


@dataclass(slots=True)
class Cycle:
    """One run of the state machine for one mission: what it knows so far."""

    id: str
    mission_id: str
    target: str
    brief: MissionBrief
    origin: str
    state: State = State.IDLE
    started: float = field(default_factory=time.monotonic)
    persona: str = ""
    queries: list[str] = field(default_factory=list)
    sample_args: list[Any] | None = None
    memories: list[Hit] = field(default_factory=list)
    conversation: list[Message] = field(default_factory=list)
    reply: Reply | None = None
    source: str = ""
    parameters: tuple[str, ...] = ()
    doc: str = ""
    trials: list[Trial] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    attempts: int = 0
    tokens: int = 0
    base: str = ""  # the version that the trials saw, as `history.installed` tells it
    transaction_id: str = ""
    failure: BaseException | None = None

    def outcome(self) -> dict[str, Any]:
        """Returns what the mission's row and its reply say of this cycle."""
        told: dict[str, Any] = {
            "attempts": self.attempts,
            "tokens": self.tokens,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        if self.failure is not None:
            told["error"] = to_wire(self.failure)
        return told

    def achieved(self) -> dict[str, Any]:
        """Returns what the row of the completed mission says: its method, or its answer, besides."""
        if self.brief.type == "task":
            return {**self.outcome(), "result": self.reply.text if self.reply else ""}
        method = self.method()
        named = {
            "selector": method.selector,
            "parameters": list(method.parameters),
            "source": method.source,
            "doc": method.doc,
            "sha256": method.sha256,
        }
        return {**self.outcome(), "method": named}

    def memory_text(self) -> str:
        """Returns what the memory keeps of the cycle: a study's answer, or the method and its purpose."""
        if self.brief.type == "task":
            return self.reply.text.strip() if self.reply else ""
        return method_text(self.brief.description, self.doc, self.brief.selector, self.source)

    def method(self) -> UvmMethod:
        """Returns the method that the cycle verified, with its provenance and trials."""
        return UvmMethod(
            selector=self.brief.selector,
            parameters=self.parameters,
            source=self.source,
            doc=self.doc,
            provenance=self._provenance(),
            trials=[trial.stored() for trial in self.trials],
        )

    def _provenance(self) -> dict[str, Any]:
        assert self.reply is not None  # only a written method has come this far
        return {
            "mission_id": self.mission_id,
            "origin": self.origin,
            "created": time.time(),
            "description": self.brief.description,
            "persona": self.persona,
            "model": self.reply.model,
            "model_sha256": self.reply.model_sha256,
            "adapter": self.reply.adapter,
            "prompt": [{"role": turn.role, "content": turn.content} for turn in self.conversation],
            "seed": self.attempts,
            "memories": [{"id": hit.id, "subject": hit.subject, "score": hit.score} for hit in self.memories],
            "attempts": self.attempts,
        }


def cannot_go_on(error: BaseException) -> RetryLater | None:
    """Returns why a mission has to be run again later, if that is what an error says; else None."""
    return error if isinstance(error, RetryLater) else exhausted(error)
