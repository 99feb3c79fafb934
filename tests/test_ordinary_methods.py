"""The guardian is not over-eager: what people and small models write passes and works in a hand."""

from __future__ import annotations

import pytest

from tests.garden import Garden
from tests.ordinary_methods import ORDINARY, Ordinary
from tests.test_codec import typed
from uvm.hands.pool import HandPool

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


async def test_there_are_sixty_at_least() -> None:
    assert len({one.selector for one in ORDINARY}) == len(ORDINARY) >= 60


@pytest.mark.parametrize("one", ORDINARY, ids=lambda one: one.selector)
async def test_an_ordinary_method_passes_and_works(pool: HandPool, one: Ordinary) -> None:
    audit = await pool.audit(one.source, one.selector, None)
    assert audit.findings == ()
    garden = Garden(pool)
    oid = garden.plant("it", audit.source, **one.slots)
    outcome = await garden.send(oid, one.selector, *one.args)
    assert typed(outcome.result) == typed(one.returns)
    changed = outcome.writes[oid].set if oid in outcome.writes else {}
    assert typed(changed) == typed(one.kept)
    assert outcome.discarded == {}
