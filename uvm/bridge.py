"""The bridge: commands in over ZeroMQ, replies and events out.

One task reads; each request runs in a task of its own, so that control traffic never queues behind work (what
limits work are the kernel's lanes). A bad message gets a typed error reply and never stops the kernel.
Layer 4.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from uvm.errors import BatosError, HomeError, MalformedMessage, ShuttingDown
from uvm.messages import Command, Rejected, pack_error, pack_event, pack_result, parse_request

Handler = Callable[[Command], Awaitable[Any]]


def ensure_keys(keys_dir: Path) -> None:
    """Makes the CURVE keys of the kernel and of its first client where they are missing.

    The folder is 0700 and the files 0600; `clients/` holds the public keys that may connect.
    """
    clients = keys_dir / "clients"
    before = os.umask(0o077)
    try:
        clients.mkdir(parents=True, exist_ok=True)
        for name in ("kernel", "client"):
            if not (keys_dir / f"{name}.key_secret").exists():
                zmq.auth.create_certificates(keys_dir, name)
        shutil.copyfile(keys_dir / "client.key", clients / "client.key")
    finally:
        os.umask(before)


class Bridge:
    """The server's end of both sockets.

    Args:
        endpoint: where commands are answered (ROUTER).
        events_endpoint: where events are published (XPUB).
        keys_dir: as `ensure_keys` leaves it.
        max_message_bytes: a larger message closes its connection.
        handler: answers one command; what it raises becomes the error reply.
        report: told of errors that are no part of `uvm.errors`: faults of the kernel.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        events_endpoint: str,
        keys_dir: Path,
        max_message_bytes: int,
        handler: Handler,
        report: Callable[[BaseException], None],
    ) -> None:
        self._endpoints = {zmq.SocketType.ROUTER: endpoint, zmq.SocketType.XPUB: events_endpoint}
        self._keys_dir = keys_dir
        self._max_message_bytes = max_message_bytes
        self._handler = handler
        self._report = report
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._topics: set[bytes] = set()
        self._requests: set[asyncio.Task[None]] = set()
        self._readers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Binds both sockets and begins to answer.

        Raises:
            HomeError: an address is taken or not one of this machine's.
        """
        ensure_keys(self._keys_dir)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(self._keys_dir / "clients"))
        self._router = self._bind(zmq.SocketType.ROUTER)
        self._events = self._bind(zmq.SocketType.XPUB)
        self._readers = [
            asyncio.create_task(self._read_requests()),
            asyncio.create_task(self._read_subscriptions()),
        ]

    def publish(self, event: str, fields: dict[str, Any]) -> None:
        """Publishes an event if anybody subscribed to it; a slow subscriber misses some."""
        topic = event.encode()
        if any(topic.startswith(prefix) for prefix in self._topics):
            try:
                self._events.send_multipart([topic, pack_event(event, fields)], zmq.NOBLOCK)
            except BatosError as error:
                self._report(error)

    async def close(self, grace_s: float) -> None:
        """Ends what is under way (after `grace_s`, by cancelling it) and closes both sockets."""
        if self._requests:
            await asyncio.wait(self._requests, timeout=grace_s)
        for task in [*self._requests, *self._readers]:
            task.cancel()
        await asyncio.gather(*self._requests, *self._readers, return_exceptions=True)
        self._authenticator.stop()
        self._context.destroy(linger=200)

    def _bind(self, kind: zmq.SocketType) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.curve_publickey, socket.curve_secretkey = zmq.auth.load_certificate(
            self._keys_dir / "kernel.key_secret"
        )
        socket.curve_server = True
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_message_bytes)
        try:
            socket.bind(self._endpoints[kind])
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise HomeError(
                f"can't listen at {self._endpoints[kind]} ({error}); is another kernel running? "
                f"Set BATOS_ZMQ_ENDPOINT and BATOS_ZMQ_EVENTS_ENDPOINT to free addresses",
                endpoint=self._endpoints[kind],
            ) from None
        return socket

    async def _read_requests(self) -> None:
        while True:
            frames = await self._router.recv_multipart()
            task = asyncio.create_task(self._answer(frames))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _read_subscriptions(self) -> None:
        """Keeps the set of topics that somebody subscribed to."""
        while True:
            message = await self._events.recv()
            if message[:1] == b"\x01":
                self._topics.add(message[1:])
            else:
                self._topics.discard(message[1:])

    async def _answer(self, frames: list[bytes]) -> None:
        """Answers one message: `[identity, payload]` of a DEALER, or `[identity, "", payload]` of a REQ."""
        *envelope, payload = frames
        try:
            reply = await self._reply(envelope, payload)
        except asyncio.CancelledError:
            reply = pack_error(_id_of(payload), ShuttingDown("the kernel is shutting down"))
            self._router.send_multipart([*envelope, reply], zmq.NOBLOCK)
            raise
        await self._router.send_multipart([*envelope, reply])

    async def _reply(self, envelope: list[bytes], payload: bytes) -> bytes:
        if len(envelope) not in (1, 2) or (len(envelope) == 2 and envelope[1]):
            return pack_error(None, MalformedMessage("a request is one frame"))
        try:
            request = parse_request(payload)
        except Rejected as rejected:
            return pack_error(rejected.id, rejected.error)
        try:
            return pack_result(request.id, await self._handler(request.command))
        except Exception as error:
            if not isinstance(error, BatosError):
                self._report(error)
            return pack_error(request.id, error)


def _id_of(payload: bytes) -> str | int | None:
    try:
        return parse_request(payload).id
    except Rejected as rejected:
        return rejected.id
