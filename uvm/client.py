"""The client library: what the terminal client, scripts and evaluations use to talk to a kernel.

    async with Kernel(config.ZMQ_ENDPOINT, config.ZMQ_EVENTS_ENDPOINT, config.KEYS_DIR) as kernel:
        await kernel.teach("genesis_obj", "square", ["x"], "Return x times x.")
        assert await kernel.send("genesis_obj", "square", 12) == 144

Imports layer 0 only. One task reads replies and wakes whoever waits for each, so any number of requests may
be under way on one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import zmq
import zmq.asyncio
import zmq.auth

from uvm.errors import BatosError, KernelUnreachable, from_wire
from uvm.messages import pack_request, unpack

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

    async def __aenter__(self) -> Self:
        """Connects and waits for an answer.

        Raises:
            KernelUnreachable: no kernel answers within the timeout, or its keys are not there.
        """
        try:
            self._socket = self._connect(zmq.DEALER, self._endpoint)
            self._reader = asyncio.create_task(self._read_replies())
            await self.request("ping", timeout_s=self._connect_timeout_s)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; requests under way end as KernelUnreachable."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._forsake("the connection was closed")
        self._context.destroy(linger=0)

    async def request(self, command: str, *, timeout_s: float | None = None, **fields: Any) -> Any:
        """Sends one command and returns its result.

        Args:
            command: a command of `docs/PROTOCOL.md`, with its `fields`.
            timeout_s: how long to wait for the reply; None waits as long as it takes.

        Raises:
            BatosError: whatever the kernel answered, as the type of `uvm.errors` that it is.
            KernelUnreachable: no reply within `timeout_s`.
        """
        request_id = str(next(self._ids))
        payload = pack_request(request_id, command, fields)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send(payload)
                answer = await reply
        except TimeoutError:
            raise KernelUnreachable(
                f"no answer from a kernel at {self._endpoint}; start one with ./puter.sh",
                endpoint=self._endpoint,
            ) from None
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
    ) -> dict[str, Any]:
        """Runs a mission and returns its record.

        Args:
            examples: cases `{args, kwargs?, returns}` or `{args, kwargs?, raises}` that must hold.
            type: `unhandled_message`, or `revision` to replace an existing method.
            wait: False returns as soon as the mission is in the journal.

        Raises:
            MissionFailed: the cycle ended in FAILED.
        """
        brief: dict[str, Any] = {"type": type, "selector": selector, "examples": list(examples)}
        if parameters is not None:
            brief["parameters"] = list(parameters)
        if description is not None:
            brief["description"] = description
        result: dict[str, Any] = await self.request(
            "initiate_cognitive_cycle", target_oid=target, mission_brief=brief, wait=wait
        )
        return result

    async def events(self, *topics: str) -> AsyncIterator[dict[str, Any]]:
        """Yields the kernel's events, of these topics or of all, from the moment of subscription on."""
        socket = self._connect(zmq.SUB, self._events_endpoint)
        try:
            for topic in topics or ("",):
                socket.subscribe(topic)
            while True:
                _topic, payload = await socket.recv_multipart()
                yield unpack(payload)
        finally:
            socket.close(linger=0)

    def _connect(self, kind: int, endpoint: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        try:
            socket.curve_serverkey, _ = zmq.auth.load_certificate(self._keys_dir / "kernel.key")
            public, secret = zmq.auth.load_certificate(self._keys_dir / "client.key_secret")
        except (OSError, ValueError) as error:
            socket.close(linger=0)
            raise KernelUnreachable(
                f"no keys in {self._keys_dir}; a kernel's first start makes them: ./puter.sh",
                keys_dir=str(self._keys_dir),
                reason=str(error),
            ) from None
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.connect(endpoint)
        return socket

    async def _read_replies(self) -> None:
        while True:
            payload = await self._socket.recv()
            with contextlib.suppress(BatosError):  # what is no reply of this protocol answers nobody
                reply = unpack(payload)
                waiting = self._waiting.get(str(reply.get("id")))
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)

    def _forsake(self, reason: str) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(KernelUnreachable(reason, endpoint=self._endpoint))
