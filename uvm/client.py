"""The client library: what the terminal client, scripts and evaluations use to talk to a kernel.

    async with Kernel(config.ZMQ_ENDPOINT, config.ZMQ_EVENTS_ENDPOINT, config.KEYS_DIR) as kernel:
        await kernel.teach("genesis_obj", "square", ["x"], "Return x times x.")
        assert await kernel.send("genesis_obj", "square", 12) == 144

Imports no organ of the kernel. One task reads replies and wakes whoever waits for each, so any number of
requests may be under way on one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import zmq
import zmq.asyncio

from uvm.errors import BatosError, KernelRefused, KernelUnreachable, from_wire
from uvm.handshakes import Handshakes
from uvm.keyfiles import exists, read_pair, read_public
from uvm.messages import SUBSCRIBED, pack_request, unpack

CONNECT_TIMEOUT_S = 3.0


class Kernel:
    """A connection to one kernel; an async context manager.

    Args:
        endpoint: ZeroMQ address of the commands, such as `tcp://127.0.0.1:5555`.
        events_endpoint: ZeroMQ address of the events.
        keys_dir: folder with `kernel.key` and `client.key_secret`, as the kernel's first start makes it.
        connect_timeout_s: how long entering the context waits for the kernel's first answer.
    """

    def __init__(
        self,
        endpoint: str,
        events_endpoint: str,
        keys_dir: Path,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._endpoint = endpoint
        self._events_endpoint = events_endpoint
        self._keys_dir = keys_dir
        self._connect_timeout_s = connect_timeout_s
        self._context = zmq.asyncio.Context()
        self._ids = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._handshakes: Handshakes | None = None
        self._refusal: KernelRefused | None = None
        self._listeners: list[_Listener] = []

    async def __aenter__(self) -> Self:
        """Connects and waits for an answer.

        Raises:
            KernelUnreachable: no kernel answers within the timeout, or its keys are not there.
            KernelRefused: kernel and client do not accept each other's keys.
            HomeError: a key file is torn, or others can read the secret one.
        """
        try:
            self._socket = self._keyed(zmq.DEALER)
            self._handshakes = Handshakes(self._socket, self._endpoint, self._keys_dir, self._judge)
            self._socket.connect(self._endpoint)
            self._reader = asyncio.create_task(self._read_replies())
            await self.request("ping", timeout_s=self._connect_timeout_s)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; what is under way ends as KernelUnreachable; safe to call twice."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        if self._handshakes is not None:
            await self._handshakes.close()
            self._handshakes = None
        self._forsake(self._closed())
        for listener in list(self._listeners):
            _end(listener.ended, self._closed())
            await listener.handshakes.close()
        self._context.destroy(linger=0)

    async def request(self, command: str, *, timeout_s: float | None = None, **fields: Any) -> Any:
        """Sends one command and returns its result.

        Args:
            command: a command of `docs/PROTOCOL.md`, with its `fields`.
            timeout_s: how long to wait for the reply; None waits as long as it takes.

        Raises:
            BatosError: whatever the kernel answered, as the type of `uvm.errors` that it is.
            KernelUnreachable: no reply within `timeout_s`.
            KernelRefused: the kernel does not let this client in.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._context.closed:
            raise self._closed()
        request_id = str(next(self._ids))
        payload = pack_request(request_id, command, fields)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send(payload)
                answer = await reply
        except TimeoutError:
            raise self._silence() from None
        finally:
            del self._waiting[request_id]
        if not answer["ok"]:
            raise from_wire(answer["error"])
        return answer["result"]

    async def send(self, target: str, selector: str, /, *args: Any, **kwargs: Any) -> Any:
        """Sends a message to an object and returns its answer; a missing method is learned first."""
        return await self.request(
            "send_message", target_oid=target, selector=selector, args=list(args), kwargs=kwargs
        )

    async def teach(
        self,
        target: str,
        selector: str,
        parameters: Sequence[str] | None = None,
        description: str | None = None,
        examples: Sequence[dict[str, Any]] = (),
        *,
        type: str = "unhandled_message",
        wait: bool = True,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """Runs a mission and returns its record.

        Args:
            examples: cases `{args, kwargs?, returns}` or `{args, kwargs?, raises}` that must hold.
            type: `unhandled_message`, or `revision` to replace an existing method.
            wait: False returns as soon as the mission is in the journal; `request("mission", mission_id=…)`
                tells later what came of it.
            deadline_s: seconds after which the mission fails, wherever it is; None for no limit.

        Raises:
            MissionFailed: the cycle ended in FAILED.
            MissionCancelled: somebody cancelled it.
            MissionExpired: its deadline has passed.
            ShuttingDown: the kernel stops; the next one goes on with the mission that the details name.
        """
        brief: dict[str, Any] = {"type": type, "selector": selector, "examples": list(examples)}
        if parameters is not None:
            brief["parameters"] = list(parameters)
        if description is not None:
            brief["description"] = description
        limit = {} if deadline_s is None else {"deadline_s": deadline_s}
        result: dict[str, Any] = await self.request(
            "initiate_cognitive_cycle", target_oid=target, mission_brief=brief, wait=wait, **limit
        )
        return result

    async def events(self, *topics: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the kernel's events, of these topics or of all, from the moment of subscription on.

        Raises:
            KernelRefused: the kernel does not let this client in.
            KernelUnreachable: the connection was closed meanwhile.
        """
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def judge(refusal: KernelRefused | None) -> None:
            if refusal is not None:
                _end(ended, refusal)

        socket = self._keyed(zmq.SUB)
        handshakes = Handshakes(socket, self._events_endpoint, self._keys_dir, judge)
        listener = _Listener(socket, handshakes, ended)
        self._listeners.append(listener)
        try:
            for topic in topics or ("",):
                socket.subscribe(topic)
            socket.connect(self._events_endpoint)
            while not ended.done():
                receiving: asyncio.Future[Any] = asyncio.ensure_future(socket.recv_multipart())
                await asyncio.wait({receiving, ended}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    break
                topic, payload = receiving.result()
                if topic.startswith(SUBSCRIBED.encode()):
                    listener.answered(topic)
                else:
                    yield unpack(payload)
            await ended
        finally:
            self._listeners.remove(listener)
            for mark in list(listener.marks):
                listener.answered(mark)
            ended.cancel()
            await handshakes.close()
            socket.close(linger=0)

    async def caught_up(self) -> None:
        """Waits until those who iterate over events have had all that came before, and hear the rest.

        Needs a timeout: the events may be out of reach, and a kernel older than this question never answers.
        """
        marks = [(listener, *listener.mark()) for listener in self._listeners]
        try:
            for _, _, mark in marks:
                await mark
        finally:
            for listener, topic, _ in marks:
                listener.answered(topic)

    def _keyed(self, kind: int) -> zmq.asyncio.Socket:
        """Returns a socket with the keys, not yet connected."""
        if self._context.closed:
            raise self._closed()
        kernel, own = self._keys_dir / "kernel.key", self._keys_dir / "client.key_secret"
        missing = next((path for path in (kernel, own) if not exists(path)), None)
        if missing is not None:
            raise KernelUnreachable(
                f"no keys in {self._keys_dir}; a kernel's first start makes them: ./puter.sh",
                keys_dir=str(self._keys_dir),
                reason=f"no {missing.name}",
            )
        public, secret = read_pair(own)
        socket = self._context.socket(kind)
        socket.curve_serverkey = read_public(kernel)
        socket.curve_publickey, socket.curve_secretkey = public, secret
        return socket

    async def _read_replies(self) -> None:
        while True:
            payload = await self._socket.recv()
            with contextlib.suppress(BatosError):  # what is no reply of this protocol answers nobody
                reply = unpack(payload)
                waiting = self._waiting.get(str(reply.get("id")))
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)

    def _closed(self) -> KernelUnreachable:
        return KernelUnreachable("the connection was closed", endpoint=self._endpoint)

    def _silence(self) -> BatosError:
        assert self._handshakes is not None
        return self._handshakes.silence()

    def _judge(self, refusal: KernelRefused | None) -> None:
        """Takes what the handshake came to: a refused client need not wait for answers."""
        self._refusal = refusal
        if refusal is not None:
            self._forsake(refusal)

    def _forsake(self, error: BatosError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)


@dataclass(eq=False)
class _Listener:
    """One iteration over events; `ended` ends it.

    A mark is a topic of its own that the kernel answers after all that it published before.
    """

    socket: zmq.asyncio.Socket
    handshakes: Handshakes
    ended: asyncio.Future[Any]
    marks: dict[bytes, asyncio.Future[None]] = field(default_factory=dict)

    def mark(self) -> tuple[bytes, asyncio.Future[None]]:
        """Asks for a mark; returns its topic and what is done when it is answered."""
        topic = (SUBSCRIBED + secrets.token_hex(8)).encode()
        mark = self.marks[topic] = asyncio.get_running_loop().create_future()
        self.socket.subscribe(topic)
        return topic, mark

    def answered(self, topic: bytes) -> None:
        """Settles a mark, if it is one of these."""
        mark = self.marks.pop(topic, None)
        if mark is None:
            return
        if not mark.done():
            mark.set_result(None)
        if not self.socket.closed:
            self.socket.unsubscribe(topic)


def _end(future: asyncio.Future[Any], error: BatosError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waits for it no more need not be told that nobody looked
