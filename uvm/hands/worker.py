"""The child: a zygote that forks workers on demand, and the worker, which serves one job and exits.

The zygote is started clean, before the kernel holds any secret, imports what methods may use, and obeys the
pool over a control socket. A worker locks itself down, then reads its job from a socket of its own. Nothing
here imports ZODB, torch, pydantic, asyncio or zmq.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from uvm.codec import encode
from uvm.errors import DoesNotUnderstand, ValueNotStorable
from uvm.guardian import PersistenceGuardian
from uvm.hands import methods
from uvm.hands.frames import LENGTH, MAX_PRINTED, pack, unpack
from uvm.hands.orders import BURY, CHECK, FORK, MAX_TOKENS, STATUS, unpack_order
from uvm.hands.proxy import to_proxies
from uvm.hands.reports import missed, raised, slot_missing
from uvm.hands.sandbox import CHANNEL, Limits, Sandbox, die_with
from uvm.hands.session import Session

_REAP_MS = 50  # how often the zygote looks after workers that it has killed
_WARM_UPS = 50  # calls after which the interpreter has specialised the code that every call runs
# Made beforehand: later there may be no memory to make them, and a new worker finds them warm.
_READY, _EXHAUSTED, _STARVED = pack("ready", None), pack("exhausted", None), pack("starved", None)


def main(control_fd: int, pool_pid: int) -> None:
    """Runs the zygote, and in each process that it forks, a worker.

    Args:
        control_fd: descriptor of the socket over which the pool sends, first, the limits, then its orders.
        pool_pid: pid of the process that started this one.
    """
    die_with(pool_pid)
    control = socket.socket(fileno=control_fd)
    _, limits = unpack(control.recv(1 << 16))
    sandbox = Sandbox(Limits(**limits), pool_pid)
    methods.preload()
    for _ in range(_WARM_UPS):
        _warm_up()
    gc.collect()
    gc.freeze()
    _Zygote(control, sandbox).serve()


class _Zygote:
    """Obeys orders; `serve` returns in no worker.

    Attributes:
        refusal: the frame that a worker sends where the zygote's own layers could not be applied.
    """

    def __init__(self, control: socket.socket, sandbox: Sandbox) -> None:
        self._control = control
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._sandbox = sandbox
        self._pid = os.getpid()
        self._pids: dict[int, int] = {}  # token -> pid of a worker not reaped yet
        self._ends: dict[int, tuple[int, float]] = {}  # token -> exit status and CPU time of a reaped one
        self._forgotten: set[int] = set()  # tokens of killed workers whose end interests nobody
        self.refusal = b""
        try:
            sandbox.enclose()
        except Exception as error:
            self.refusal = _refused(error)

    def serve(self) -> None:
        """Obeys until the pool hangs up."""
        while True:
            packet, descriptors = self._next()
            if not packet:
                break
            verb, tokens = unpack_order(packet)
            if verb in (FORK, CHECK):
                # Where this process can't take all descriptors, the last ones are closed: the kernel sees it.
                for token in tokens[: len(descriptors)]:
                    self._fork(token, descriptors, verb)
            else:
                for token in tokens:
                    self._end(token, verb)
        for pid in self._pids.values():
            _kill(pid)

    def _next(self) -> tuple[bytes, list[int]]:
        waiting = True
        while waiting:
            waiting = not self._poll.poll(_REAP_MS if self._forgotten else None)
            self._reap()
        packet, descriptors, *_ = socket.recv_fds(self._control, 1 << 10, MAX_TOKENS)
        return packet, descriptors

    def _fork(self, token: int, channels: list[int], verb: bytes) -> None:
        """Makes a worker; it takes the first of the channels, and none of those of its siblings."""
        channel = channels.pop(0)
        refusal, pid = self.refusal, None
        try:
            pid = os.fork() if not refusal else None
        except OSError:  # no memory, or too many processes; it passes
            refusal = _STARVED
        if pid == 0:
            _Worker(self._sandbox, self._pid, channel, channels).serve(verb)
        if pid is not None:
            self._pids[token] = pid
        with contextlib.suppress(OSError):  # the pool may have given the worker up by now
            os.write(channel, refusal)
        os.close(channel)

    def _end(self, token: int, verb: bytes) -> None:
        pid = self._pids.get(token)
        if pid is not None:
            _kill(pid)
        if verb == BURY:
            while token in self._pids:
                self._reap(0)
            self._control.send(STATUS.pack(token, *self._ends.get(token, (1, 0.0))))
        if self._ends.pop(token, None) is None and pid is not None:
            self._forgotten.add(token)

    def _reap(self, flags: int = os.WNOHANG) -> None:
        """Takes notice of workers that have ended, and ends what they have left behind."""
        while self._pids:
            pid, status, usage = os.wait4(-1, flags)
            if pid == 0:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # its number is not given away again so soon
            token = next(token for token, known in self._pids.items() if known == pid)
            del self._pids[token]
            if token in self._forgotten:
                self._forgotten.discard(token)
            else:
                cpu_s = usage.ru_utime + usage.ru_stime
                self._ends[token] = os.waitstatus_to_exitcode(status), cpu_s
            flags |= os.WNOHANG


def _kill(pid: int) -> None:
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):  # the leader of no group yet
            kill(pid, signal.SIGKILL)


def _refused(error: BaseException) -> bytes:
    return pack("refused", f"{type(error).__name__}: {error}")


class _Worker:
    """One process, one job.

    Args:
        parent: pid of the zygote.
        channel: descriptor of the socket that leads to the pool.
        others: those of workers to come.
    """

    def __init__(self, sandbox: Sandbox, parent: int, channel: int, others: list[int]) -> None:
        self._sandbox = sandbox
        self._parent = parent
        self._channel = channel
        self._others = others
        self._jobs: dict[str, Callable[[Any], bytes]] = {
            "call": self._call,
            "audit": self._audit,
            "compile": self._compile,
        }

    def serve(self, verb: bytes) -> NoReturn:
        """Locks the process down, serves one job, and ends the process, whatever happens."""
        try:
            self._take_channel()
            _write(self._examine() if verb == CHECK else self._answer())
        finally:
            os._exit(0)

    def _examine(self) -> bytes:
        try:
            return pack("checked", self._sandbox.check(self._parent))
        except Exception as error:
            return _refused(error)

    def _answer(self) -> bytes:
        try:
            self._sandbox.lock_down(self._parent)
        except Exception as error:
            return _refused(error)
        _warm_up()  # touches what a call needs: its pages are copied now, while nobody waits
        _write(_READY)
        try:
            kind, job = _receive()
            return self._jobs[kind](job)
        except MemoryError:
            return _EXHAUSTED

    def _take_channel(self) -> None:
        for other in self._others:
            os.close(other)
        os.dup2(0, 1)  # the zygote's stdin is /dev/null
        os.dup2(0, 2)
        if self._channel != CHANNEL:
            os.dup2(self._channel, CHANNEL)

    def _ask(self, kind: str, payload: Any) -> Any:
        _write(pack(kind, payload))
        return _receive()[1]

    def _call(self, job: dict[str, Any]) -> bytes:
        session = Session(self._ask, job["views"], job["target"], job["overlay"])
        sys.stdout = sys.stderr = printed = _Printed()
        try:
            result = _send(session, job)
            return pack("returned", _handed_in(session, result, printed))
        except MemoryError:
            raise
        except ValueNotStorable as error:
            return pack("unstorable", {"message": error.message, **error.details})
        except DoesNotUnderstand as error:
            report = missed(error, session)
            if report is not None:
                return pack("missed", report)
            return pack("raised", raised(slot_missing(error), job["selector"]))
        except BaseException as error:
            return pack("raised", raised(error, job["selector"]))

    def _audit(self, job: dict[str, Any]) -> bytes:
        audit = PersistenceGuardian().audit_code(job["source"], job["selector"], job["parameters"])
        findings = [list(dataclasses.astuple(finding)) for finding in audit.findings]
        told = {"source": audit.source, "findings": findings, "doc": audit.doc}
        return pack("audited", told | {"parameters": list(audit.parameters)})

    def _compile(self, job: list[list[str]]) -> bytes:
        return pack("compiled", [methods.bytecode(source, file) for source, file in job])


def _write(frame: bytes) -> None:
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(CHANNEL, rest) :]


def _receive() -> tuple[str, Any]:
    (length,) = LENGTH.unpack(_exactly(LENGTH.size))
    return unpack(_exactly(length))


def _exactly(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(CHANNEL, size)
        if not part:  # the pool has no use for this worker any more
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _warm_up() -> None:
    """Runs a call of its own.

    In the zygote, so that a worker finds the code specialised by the interpreter, which writes into the code;
    in a worker, so that the pages which every call writes to are its own before the job comes.
    """
    _, job = unpack(_WARM_JOB[LENGTH.size :])
    session = Session(lambda kind, payload: None, job["views"], job["target"], job["overlay"])
    pack("returned", _handed_in(session, _send(session, job), _Printed()))
    methods.compiled.cache_clear()


def _warm_job() -> bytes:
    source = "def warm(self, x):\n    return x\n"
    code = {"warm": methods.bytecode(source, "warm")}
    view: dict[str, Any] = {"name": None, "parents": [], "slots": {"n": encode(1)}, "large": [], "code": code}
    job = {"target": "", "selector": "warm", "args": [1], "kwargs": {}, "overlay": {}}
    return pack("call", {**job, "views": {"": {**view, "methods": {"warm": source}}}})


_WARM_JOB = _warm_job()


class _Printed(io.StringIO):
    """Keeps the first `MAX_PRINTED` characters of what is printed."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, MAX_PRINTED - self.tell())])
        return len(text)


def _send(session: Session, job: dict[str, Any]) -> Any:
    method = session.read(job["target"], job["selector"])
    args, kwargs = to_proxies([job["args"], job["kwargs"]], session.proxy)
    return method(*args, **kwargs)


def _handed_in(session: Session, result: Any, printed: _Printed) -> dict[str, Any]:
    return {
        "result": session.encoded(result, "the result"),
        "writes": session.writes(),
        "created": session.created(),
        "discarded": session.discarded(),
        "printed": printed.getvalue(),
    }
