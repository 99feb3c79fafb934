"""The kernel's end of the zygote and of its workers: a process, its control socket, a socket for each hand.

Knows frames, but not what they say. Must run on the thread that runs for as long as the kernel does: the
zygote dies with the thread that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from uvm.errors import HandOutputTooLarge, MalformedMessage
from uvm.hands.frames import LENGTH, pack, unpack
from uvm.hands.orders import BURY, CHECK, END, FORK, MAX_TOKENS, STATUS, pack_order
from uvm.hands.sandbox import Limits

_ROOT = Path(__file__).resolve().parents[2]
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from uvm.hands.worker import main; "
    "main(*map(int, sys.argv[2:]))"
)
_CHUNK = 256 << 10
_END_S = 10.0  # a zygote that takes longer to go is killed


class HandGone(Exception):
    """The worker ended; `unread` says that it can't have begun its job."""

    def __init__(self, unread: bool) -> None:
        self.unread = unread


class Hand:
    """The kernel's end of one worker: frames go out, frames come in.

    Args:
        token: the zygote's name for the worker.
        output_bytes: longest frame that is read.
    """

    def __init__(self, token: int, channel: socket.socket, output_bytes: int) -> None:
        self.token = token
        self.ended = False
        self.closed = False
        self._channel = channel
        self._limit = output_bytes
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._heard = 0  # frames, of which the first says that the worker is ready
        self._unread = True  # whether the worker can't have read its job
        self._news: asyncio.Future[None] | None = None
        self._watched = False
        channel.setblocking(False)
        self._fd = channel.fileno()

    def look(self) -> None:
        """Reads what has come; a spare is not watched, so that making one never wakes the loop."""
        while self._receive():
            pass

    async def send(self, frame: bytes) -> None:
        """Sends a frame; to a worker that is no longer there, in vain, as `frame` will tell."""
        try:
            self._unread = False
            await self._loop.sock_sendall(self._channel, frame)
        except ConnectionError:
            self._unread = self._heard == 1

    async def frame(self) -> tuple[str, Any]:
        """Returns kind and payload of the next frame.

        Raises:
            HandGone: the worker ended first.
            HandOutputTooLarge: the frame announces more than `output_bytes`.
            MalformedMessage: no frame, or more than one at a time.
        """
        while (body := self._take()) is None:
            if self.ended:
                raise HandGone(self._unread)
            if not self._watched:
                self._watched = True
                self._loop.add_reader(self._fd, self._receive)
            self._news = self._loop.create_future()
            await self._news
        self._heard += 1
        return unpack(body)

    def close(self) -> None:
        """Closes the socket, which ends a worker that waits for a job."""
        if not self.closed:
            self.closed = True
            self._unwatch()
            self._channel.close()

    def _receive(self) -> bool:
        """Takes in what has come; returns whether there may be more."""
        if self.ended:
            return False
        try:
            data = self._channel.recv(_CHUNK)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it ended with a frame of ours still in its socket
            self._unread = self._heard == 1
            data = b""
        self._buffer += data
        self.ended = not data
        full = len(self._buffer) > self._limit + LENGTH.size  # enough for any honest frame
        if self.ended or full:
            self._unwatch()
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        return not full

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._fd)

    def _take(self) -> bytes | None:
        """Returns the body of the frame in the buffer, or None while it is not complete."""
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        if length > self._limit:
            raise HandOutputTooLarge(f"an answer of {length} bytes is larger than {self._limit}")
        if len(self._buffer) < LENGTH.size + length:
            return None
        if len(self._buffer) > LENGTH.size + length:
            raise MalformedMessage("it spoke out of turn")
        body = bytes(self._buffer[LENGTH.size :])
        self._buffer.clear()
        return body


