"""The heartbeat: shows the watchdog that this kernel still answers.

The kernel asks itself a real `ping` over its own control socket, as any client would, and writes one byte to
the watchdog for each answer: a deaf bridge, a reader that died and a blocked event loop all show as silence.
Its key lives in memory alone. `batos.py` wires it between bridge and watchdog; it knows neither. Layer 4.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from uvm.errors import ConfigError
from uvm.keyfiles import read_public
from uvm.messages import pack_request, unpack

VARIABLE = "BATOS_WATCHDOG_FD"
INTERVAL_S = 1.0
PATIENCE_S = 5.0  # a request or an answer that was lost with its connection is not waited for
BEAT, LEAVING = b".", b"q"  # `min_watchdog_service.py` knows these two


class Lifeline:
    """The kernel's end of the socket pair that its watchdog made.

    Args:
        descriptor: of the inherited socket; no child process inherits it from here.

    Raises:
        ConfigError: it is no socket.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            os.set_inheritable(descriptor, False)
            self._socket = socket.socket(fileno=descriptor)
            self._socket.setblocking(False)
        except (OSError, OverflowError):
            raise ConfigError(f"{VARIABLE} is set by the watchdog alone; unset it") from None

    @classmethod
    def inherited(cls) -> Lifeline | None:
        """Returns what the watchdog left in the environment, and takes it from there; None without one.

        Raises:
            ConfigError: it is no socket.
        """
        text = os.environ.pop(VARIABLE, None)
        return None if text is None else cls(int(text) if text.isdecimal() else -1)

    def watch(self, gone: Callable[[], None]) -> None:
        """Has `gone` called on the running loop once the watchdog has ended, however that happened."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            try:
                ended = not self._socket.recv(4096)
            except BlockingIOError:
                return
            except OSError:
                ended = True
            if ended:
                loop.remove_reader(self._socket)
                gone()

        loop.add_reader(self._socket, look)

    def tell(self, sign: bytes) -> None:
        """Writes one sign; a watchdog that does not read, or is gone, holds up nobody."""
        with contextlib.suppress(OSError):
            self._socket.send(sign)

    def close(self) -> None:
        """Lets go of the socket; not while its end is watched."""
        self._socket.close()


class Heartbeat:
    """Pings this kernel and tells the watchdog of each answer.

    Args:
        endpoint: where the kernel listens for commands, as a client on this machine reaches it.
        keys_dir: where the kernel's public key lies.
        tell: called with `BEAT` for each answer, and with `LEAVING` when the kernel ends for good.

    Attributes:
        public_key: to be admitted, in Z85; made for this kernel's life and written nowhere.

    Raises:
        HomeError: the kernel's public key can't be read.
    """

    def __init__(self, endpoint: str, keys_dir: Path, tell: Callable[[bytes], None]) -> None:
        self._endpoint = endpoint
        self._tell = tell
        public, secret = zmq.curve_keypair()
        self.public_key = public.decode("ascii")
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.curve_serverkey = read_public(keys_dir / "kernel.key")
        self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to beat, once a second."""
        self._socket.connect(self._endpoint)
        self._task = asyncio.create_task(self._beat())

    async def close(self, *, leaving: bool = True) -> None:
        """Ends the beats.

        Args:
            leaving: whether the watchdog is to know that the kernel was told to end, and is not to come back.
        """
        if leaving:
            self._tell(LEAVING)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _beat(self) -> None:
        for number in itertools.count(1):
            with contextlib.suppress(Exception):  # no memory, say: the next one may do
                async with asyncio.timeout(PATIENCE_S):
                    await self._socket.send(pack_request(str(number), "ping", {}))
                    while unpack(await self._socket.recv())["id"] != str(number):
                        pass  # the late answer to an earlier one
                    self._tell(BEAT)
            await asyncio.sleep(INTERVAL_S)
