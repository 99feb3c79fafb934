"""The bridge: commands in over ZeroMQ, replies and events out.

One task reads; each request runs in a task of its own, so that control traffic never queues behind work (what
limits work are the kernel's lanes). A bad message gets a typed error reply and never stops the kernel. Who is
no admitted client is refused at the handshake, and again at each request and each reply, since a key may be
revoked in between. Layer 4.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from uvm.admission import Admission
from uvm.errors import BatosError, KernelRefused, MalformedMessage, ShuttingDown
from uvm.keys import AllowedClients
from uvm.listening import LINGER_MS, Limits, listen, reachable, received
from uvm.messages import Command, Rejected, pack_error, pack_result, parse_request
from uvm.pressure import check_memory, exhausted
from uvm.publisher import Publisher

Handler = Callable[[Command], Awaitable[Any]]

INCOMING, OUTGOING = 64, 256  # requests and replies of one connection that wait in ZeroMQ
EVENTS = 1000  # events that wait in ZeroMQ for one subscriber
REPLY_PATIENCE_S = 30.0  # how long a reply waits for a client that does not read
RETRY_S, LONGEST_RETRY_S = 0.005, 0.5
LARGE, COPIES = 1 << 16, 6  # bytes of a request for which memory must be there, as often as it is copied
MOST_READ_REFUSED = 1 << 16  # bytes of a refused message that are read to echo its id
_BEGINNING = re.compile(rb"[\x80-\x8f]\xa1v\x01\xa2id([\xa1-\xbf])")  # {v: 1, id: a short string, …}


class Bridge:
    """The server's end of both sockets.

    Args:
        endpoint: where commands are answered (ROUTER).
        events_endpoint: where events are published (XPUB).
        keys_dir: as `uvm.keys.ensure_keys` leaves it.
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
        self._endpoint = endpoint
        self._events_endpoint = events_endpoint
        self._keys_dir = keys_dir
        self._max_message_bytes = max_message_bytes
        self._handler = handler
        self._report = report
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._admission = Admission()
        self._requests: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens at both addresses and begins to answer.

        Raises:
            HomeError: an address is taken or not one of this machine's, or a key can't be read.
        """
        self._clients = AllowedClients(self._keys_dir, self._report)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", self._clients)
        try:
            self._router = self._listen(zmq.ROUTER, self._endpoint, INCOMING, OUTGOING)
            self._publisher = Publisher(self._listen_for_subscribers, self._clients, self._report)
        except BaseException:
            self._authenticator.stop()
            self._context.destroy(linger=0)
            raise
        self._reader = asyncio.create_task(self._read_requests())

    @property
    def address(self) -> str:
        """Where a client on this machine reaches the commands, whatever the endpoint left open."""
        return reachable(self._router.getsockopt_string(zmq.LAST_ENDPOINT))

    def admit(self, key: str) -> None:
        """Admits a key of the kernel's own: nothing in `keys_dir` revokes it, and no share bounds it."""
        self._clients.admit(key)

    def publish(self, event: str, fields: dict[str, Any]) -> None:
        """Publishes an event if anybody subscribed to it; a slow subscriber misses some."""
        self._publisher.publish(event, fields)

    async def close(self, grace_s: float) -> None:
        """Ends what is under way (after `grace_s`, by cancelling it) and closes both sockets."""
        if self._requests:
            await asyncio.wait(self._requests, timeout=grace_s)
        for task in [*self._requests, self._reader]:
            task.cancel()
        await asyncio.gather(*self._requests, self._reader, return_exceptions=True)
        await self._publisher.close()
        self._authenticator.stop()
        self._context.destroy(linger=LINGER_MS)

    def _listen(self, kind: int, endpoint: str, incoming: int, outgoing: int) -> zmq.asyncio.Socket:
        limits = Limits(incoming, outgoing, self._max_message_bytes)
        return listen(self._context, kind, endpoint, self._keys_dir, limits)

    def _listen_for_subscribers(self) -> zmq.asyncio.Socket:
        return self._listen(zmq.XPUB, self._events_endpoint, EVENTS, EVENTS)

    async def _read_requests(self) -> None:
        while not self._router.closed:
            try:
                await self._read_on()
            except Exception as error:  # there was no memory to take a message in
                self._report(error)
                await asyncio.sleep(RETRY_S)

    async def _read_on(self) -> None:
        async for frames in received(self._router):
            taken = False
            try:
                taken = self._take([frame.bytes for frame in frames], _key_of(frames[-1]))
            except Exception as error:  # one message must not make the kernel deaf
                self._refuse(frames, error)
            if not taken:  # to refuse costs time here, where it counts against nobody's share
                await asyncio.sleep(0)

    def _refuse(self, frames: list[zmq.Frame], error: Exception) -> None:
        """Answers a message that could not be looked at; its own frame is not copied for that."""
        pressed = exhausted(error)
        self._report(error if pressed is None else pressed)
        beginning = bytes(frames[-1].buffer[:64])
        with suppress(MemoryError):
            envelope = [frame.bytes for frame in frames[:-1]]
            self._send(envelope, pack_error(_id_at_the_beginning(beginning), pressed or error))

    def _take(self, frames: list[bytes], key: str) -> bool:
        """Begins to answer one message of the client with this key, or refuses it and returns False.

        A message is `[identity, payload]` of a DEALER, or `[identity, "", payload]` of a REQ.
        """
        *envelope, payload = frames
        if len(envelope) not in (1, 2) or (len(envelope) == 2 and envelope[1]):
            self._send(frames[:1], pack_error(None, MalformedMessage("a request is one frame")))
            return False
        try:
            if not self._clients.allows(key):
                raise _revoked()
            if len(payload) > LARGE:
                check_memory(COPIES * len(payload))
            own = self._clients.is_own(key)  # a heartbeat must not wait for what others have under way
            if not own:
                self._admission.enter(key, envelope[0], len(payload))
        except BatosError as refusal:
            self._send(envelope, pack_error(_id_of(payload), refusal))
            return False
        task = asyncio.create_task(self._answer(envelope, key, payload))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        if not own:
            task.add_done_callback(lambda _: self._admission.leave(key, envelope[0], len(payload)))
        return True

    async def _answer(self, envelope: list[bytes], key: str, payload: bytes) -> None:
        """Answers one message of the client with this key."""
        request_id: str | int | None = None
        try:
            request = parse_request(payload)
            request_id = request.id
            reply = pack_result(request_id, await self._handler(request.command))
        except asyncio.CancelledError:
            self._send(envelope, pack_error(request_id, ShuttingDown("the kernel is shutting down")))
            raise
        except Rejected as rejected:
            request_id = rejected.id
            reply = pack_error(request_id, rejected.error)
        except Exception as error:
            pressed = exhausted(error)
            if pressed is None and not isinstance(error, BatosError):
                self._report(error)
            if request_id is None:  # it was not read to its end
                request_id = _id_at_the_beginning(payload)
            reply = pack_error(request_id, pressed or error)
        await self._deliver(envelope, key, request_id, reply)

    async def _deliver(
        self, envelope: list[bytes], key: str, request_id: str | int | None, reply: bytes
    ) -> None:
        """Sends a reply, or a refusal if the key was revoked; waits for a client that does not read."""
        pause_s, waited_s = RETRY_S, 0.0
        while waited_s < REPLY_PATIENCE_S:
            if not self._clients.allows(key):
                reply = pack_error(request_id, _revoked())
            if self._send(envelope, reply):
                return
            await asyncio.sleep(pause_s)  # it is still under way: it counts against who does not read
            waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, LONGEST_RETRY_S)

    def _send(self, envelope: list[bytes], reply: bytes) -> bool:
        """Sends a reply; returns False where its connection has no room for it now."""
        try:
            sent: Any = self._router.send_multipart([*envelope, reply], zmq.NOBLOCK)
            sent.result()  # it is done: it was sent or could not be
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # who asked has gone
                self._report(error)
        return True


def _key_of(frame: zmq.Frame) -> str:
    """Returns the client's public key, as the handshake proved it; empty where there was none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def _revoked() -> KernelRefused:
    return KernelRefused(
        "this key was revoked; on the kernel's machine: ./puter.sh key add NAME", reason="revoked"
    )


def _id_of(payload: bytes) -> str | int | None:
    """Returns the id to echo in a refusal; to read all of a large message for it would cost too much."""
    if len(payload) > MOST_READ_REFUSED:
        return _id_at_the_beginning(payload)
    try:
        return parse_request(payload).id
    except Rejected as rejected:
        return rejected.id


def _id_at_the_beginning(payload: bytes) -> str | None:
    found = _BEGINNING.match(payload)
    if found is None:
        return None
    return payload[found.end() : found.end() + (found[1][0] & 0x1F)].decode(errors="replace")
