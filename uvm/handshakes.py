"""What becomes of a client's connection: whether a kernel is there, and whether it lets the client in.

ZeroMQ refuses below the protocol: a refused client gets no reply and would wait for ever. What it does know,
its monitor tells. Client side: knows the errors only.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from uvm.errors import BatosError, KernelRefused, KernelUnreachable

DOUBT_S = 1.0  # from the first handshake that was cut off to the verdict, where none succeeds in between
SLOW_S = 4.0  # cut off later than this, a handshake ran out of time, and its kernel may be busy
_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


class Handshakes:
    """Watches one connecting socket.

    Args:
        socket: not yet connected.
        endpoint: where it will connect to.
        keys_dir: where its keys come from, for the errors.
        verdict: told of a refusal, and of None when a later handshake succeeds after all.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        endpoint: str,
        keys_dir: Path,
        verdict: Callable[[KernelRefused | None], None],
    ) -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._keys_dir = keys_dir
        self._verdict = verdict
        self._listens = False
        self._ready = False
        self._connected_at = 0.0
        self._doubt: asyncio.TimerHandle | None = None
        self._monitor = socket.get_monitor_socket(_EVENTS)
        self._watch = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stops watching, which must come before the watched socket is closed; safe to call twice."""
        self._settle()
        if not self._socket.closed:  # first: ZeroMQ's thread waits for ever to tell a monitor that has gone
            self._socket.disable_monitor()
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        self._monitor.close(linger=0)

    def silence(self) -> BatosError:
        """Returns what it means that no answer comes."""
        where = {"endpoint": self._endpoint}
        if self._ready:
            return KernelUnreachable(f"the kernel at {self._endpoint} does not answer in time", **where)
        if self._doubt is not None:
            return self._stranger()
        if self._listens:
            return KernelUnreachable(
                f"something listens at {self._endpoint} but does not answer: a busy kernel, or none of ours",
                **where,
            )
        return KernelUnreachable(
            f"no answer from a kernel at {self._endpoint}; start one with ./puter.sh", **where
        )

    async def _follow(self) -> None:
        while True:
            head, _ = await self._monitor.recv_multipart()
            event, _ = struct.unpack("=HI", head)
            self._take(event)

    def _take(self, event: int) -> None:
        now = asyncio.get_running_loop().time()
        if event == zmq.EVENT_CONNECTED:
            self._listens, self._ready, self._connected_at = True, False, now
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._ready = True
            self._settle()
            self._verdict(None)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._settle()
            self._verdict(self._not_listed())
        elif event == zmq.EVENT_CLOSED:  # nobody is there
            self._listens = False
            self._settle()
            self._verdict(None)
        elif self._ready:  # a connection that was good is gone
            self._listens = self._ready = False
        elif self._doubt is None and now < self._connected_at + SLOW_S:  # a kernel that ends, or a stranger
            self._begin_to_doubt()

    def _begin_to_doubt(self) -> None:
        loop = asyncio.get_running_loop()
        self._doubt = loop.call_later(DOUBT_S, lambda: self._verdict(self._stranger()))

    def _settle(self) -> None:
        if self._doubt is not None:
            self._doubt.cancel()
            self._doubt = None

    def _not_listed(self) -> KernelRefused:
        return KernelRefused(
            f"the kernel at {self._endpoint} does not admit the key in {self._keys_dir}; on its machine: "
            f"./puter.sh key add NAME, then set BATOS_KEYS_DIR to the folder that it makes",
            endpoint=self._endpoint,
            keys_dir=str(self._keys_dir),
            reason="not_listed",
        )

    def _stranger(self) -> KernelRefused:
        return KernelRefused(
            f"what listens at {self._endpoint} is not the kernel of the keys in {self._keys_dir}; set "
            f"BATOS_HOME, or BATOS_KEYS_DIR, to those of that kernel",
            endpoint=self._endpoint,
            keys_dir=str(self._keys_dir),
            reason="wrong_server",
        )