class Zygote:
    """The kernel's handle on the process that forks workers; it must be closed or lost.

    Args:
        limits: the layers of the sandbox need them.
        output_bytes: longest frame that is read from a hand.
    """

    def __init__(self, limits: Limits, output_bytes: int) -> None:
        self.alive = True
        self._output_bytes = output_bytes
        self._tokens = count(1)
        self._graves: dict[int, asyncio.Future[tuple[int, float] | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start(theirs.fileno())
        self._control.setblocking(False)
        self._loop.add_reader(self._control, self.look)
        self._send(pack("limits", dataclasses.asdict(limits))[LENGTH.size :])

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def fork(self, number: int, verb: bytes = FORK) -> list[Hand]:
        """Returns hands whose workers are being made; a job can be sent at once."""
        hands = []
        while number > 0:
            tokens = list(islice(self._tokens, min(number, MAX_TOKENS)))
            pairs = _pairs(len(tokens))
            self._send(pack_order(verb, tokens), [theirs.fileno() for _, theirs in pairs])
            for token, (ours, theirs) in zip(tokens, pairs, strict=True):
                theirs.close()
                hands.append(Hand(token, ours, self._output_bytes))
            number -= len(tokens)
        return hands

    def examiner(self) -> Hand:
        """Returns a hand that tries the sandbox out, says so, and ends."""
        return self.fork(1, CHECK)[0]

    def end(self, hands: Iterable[Hand]) -> None:
        """Kills the workers, if they are still there, with all that they started; not needed after `bury`."""
        tokens = []
        for hand in hands:
            hand.close()
            tokens.append(hand.token)
        for start in range(0, len(tokens), MAX_TOKENS):
            self._send(pack_order(END, tokens[start : start + MAX_TOKENS]))

    async def bury(self, hand: Hand) -> tuple[int, float] | None:
        """Ends a worker whose socket has closed.

        Returns:
            Its exit status, negative for a signal, and the CPU time that it used, s; None if the zygote
            died with it.
        """
        hand.close()
        grave = self._graves[hand.token] = self._loop.create_future()
        self._send(pack_order(BURY, [hand.token]))
        try:
            async with asyncio.timeout(_END_S):
                return await grave if self.alive else None
        except TimeoutError:
            self.lose()
            return None
        finally:
            del self._graves[hand.token]

    async def close(self) -> None:
        """Ends the zygote, which takes its workers with it."""
        self._hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _END_S)
        self.lose()

    def lose(self) -> None:
        """Makes sure that the process is gone; whoever waits for a burial stops waiting."""
        self._hang_up()
        self._process.kill()
        self._process.wait()

    def _hang_up(self) -> None:
        if self.alive:
            self.alive = False
            self._loop.remove_reader(self._control)
            self._control.close()
            for grave in self._graves.values():
                if not grave.done():
                    grave.set_result(None)

    def _send(self, packet: bytes, descriptors: Sequence[int] = ()) -> None:
        if self.alive:
            try:
                socket.send_fds(self._control, [packet], descriptors)
            except OSError:  # it died, or has not listened for a long time
                self.lose()

    def look(self) -> None:
        """Reads what the zygote says; notices a death that the loop has not told yet."""
        if not self.alive:
            return
        try:
            report = self._control.recv(STATUS.size)
        except BlockingIOError:
            return
        except ConnectionResetError:
            report = b""
        if len(report) != STATUS.size:
            self.lose()
            return
        token, status, cpu_s = STATUS.unpack(report)
        if token in self._graves:
            self._graves[token].set_result((status, cpu_s))


def _pairs(number: int) -> list[tuple[socket.socket, socket.socket]]:
    """Returns so many pairs of sockets, or keeps none of them."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(number):
            pair = socket.socketpair()
            stack.enter_context(pair[0])
            stack.enter_context(pair[1])
            pairs.append(pair)
        stack.pop_all()
    return pairs


def _start(control_fd: int) -> subprocess.Popen[bytes]:
    """Starts the zygote with nothing of this process but one socket, and errors going to our stderr."""
    command = [sys.executable, "-I", "-X", "utf8", "-W", "ignore", "-c", _BOOT]
    return subprocess.Popen(
        [*command, str(_ROOT), str(control_fd), str(os.getpid())],
        env={"LD_BIND_NOW": "1"},  # all is resolved once, not again by each worker
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[control_fd],
        start_new_session=True,
    )
