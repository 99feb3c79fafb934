"""What a torture run came to, as a client sees it: asked over the wire, once all is quiet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evals.torture import script
from evals.torture.books import Book
from uvm import errors
from uvm.client import Kernel

FINAL = {"complete", "failed", "cancelled", "quarantined"}
RECALLED = 40  # methods whose memory is asked for


async def lost_missions(kernel: Kernel, books: Iterable[Book]) -> list[str]:
    """Returns the acknowledged missions that the journal has not, or not as it was told."""
    lost = []
    for mission_id, taught in ((key, value) for book in books for key, value in book.missions.items()):
        try:
            record = await kernel.request("mission", mission_id=mission_id)
        except errors.MissionNotFound:
            lost.append(f"{mission_id} ({taught.selector}) is not in the journal")
            continue
        state, selector = record["state"], record["brief"]["selector"]
        if selector != taught.selector:
            lost.append(f"{mission_id} teaches {selector}, not {taught.selector}")
        if state not in FINAL:
            lost.append(f"{mission_id} ({selector}) is {state}")
        if taught.complete and state != "complete":
            lost.append(f"{mission_id} ({selector}) was complete and is {state}")
        if taught.cancelled and state != "cancelled":
            lost.append(f"{mission_id} ({selector}) was cancelled and is {state}")
    return lost


async def wrong_answers(kernel: Kernel, books: Iterable[Book]) -> list[str]:
    """Returns the methods known to be installed that are not, or do not answer as their edition."""
    wrong = []
    for (target, selector), known in ((key, value) for book in books for key, value in book.known.items()):
        try:
            versions = await kernel.request("method_history", target_oid=target, selector=selector)
            got = await kernel.request(
                "send_message", target_oid=target, selector=selector, args=[7], on_missing="error"
            )
        except errors.BatosError as error:
            wrong.append(f"{target} {selector}: {error}")
            continue
        editions = [edition_of(version["provenance"]) for version in versions]
        if known not in editions:
            wrong.append(f"{target} {selector}: edition {known} is not among {editions}")
        if got != (wanted := script.answer(selector, 7, editions[-1])):
            wrong.append(f"{target} {selector} answers {got!r}, not {wanted!r}")
    return wrong


async def forgotten(kernel: Kernel, books: Iterable[Book]) -> list[str]:
    """Returns the methods known to be installed that a search of the memory does not find by their text."""
    gone = []
    known = [key for book in books for key in book.known]
    for target, selector in known[:: max(1, len(known) // RECALLED)]:
        told = await kernel.request("inspect", target_oid=target)
        method = told["methods"].get(selector)
        query = "" if method is None else f"{_purpose(method)}\n```python\n{method['source']}```"
        hits = await kernel.request("recall", query=query or selector, k=10)
        if f"{target}.{selector}" not in [hit["subject"] for hit in hits]:
            gone.append(f"{target}.{selector}")
    return gone


def edition_of(provenance: dict[str, Any]) -> int:
    """Returns which edition a version is, by its mission's description; what was missed has none."""
    words = str(provenance["description"] or "edition 1").split()
    return int(words[1])


def _purpose(method: dict[str, Any]) -> str:
    words = str(method["selector"]).replace("_", " ")
    return str(method["provenance"]["description"] or method["doc"] or words)


async def unfinished(kernel: Kernel) -> list[dict[str, Any]]:
    """Returns the missions that are not over."""
    rows: list[dict[str, Any]] = []
    for state in ("queued", "running"):
        rows += await kernel.request("missions", state=state, limit=1000, timeout_s=10.0)
    return rows
