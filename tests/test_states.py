"""The table of moves: complete, closed, and the only way to move."""

from pathlib import Path

import pytest

from uvm.states import FINAL, MOVES, IllegalMove, State, advance, diagram


def test_every_state_has_a_row() -> None:
    assert set(MOVES) == set(State)


def test_every_state_is_reached_and_leads_to_an_end() -> None:
    reached = {State.IDLE}
    while more := {to for state in reached for to in MOVES[state]} - reached:
        reached |= more
    assert reached == set(State)
    assert {State.COMPLETE, State.FAILED} == FINAL


def test_every_state_that_is_not_final_can_fail() -> None:
    assert all(State.FAILED in MOVES[state] for state in State if state not in FINAL)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("to", State)
def test_only_the_tables_moves_are_legal(state: State, to: State) -> None:
    if to in MOVES[state]:
        assert advance(state, to) is to
    else:
        with pytest.raises(IllegalMove, match=f"{state} -> {to}"):
            advance(state, to)


def test_the_documented_diagram_is_the_table() -> None:
    tour = Path(__file__).parent.parent / "docs" / "ARCHITECTURE.md"
    assert diagram() in tour.read_text(encoding="utf-8")
