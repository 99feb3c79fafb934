"""What the Architect does with the past: versions told and brought back, transactions undone. Layer 3."""

from __future__ import annotations

from typing import Any

from uvm.image import history
from uvm.image.image import LivingImage, blocking
from uvm.image.prototypes import UvmMethod
from uvm.image.txn import Txn
from uvm.memory.catalog import Vectors
from uvm.memory.fractal import FractalMemory, method_text
from uvm.metacognition import MetacognitionLog
from uvm.objects import USER
from uvm.replays import Replay, Replays
from uvm.undoing import Undoing


class Versions:
    """Versions of methods, and undoing; each verb is one unit of work.

    Args:
        catalog: name of the object that holds the memory.
    """

    def __init__(
        self,
        *,
        image: LivingImage,
        memory: FractalMemory,
        catalog: str,
        replays: Replays,
        undoing: Undoing,
        log: MetacognitionLog,
    ) -> None:
        self._image = image
        self._memory = memory
        self._catalog = catalog
        self._replays = replays
        self._undoing = undoing
        self._log = log

    async def method_history(self, target: str, selector: str) -> list[dict[str, Any]]:
        """Returns all versions of a method, the oldest first."""
        async with self._image.reading() as txn:
            method = history.own_method(txn.find(target), selector)
            return await blocking(lambda: history.versions(method))

    async def revert_method(self, target: str, selector: str, version: int | None) -> list[dict[str, Any]]:
        """Installs an earlier version of a method again and returns all versions.

        It is carried out whatever it breaks: the newest version returned says so in `broken`. What the memory
        knows of the method follows in the same commit.

        Raises:
            MethodNotFound: there is no such method or no such version.
            SlotProtected: its place has been taken by a grant since.
        """
        version, replay = await self._broken(target, selector, version)
        vectors: dict[str, Vectors] = {}

        async def unit(txn: Txn) -> None:
            found = txn.find(target)
            method = history.revert(txn, found, selector, version, USER)
            text = _text(method)
            if text not in vectors:  # another revert may have won meanwhile
                vectors[text] = (await self._memory.embed([text]))[0]
            self._memory.add(
                txn.find(self._catalog),
                text,
                vectors[text],
                kind="method",
                subject=f"{found.label}.{selector}",
                persona=method.provenance.get("persona"),
            )

        await self._image.attempt(f"revert_method {target} {selector}", unit, user=USER)
        rows = await self.method_history(target, selector)
        rows[-1]["broken"] = replay.broken
        return rows

    async def undo(self, transaction_id: str) -> dict[str, Any]:
        """Undoes a transaction; returns the id of the one that did it."""
        return {"transaction_id": await self._undoing.undo(transaction_id, USER)}

    async def _broken(self, target: str, selector: str, version: int | None) -> tuple[int, Replay]:
        """Returns the number of an earlier version, and what it breaks of the methods that call this one."""
        async with self._image.transaction(f"trial for revert_method {target} {selector}") as txn:
            txn.doom()
            found = txn.find(target)
            number, method = history.earlier(found, selector, version)
            replay = await self._replays.run(txn, found, method)
        await self._log.record("replay", target=target, selector=selector, **replay.record())
        return number, replay


def _text(method: UvmMethod) -> str:
    described = method.provenance.get("description")
    return method_text(described, method.doc, method.selector, method.source)
