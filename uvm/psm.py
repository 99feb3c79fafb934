"""The Prototypal State Machine: one cognitive cycle, from a mission to a verified method or to FAILED.

`uvm/states.py` says which moves there are; here each state has one handler, which performs the state's effect
and returns the next state. Any exception moves to FAILED. Only COMPLETE writes to the image, in one
transaction; trials run in transactions that are doomed before they begin. Layer 3.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from uvm import prompts
from uvm.cycle import Cycle, cannot_go_on
from uvm.errors import BatosError, Conflict, MissionFailed
from uvm.guardian import Finding
from uvm.hands.pool import HandPool
from uvm.image import history, journal
from uvm.image.image import LivingImage, to_its_end
from uvm.image.prototypes import UvmObject
from uvm.image.txn import Txn
from uvm.memory.fractal import FractalMemory
from uvm.messages import MissionBrief
from uvm.messenger import Messenger
from uvm.metacognition import MetacognitionLog
from uvm.mind.backends import Message
from uvm.mind.mind import Mind, Reply
from uvm.replays import Replays
from uvm.states import FINAL, State, advance
from uvm.trials import Trial, TrialRunner, Verdict, trials_of

QUERIES_TOKENS = 160
STUDY_TOKENS = 400
MEMORIES = 4
FRESH_TEMPERATURES = (0.0, 0.7, 0.9, 1.0)  # of the answers that start from nothing: the first is greedy
REPAIR_TEMPERATURE = 0.2
OWN_PERSONA_SLOT = "persona"
MAX_OVERTAKEN = 5  # times that one candidate is tried again, since the method has changed meanwhile


class PrototypalStateMachine:
    """Runs cognitive cycles.

    Args:
        catalog: name of the object that holds the memory.
        covenants: the rules that every writer of a method is given.
        max_attempts: how many times a cycle has its method written.
        max_tokens: longest answer of the writing model.
        default_persona: who writes for objects without a persona of their own.
    """

    def __init__(
        self,
        *,
        image: LivingImage,
        mind: Mind,
        memory: FractalMemory,
        catalog: str,
        hands: HandPool,
        messenger: Messenger,
        log: MetacognitionLog,
        covenants: str,
        max_attempts: int,
        max_tokens: int,
        default_persona: str,
    ) -> None:
        self._image = image
        self._mind = mind
        self._memory = memory
        self._catalog = catalog
        self._hands = hands
        self._trials = TrialRunner(messenger)
        self._replays = Replays(self._trials)
        self._log = log
        self._covenants = covenants
        self._max_attempts = max_attempts
        self._max_tokens = max_tokens
        self._default_persona = default_persona
        self._handlers: dict[State, Callable[[Cycle], Awaitable[State]]] = {
            State.IDLE: self._psm_idle_process,
            State.DECOMPOSING: self._psm_decomposing_process,
            State.DELEGATING: self._psm_delegating_process,
            State.SYNTHESIZING: self._psm_synthesizing_process,
            State.VALIDATING: self._psm_validating_process,
        }

    async def run(self, row: dict[str, Any]) -> Cycle:
        """Runs the cycle of a mission to its end.

        Args:
            row: the mission's record, as the journal keeps it.

        Returns:
            The cycle, in COMPLETE, its method and its mission's row committed.

        Raises:
            MissionFailed: the cycle ended in FAILED; the row says why.
            RetryLater: the cycle can't go on now; the row is open, for the cycle to be run again.
            asyncio.CancelledError: it was cancelled before its last commit; the image holds nothing of it.
        """
        brief = MissionBrief.model_validate(row["brief"])
        cycle = Cycle(
            f"{row['mission_id']}.{row['starts']}", row["mission_id"], row["target"], brief, row["origin"]
        )
        try:
            await self._announce(cycle)
            while cycle.state not in FINAL:
                await self._move(cycle, await self._handlers[cycle.state](cycle))
        except asyncio.CancelledError as error:
            if cycle.state is not State.COMPLETE:  # once committed, it comes too late
                with suppress(OSError, MemoryError):  # who cancelled must hear of that all the same
                    await self._fail(cycle, error)
                raise
        except Exception as error:
            if cycle.state is not State.COMPLETE:  # once committed, a full disk under the log changes nothing
                if (pressed := cannot_go_on(error)) is not None:
                    await self._defer(cycle, pressed)
                    raise pressed from error
                await self._fail(cycle, error)
                raise self._failure(cycle) from error
        return cycle

    async def _move(self, cycle: Cycle, to: State) -> None:
        state = advance(cycle.state, to)
        for _ in range(MAX_OVERTAKEN):
            # The effect first: COMPLETE means that it is committed.
            if state is not State.COMPLETE or await self._psm_complete_process(cycle):
                break
            state = advance(cycle.state, await self._psm_validating_process(cycle))
        else:
            raise Conflict(f"{cycle.brief.selector} changes all the time; try again later")
        cycle.state = state
        await self._announce(cycle)

    async def _announce(self, cycle: Cycle) -> None:
        await self._record(
            cycle,
            "transition",
            target=cycle.target,
            selector=cycle.brief.selector,
            attempt=cycle.attempts,
            seconds=round(time.monotonic() - cycle.started, 3),
        )

    async def _record(self, cycle: Cycle, event: str, **fields: Any) -> None:
        await self._log.record(
            event, cycle=cycle.id, mission=cycle.mission_id, state=str(cycle.state), **fields
        )

    # The states

    async def _psm_idle_process(self, cycle: Cycle) -> State:
        """Finds the target and the persona that answers for it."""
        async with self._image.reading() as txn:
            target = txn.find(cycle.target)
            own = target.lookup(OWN_PERSONA_SLOT)
            cycle.persona = own[1] if own and own[1] in self._mind.personas else self._default_persona
            if cycle.brief.type != "task":
                self._hands.require_walls()  # before a model writes what nobody will run
                history.check_place(target, cycle.brief.selector)
            if cycle.brief.type == "revision":
                history.own_method(target, cycle.brief.selector)
        await self._record(cycle, "mission", brief=cycle.brief.plain(), persona=cycle.persona)
        return State.DECOMPOSING

    async def _psm_decomposing_process(self, cycle: Cycle) -> State:
        """BRICK turns the brief into search queries, and a sample call where the brief shows none."""
        brief = cycle.brief
        shown = brief.examples or brief.call() is not None or brief.type == "task"
        propose = 0 if shown else brief.arity() or 0
        async with self._image.reading() as txn:
            messages, schema = prompts.decomposition(brief, txn.find(cycle.target), propose)
        reply = await self._ask(cycle, "BRICK", messages, schema=schema, max_tokens=QUERIES_TOKENS)
        answer = _json_object(reply.text)
        cycle.queries = [str(query) for query in answer.get("queries", [])][:3]
        sample = answer.get("sample_args")
        cycle.sample_args = sample if propose and isinstance(sample, list) else None
        return State.DELEGATING

    async def _psm_delegating_process(self, cycle: Cycle) -> State:
        """Searches the Fractal Memory."""
        queries = [cycle.brief.description or cycle.brief.selector.replace("_", " "), *cycle.queries]
        async with self._image.reading() as txn:
            cycle.memories = await self._memory.search(txn.find(self._catalog), queries, k=MEMORIES)
        hits = [
            {"id": hit.id, "subject": hit.subject, "score": round(hit.score, 4)} for hit in cycle.memories
        ]
        await self._record(cycle, "retrieval", queries=queries, hits=hits)
        return State.SYNTHESIZING

    async def _psm_synthesizing_process(self, cycle: Cycle) -> State:
        """The target's persona writes the method: afresh, or mending what was found wrong."""
        cycle.attempts += 1
        if cycle.brief.type == "task":
            messages = prompts.study(cycle.brief, cycle.memories)
            cycle.reply = await self._ask(cycle, cycle.persona, messages, max_tokens=STUDY_TOKENS)
            return State.VALIDATING
        repairing = cycle.attempts % 2 == 0 and cycle.reply is not None
        if repairing and cycle.reply is not None:
            answer = Message("assistant", f"```python\n{cycle.source}```")
            cycle.conversation += [answer, prompts.repair(cycle.findings)]
            temperature = REPAIR_TEMPERATURE
        else:
            cycle.conversation = await self._request(cycle)
            temperature = FRESH_TEMPERATURES[min(cycle.attempts // 2, len(FRESH_TEMPERATURES) - 1)]
        cycle.reply = await self._ask(
            cycle,
            cycle.persona,
            cycle.conversation,
            max_tokens=self._max_tokens,
            temperature=temperature,
            seed=cycle.attempts,
        )
        cycle.source = prompts.extract_code(cycle.reply.text, cycle.brief.selector)
        return State.VALIDATING

    async def _psm_validating_process(self, cycle: Cycle) -> State:
        """Audits the candidate, tries it on the real objects, and proves that its writes persist."""
        cycle.findings = await self._study_findings(cycle) if cycle.brief.type == "task" else []
        if cycle.brief.type != "task":
            cycle.findings = await self._audit(cycle) or await self._try(cycle)
        for finding in cycle.findings:
            await self._record_finding(cycle, finding)
        if not cycle.findings:
            return State.COMPLETE
        if cycle.attempts >= self._max_attempts:
            raise MissionFailed(
                f"no verified method after {cycle.attempts} attempts: {cycle.findings[0].message}",
                findings=[finding.message for finding in cycle.findings],
            )
        return State.SYNTHESIZING

    async def _psm_complete_process(self, cycle: Cycle) -> bool:
        """Puts method, version, provenance, memory and the mission's row into the image, in one commit.

        Returns False, and changes nothing, where the method is no longer the one that VALIDATING saw: what
        would be replaced was not tried against.
        """
        text = cycle.memory_text()
        vectors = await self._memory.embed([text])
        kind = "reflection" if cycle.brief.type == "task" else "method"

        def install(txn: Txn) -> Txn | None:
            target = txn.find(cycle.target)
            if kind == "method":
                if history.installed(target, cycle.brief.selector) != cycle.base:
                    return None
                history.install(txn, target, cycle.method())
            subject = f"{target.label}.{cycle.brief.selector}"
            self._memory.add(
                txn.find(self._catalog), text, vectors[0], kind=kind, subject=subject, persona=cycle.persona
            )
            if not journal.finish(txn, cycle.mission_id, journal.COMPLETE, cycle.achieved()):
                raise MissionFailed(f"mission {cycle.mission_id} is over already; nothing was installed")
            return txn

        note = f"{cycle.brief.type} {cycle.target} {cycle.brief.selector} (mission {cycle.mission_id})"
        txn = await to_its_end(self._image.attempt(note, install, user=cycle.origin))
        if txn is None:
            await self._record(cycle, "overtaken", attempt=cycle.attempts)
            return False
        cycle.transaction_id = txn.tid
        return True

    async def _psm_failed_process(self, cycle: Cycle) -> None:
        """Leaves nothing of the cycle in the image but its mission's row, which says why."""
        cancelled = isinstance(cycle.failure, asyncio.CancelledError)
        reason = str(cycle.failure) or ("cancelled" if cancelled else type(cycle.failure).__name__)
        await self._record(cycle, "abort", reason=reason)
        if not cancelled:  # who cancelled decides whether the mission is over or only interrupted
            await to_its_end(
                self._image.attempt(
                    f"mission {cycle.mission_id} failed",
                    lambda txn: journal.finish(txn, cycle.mission_id, journal.FAILED, cycle.outcome()),
                )
            )

    # Their parts

    async def _fail(self, cycle: Cycle, error: BaseException) -> None:
        cycle.failure = error
        cycle.state = advance(cycle.state, State.FAILED)
        await self._announce(cycle)
        await self._psm_failed_process(cycle)

    async def _defer(self, cycle: Cycle, error: BatosError) -> None:
        """Says that the cycle has ended without a verdict, if there is room to say it."""
        with suppress(OSError, MemoryError):
            await self._record(cycle, "deferred", reason=str(error))

    def _failure(self, cycle: Cycle) -> MissionFailed:
        error = cycle.failure
        details = error.details if isinstance(error, BatosError) else {}
        return MissionFailed(
            f"mission {cycle.brief.selector} failed: {error}",
            **{**details, "mission_id": cycle.mission_id, **cycle.outcome()},
        )

    async def _ask(self, cycle: Cycle, persona: str, messages: list[Message], **options: Any) -> Reply:
        told = [{"role": message.role, "content": message.content} for message in messages]
        await self._record(cycle, "prompt", persona=persona, messages=told, options=options)
        reply = await self._mind.ask(
            persona,
            messages,
            on_token=lambda text: self._log.announce(
                "token", mission=cycle.mission_id, persona=persona, text=text
            ),
            **options,
        )
        cycle.tokens += reply.completion_tokens
        await self._record(
            cycle,
            "reply",
            persona=persona,
            text=reply.text,
            finish=reply.finish,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            seconds=round(reply.seconds, 3),
            model=reply.model,
            model_sha256=reply.model_sha256,
        )
        return reply

    async def _request(self, cycle: Cycle) -> list[Message]:
        async with self._image.reading() as txn:
            target = txn.find(cycle.target)
            previous = target.methods().get(cycle.brief.selector)
            source = previous.source if previous and cycle.brief.type == "revision" else None
            return prompts.synthesis(cycle.brief, target, cycle.memories, self._covenants, source)

    async def _study_findings(self, cycle: Cycle) -> list[Finding]:
        empty = cycle.reply is None or not cycle.reply.text.strip()
        return [Finding("empty", 1, "The answer is empty; write a few sentences.")] if empty else []

    async def _audit(self, cycle: Cycle) -> list[Finding]:
        """Returns what the guardian refuses; what it could mend is mended and logged."""
        if unusable := self._unusable(cycle):
            return [unusable]
        brief = cycle.brief
        audit = await self._hands.audit(cycle.source, brief.selector, brief.parameter_names())
        cycle.source, cycle.parameters, cycle.doc = audit.source, audit.parameters, audit.doc
        for finding in audit.findings:
            if finding.mended:
                await self._record_finding(cycle, finding)
        return [finding for finding in audit.findings if not finding.mended]

    def _unusable(self, cycle: Cycle) -> Finding | None:
        if cycle.reply is not None and cycle.reply.finish == "length":
            told = f"The answer did not end within {self._max_tokens} tokens; write a shorter method."
            return Finding("endless", 1, told)
        if "def " not in cycle.source:
            told = f"Answer with one ```python block that defines `{cycle.brief.selector}`, and nothing else."
            return Finding("no-code", 1, told)
        return None

    async def _try(self, cycle: Cycle) -> list[Finding]:
        """Runs the trials in a transaction that can only abort."""
        async with self._image.transaction(f"trial for mission {cycle.mission_id}") as txn:
            txn.doom()
            target = txn.find(cycle.target)
            cycle.base = history.installed(target, cycle.brief.selector)
            cycle.trials = trials_of(cycle.brief, cycle.sample_args, target)
            verdicts = [await self._verdict(cycle, txn, target, trial) for trial in cycle.trials]
            cycle.trials = [verdict.trial for verdict in verdicts if not verdict.stale]
            findings = [finding for verdict in verdicts for finding in verdict.findings]
            if cycle.brief.type == "revision" and not findings:
                replay = await self._replays.run(txn, target, cycle.method())
                await self._record(cycle, "replay", attempt=cycle.attempts, **replay.record())
                findings = replay.findings()
            return findings

    async def _verdict(self, cycle: Cycle, txn: Txn, target: UvmObject, trial: Trial) -> Verdict:
        """Returns what came of a trial; one that the present version fails too proves nothing any more."""
        selector = cycle.brief.selector
        verdict = await self._trials.run(txn, target, selector, cycle.source, trial)
        if verdict.findings and trial.origin == "history":
            present = await self._trials.run(txn, target, selector, None, trial)
            verdict = verdict.outdated() if present.findings else verdict
        await self._record(cycle, "trial", attempt=cycle.attempts, **verdict.record())
        return verdict

    async def _record_finding(self, cycle: Cycle, finding: Finding) -> None:
        await self._record(
            cycle,
            "finding",
            rule=finding.rule,
            line=finding.line,
            message=finding.message,
            mended=finding.mended,
            attempt=cycle.attempts,
        )


def _json_object(text: str) -> dict[str, Any]:
    """Returns the JSON object in a grammar-constrained answer; an answer cut short gives an empty one."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
