"""The commands of the wire, each with its handler; what a request may do is decided before, at the edge.

Control traffic runs at once, work on the image waits in a bounded lane, missions in one of their own. Layer
3: the bridge hands commands in, and `batos.py` adds those about the kernel itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from uvm import messages as m
from uvm.errors import DoesNotUnderstand
from uvm.granting import Granting
from uvm.image.image import LivingImage
from uvm.image.txn import Txn
from uvm.lanes import Lane
from uvm.memory.fractal import FractalMemory
from uvm.messenger import Messenger
from uvm.metacognition import MetacognitionLog
from uvm.missions import Missions
from uvm.objects import USER, Objects
from uvm.versions import Versions

Handler = Callable[[Any], Awaitable[Any]]
# What needs room on the disk beforehand; a message, once it has written. To revoke is always possible.
_WRITING = {"initiate_cognitive_cycle", "create_object", "set_slot", "delete_slot", "revert_method", "undo"}
_WRITING |= {"grant", "remember"}


class Commands:
    """Answers commands.

    Args:
        catalog: name of the object that holds the memory.
        lane: where messages and work on the image wait.
        max_miss_depth: how many missing selectors one message may have learned for it.
        room: raises where the disk has no room for anything new.
        control: further handlers, which never wait.
    """

    def __init__(
        self,
        *,
        image: LivingImage,
        messenger: Messenger,
        missions: Missions,
        objects: Objects,
        versions: Versions,
        granting: Granting,
        memory: FractalMemory,
        catalog: str,
        log: MetacognitionLog,
        lane: Lane,
        max_miss_depth: int,
        room: Callable[[], None],
        control: Mapping[str, Handler],
    ) -> None:
        self._image = image
        self._messenger = messenger
        self._missions = missions
        self._memory = memory
        self._catalog = catalog
        self._log = log
        self._lane = lane
        self._max_miss_depth = max_miss_depth
        self._room = room
        self._handlers: dict[str, Handler] = {
            # control traffic, never behind work
            **control,
            "missions": lambda c: missions.newest(c.state, c.limit),
            "mission": lambda c: missions.record(c.mission_id),
            "cancel_mission": lambda c: missions.cancel(c.mission_id),
            "revoke": lambda c: granting.revoke(c.target_oid, c.slot),  # not behind those it is to stop
            "grants": lambda c: granting.listed(c.target_oid),
            # work that queues in its own lanes
            "initiate_cognitive_cycle": self._initiate_cognitive_cycle,
            "send_message": self._send_message,
            # work on the image
            "inspect": self._queued(lambda c: objects.inspect(c.target_oid, c.as_of)),
            "list_objects": self._queued(lambda c: objects.listed(c.prefix, c.limit, c.after, c.as_of)),
            "create_object": self._queued(lambda c: objects.create(c.name, c.parents, c.slots)),
            "set_slot": self._queued(lambda c: objects.set_slot(c.target_oid, c.slot, c.value)),
            "delete_slot": self._queued(lambda c: objects.delete_slot(c.target_oid, c.slot)),
            "method_history": self._queued(lambda c: versions.method_history(c.target_oid, c.selector)),
            "revert_method": self._queued(
                lambda c: versions.revert_method(c.target_oid, c.selector, c.version)
            ),
            "undo": self._queued(lambda c: versions.undo(c.transaction_id)),
            "grant": self._queued(lambda c: granting.grant(c.target_oid, c.slot, c.options)),
            "remember": self._queued(self._remember),
            "recall": self._queued(self._recall),
        }

    async def handle(self, command: m.Command) -> Any:
        """Returns a command's result; what it raises becomes the error reply."""
        if command.command in _WRITING:
            self._room()
        return await self._handlers[command.command](command)

    def _queued(self, handler: Handler) -> Handler:
        """Returns `handler` behind the bounded queue of messages."""

        async def in_lane(command: Any) -> Any:
            self._lane.admit()
            async with self._lane.place():
                return await handler(command)

        return in_lane

    async def _send_message(self, command: m.SendMessage) -> Any:
        deliver = self._queued(self._deliver)
        learned = 0
        while True:
            try:
                return await deliver(command)
            except DoesNotUnderstand as miss:
                may_learn = command.on_missing == "create" and command.as_of is None
                if not may_learn or learned == self._max_miss_depth:
                    raise
                await self._doesNotUnderstand_(miss)
                learned += 1

    async def _doesNotUnderstand_(self, miss: DoesNotUnderstand) -> None:  # noqa: N802 (Smalltalk's name)
        """The creative mandate: what is not understood is learned."""
        self._room()
        await self._missions.learn(miss)

    async def _deliver(self, command: m.SendMessage) -> Any:
        async def unit(txn: Txn) -> Any:
            target = txn.find(command.target_oid)
            result, outcome = await self._messenger.send(
                txn, target, command.selector, command.args, command.kwargs
            )
            if outcome is not None and outcome.discarded:
                await self._log.record(
                    "discarded", target=target.oid, selector=command.selector, slots=outcome.discarded
                )
            if txn.changed:
                self._room()
            return result

        if command.as_of is not None:
            async with self._image.reading(command.as_of) as txn:
                return await unit(txn)
        note = f"send_message {command.target_oid} {command.selector}"
        return await self._image.attempt(note, unit, user=USER)

    async def _initiate_cognitive_cycle(self, command: m.InitiateCognitiveCycle) -> Any:
        brief = command.mission_brief
        async with self._image.reading() as txn:
            target = txn.find(command.target_oid).oid
        mission_id = await self._missions.begin(target, brief, USER, command.deadline_s)
        if not command.wait:
            return {"mission_id": mission_id, "state": "queued"}
        outcome = await self._missions.outcome(mission_id)
        call = brief.call()
        if call is None or brief.type == "task":
            return outcome
        message = m.SendMessage(
            command="send_message", target_oid=target, selector=brief.selector, args=call[0], kwargs=call[1]
        )
        return {**outcome, "result": await self._send_message(message)}

    async def _remember(self, command: m.Remember) -> Any:
        vectors = await self._memory.embed([command.text])

        def unit(txn: Txn) -> int:
            catalog = txn.find(self._catalog)
            return self._memory.add(catalog, command.text, vectors[0], kind="document", source=command.source)

        return await self._image.attempt("remember", unit, user=USER)

    async def _recall(self, command: m.Recall) -> Any:
        async with self._image.reading() as txn:
            hits = await self._memory.search(
                txn.find(self._catalog), [command.query], k=command.k, minimum=0.0
            )
        return [hit.record() for hit in hits]
