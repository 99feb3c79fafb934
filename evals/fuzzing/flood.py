"""The other half of `evals.fuzz`: wild frames to a real kernel, each of which must be answered.

One client sends ahead of the answers, as fast as the kernel takes the frames, and compares each answer with
what the protocol says. Beside it the kernel's memory and descriptors are read from `/proc`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from evals.fuzzing.frames import MAX_BYTES, Frame, expected, wild
from evals.kernels import KernelProcess
from uvm.awakening import PERSONAS
from uvm.messages import pack_request, unpack

AHEAD = 200  # frames sent before their answers have come; fewer than the kernel's queue holds
PATIENCE_MS = 20_000
SAMPLES = 100
_WARM = 0.2  # the part of a run after which memory is to be flat
_GROWTH_MIB = 8.0


@dataclass(slots=True)
class Flooded:
    """What came of a flood.

    Attributes:
        answers: kind of the answer ("*": carried out) -> how many.
        wrong: answers that the protocol does not allow, the first few.
        lost: frames without an answer.
        oversize: frames over the limit, each of which must close its connection: how many did.
        rss_mib: the kernel's memory, MiB, at even distances.
        descriptors: its open descriptors at the same moments.
    """

    sent: int = 0
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    oversize: tuple[int, int] = (0, 0)
    rss_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    alive: bool = False

    @property
    def growth_mib(self) -> float:
        """By how much the memory of the last samples exceeds that of the first after the warm-up, MiB."""
        warm = self.rss_mib[int(len(self.rss_mib) * _WARM) :]
        part = max(1, len(warm) // 4)
        return max(warm[-part:]) - max(warm[:part]) if warm else 0.0

    @property
    def memory_is_flat(self) -> bool:
        return self.growth_mib <= _GROWTH_MIB

    @property
    def descriptors_are_flat(self) -> bool:
        warm = self.descriptors[int(len(self.descriptors) * _WARM) :]
        return bool(warm) and warm[-1] <= warm[0]


def flood(frames: int, seed: int = 1, tell: Callable[[str], None] = lambda line: None) -> Flooded:
    """Sends `frames` wild frames to a kernel of its own.

    Args:
        tell: told from time to time how far it is.
    """
    with tempfile.TemporaryDirectory(prefix="batos-fuzz-") as folder, _kernel(Path(folder)) as kernel:
        flooded = _Client(kernel, frames, random.Random(seed), tell).run()
        flooded.alive = kernel.process is not None and kernel.process.poll() is None
    return flooded


@contextmanager
def _kernel(folder: Path) -> Iterator[KernelProcess]:
    script = folder / "script.json"
    script.write_text(json.dumps([{"pattern": "", "reply": "Nothing."}]), encoding="utf-8")
    settings = {
        "PERSONA_MODELS": json.dumps(dict.fromkeys(PERSONAS, f"scripted:{script}")),
        "SENTENCE_TRANSFORMER_MODEL": "hashing",
        "MAX_MESSAGE_BYTES": str(MAX_BYTES),
    }
    kernel = KernelProcess(folder / "home", settings)
    kernel.start()
    try:
        yield kernel
    finally:
        kernel.stop()


class _Client:
    def __init__(
        self, kernel: KernelProcess, frames: int, rng: random.Random, tell: Callable[[str], None]
    ) -> None:
        self._kernel = kernel
        self._frames = frames
        self._rng = rng
        self._tell = tell
        self._context = zmq.Context()
        self._due: Counter[tuple[str, str]] = Counter()
        self._told = Flooded()

    def run(self) -> Flooded:
        """Sends all frames and reads all answers."""
        began = time.monotonic()
        self._socket = self._connect()
        try:
            for part in range(SAMPLES):
                if not self._send(self._frames * (part + 1) // SAMPLES - self._told.sent):
                    break
                self._sample()
                if part % 10 == 9:
                    self._oversize()
                    self._progress(began)
        finally:
            self._context.destroy(linger=0)
        self._told.seconds = time.monotonic() - began
        self._told.lost = self._due.total()
        return self._told

    def _send(self, count: int) -> bool:
        """Sends frames and waits for all their answers; returns whether all came."""
        for _ in range(count):
            frame = wild(self._rng, self._told.sent)
            self._due[expected(frame)] += 1
            self._socket.send_multipart(frame)
            self._told.sent += 1
            while self._socket.poll(0 if self._due.total() < AHEAD else PATIENCE_MS):
                self._take(self._socket.recv_multipart())
            if self._due.total() >= AHEAD:
                return False
        while self._due.total():
            if not self._socket.poll(PATIENCE_MS):
                return False
            self._take(self._socket.recv_multipart())
        return True

    def _take(self, frame: Frame) -> None:
        """Crosses an answer off the list of those that are due."""
        reply = unpack(frame[-1])
        kind = "ok" if reply["ok"] else reply["error"]["type"]
        who = repr(reply["id"])
        if self._due[who, kind]:
            due = (who, kind)
        elif self._due[who, "*"] and kind != "InternalError":
            due = (who, "*")
        else:
            self._told.wrong.append(f"{who}: {reply}"[:500]) if len(self._told.wrong) < 5 else None
            return
        self._due[due] -= 1
        if not self._due[due]:
            del self._due[due]
        self._told.answers[kind] += 1

    def _oversize(self) -> None:
        """Sends a frame that is too long over a connection of its own, which the kernel must close."""
        socket = self._connect()
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send(pack_request("1", "ping", {"more": "x" * 2 * MAX_BYTES}))
        closed, tried = self._told.oversize
        is_closed = bool(monitor.poll(PATIENCE_MS)) and bool(recv_monitor_message(monitor))
        self._told.oversize = (closed + is_closed, tried + 1)
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)

    def _sample(self) -> None:
        proc = Path(f"/proc/{self._kernel.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        self._told.rss_mib.append(round(pages * 4096 / (1 << 20), 1))
        self._told.descriptors.append(len(list((proc / "fd").iterdir())))

    def _progress(self, began: float) -> None:
        rate = self._told.sent / (time.monotonic() - began)
        memory = f"{self._told.rss_mib[-1]:.0f} MiB, {self._told.descriptors[-1]} descriptors"
        self._tell(f"{self._told.sent:,} frames, {rate:,.0f} a second, {memory}")

    def _connect(self) -> zmq.Socket[bytes]:
        keys, socket = self._kernel.home / "keys", self._context.socket(zmq.DEALER)
        socket.curve_serverkey, _ = zmq.auth.load_certificate(keys / "kernel.key")
        public, secret = zmq.auth.load_certificate(keys / "client.key_secret")
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.connect(self._kernel.environment["BATOS_ZMQ_ENDPOINT"])
        return socket
