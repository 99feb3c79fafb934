"""The Prototypal State Machine as a table: its states, its moves, and the one function that moves.

`psm.py` performs the effects; this module only says which move is allowed. Imports nothing of BAT OS.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """A state of the cognitive cycle."""

    IDLE = "IDLE"
    DECOMPOSING = "DECOMPOSING"
    DELEGATING = "DELEGATING"
    SYNTHESIZING = "SYNTHESIZING"
    VALIDATING = "VALIDATING"
    COMPLETE = "COMPLETE"
    FAILED = "FAILED"


MOVES: dict[State, frozenset[State]] = {
    State.IDLE: frozenset({State.DECOMPOSING, State.FAILED}),
    State.DECOMPOSING: frozenset({State.DELEGATING, State.FAILED}),
    State.DELEGATING: frozenset({State.SYNTHESIZING, State.FAILED}),
    State.SYNTHESIZING: frozenset({State.VALIDATING, State.FAILED}),
    State.VALIDATING: frozenset({State.SYNTHESIZING, State.COMPLETE, State.FAILED}),
    State.COMPLETE: frozenset(),
    State.FAILED: frozenset(),
}
FINAL = frozenset(state for state, moves in MOVES.items() if not moves)


class IllegalMove(ValueError):
    """A move that the table does not have."""


def advance(state: State, to: State) -> State:
    """Returns `to` if the table allows the move from `state`.

    Raises:
        IllegalMove: the table does not have this move.
    """
    if to not in MOVES[state]:
        raise IllegalMove(f"{state} -> {to} is no move of the state machine")
    return to


def diagram() -> str:
    """Returns the table as a Mermaid state diagram; `docs/ARCHITECTURE.md` shows this very text."""
    rows = ["stateDiagram-v2", "    [*] --> IDLE"]
    rows += [f"    {state} --> {to}" for state in State for to in State if to in MOVES[state]]
    rows += [f"    {state} --> [*]" for state in State if state in FINAL]
    return "\n".join(rows)
