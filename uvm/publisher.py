"""The publisher: events out, to admitted clients that subscribed to them. Used by the bridge."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from uvm.errors import BatosError, HomeError
from uvm.keys import AllowedClients
from uvm.listening import received
from uvm.messages import SUBSCRIBED, pack_event

MAX_TOPICS = 256
MAX_TOPIC_BYTES = 100
RETRY_S = 0.02
EXPECTED_TRIES = 50  # libzmq closes a socket in a thread of its own; until then its address is taken


class Publisher:
    """The kernel's end of the events socket.

    ZeroMQ asks for a key when a connection is made and never again, and can't cut off one peer of many. So
    when a key is revoked the socket is closed and opened again: the admitted come back by themselves and miss
    what happens in those few tenths of a second.

    Args:
        listen: returns a fresh XPUB socket at the address; raises HomeError where it is taken.
        clients: who may subscribe.
        report: told of events that can't be sent, and once if it can't listen again.
    """

    def __init__(
        self,
        listen: Callable[[], zmq.asyncio.Socket],
        clients: AllowedClients,
        report: Callable[[BaseException], None],
    ) -> None:
        self._listen = listen
        self._clients = clients
        self._report = report
        self._topics: set[bytes] = set()
        self._any = False  # too many topics to keep apart: every event is packed, and ZeroMQ picks
        self._revocations = clients.revocations
        self._socket: zmq.asyncio.Socket | None = listen()
        self._reader = asyncio.create_task(self._read_subscriptions())

    def publish(self, event: str, fields: dict[str, Any]) -> None:
        """Publishes an event if anybody subscribed to it; a slow subscriber misses some."""
        if self._socket is None or not (self._topics or self._any):
            return
        self._clients.refresh()
        if self._clients.revocations != self._revocations:
            self._start_afresh()
            return
        topic = event.encode()
        if self._any or any(topic.startswith(prefix) for prefix in self._topics):
            try:
                self._socket.send_multipart([topic, pack_event(event, fields)], zmq.NOBLOCK)
            except BatosError as error:
                self._report(error)

    async def close(self) -> None:
        """Stops listening."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._socket is not None:
            self._socket.close()

    def _start_afresh(self) -> None:
        """Cuts off every subscriber, before one more event is sent."""
        assert self._socket is not None
        self._socket.close(linger=0)
        self._socket = None
        self._topics.clear()
        self._any = False
        self._revocations = self._clients.revocations
        self._reader.cancel()
        self._reader = asyncio.create_task(self._listen_again())

    async def _listen_again(self) -> None:
        tries = 0
        while self._socket is None:
            try:
                self._socket = self._listen()
            except (HomeError, OSError, zmq.ZMQError) as error:
                tries += 1
                if tries == EXPECTED_TRIES:
                    self._report(error)
                await asyncio.sleep(RETRY_S)
        await self._read_subscriptions()

    async def _read_subscriptions(self) -> None:
        """Keeps the topics that somebody subscribed to, so that nothing is packed for nobody."""
        assert self._socket is not None
        async for frame, *_ in received(self._socket):
            kind, topic = frame.bytes[:1], frame.bytes[1:]
            if kind == b"\x00":
                self._topics.discard(topic)
            elif kind == b"\x01" and len(topic) <= MAX_TOPIC_BYTES:  # no event has a longer name
                self._any = self._any or len(self._topics) >= MAX_TOPICS
                if not self._any:
                    self._topics.add(topic)
                if topic.startswith(SUBSCRIBED.encode()):
                    self._answer(topic)

    def _answer(self, topic: bytes) -> None:
        """Tells a subscriber, at a topic of its own, that its subscriptions up to this one are taken."""
        assert self._socket is not None
        try:
            self._socket.send_multipart([topic, pack_event("subscribed", {})], zmq.NOBLOCK)
        except BatosError as error:
            self._report(error)
