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
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from uvm.codec import encode
from uvm.errors import DoesNotUnderstand, ValueNotStorable
from uvm.guardian import PersistenceGuardian
from uvm.hands import methods, sandbox
from uvm.hands.frames import BURY, END, FORK, LENGTH, MAX_PRINTED, REQUEST, STATUS, pack, unpack
from uvm.hands.proxy import to_proxies
from uvm.hands.reports import missed, raised, slot_missing
from uvm.hands.session import Session

_REAP_S = 0.05  # how often the zygote looks after workers that it has ended
_MAX_DESCRIPTORS = 64  # of the zygote; few, so that a worker can close them all one by one
_WARM_UPS = 50  # calls after which the interpreter has specialised the code that every call runs
_EXHAUSTED = pack("exhausted", None)  # made beforehand: later there may be no memory to make it


def main(control_fd: int, pool_pid: int, memory_mib: int) -> None:
    """Runs the zygote, and in each process that it forks, a worker.

    Args:
        control_fd: descriptor of the socket over which the pool sends requests.
        pool_pid: pid of the process that started this one.
        memory_mib: address space that a worker may use beyond the zygote's, MiB.
    """
    sandbox.harden(pool_pid)
    sandbox.limit(resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS)
    methods.preload()
    for _ in range(_WARM_UPS):
        _warm_up()
    gc.collect()
    gc.freeze()
    zygote_pid, start_bytes = os.getpid(), sandbox.address_space()
    channel = _Zygote(socket.socket(fileno=control_fd)).serve()
    if channel is not None:
        _Worker(sandbox.Limits(channel, zygote_pid, memory_mib, start_bytes)).serve()


class _Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pids: dict[int, int] = {}  # token -> pid of a worker not reaped yet
        self._ended: set[int] = set()  # pids on their way out

    def serve(self) -> int | None:
        """Obeys until the pool hangs up; returns the socket's descriptor in a new worker, None at the end."""
        while True:
            request, descriptors = self._next()
            if not request:
                self._end_all()
                return None
            verb, token = REQUEST.unpack(request)
            if verb == FORK:
                if self._fork(token, descriptors[0]) == 0:
                    self._control.detach()  # the descriptor itself is closed by the lock-down
                    return descriptors[0]
                os.close(descriptors[0])
            elif token in self._pids:
                self._end(verb, token)

    def _next(self) -> tuple[bytes, list[int]]:
        waiting = True
        while waiting:
            self._ended = {pid for pid in self._ended if os.waitpid(pid, os.WNOHANG)[0] == 0}
            waiting = not select.select([self._control], [], [], _REAP_S if self._ended else None)[0]
        request, descriptors, *_ = socket.recv_fds(self._control, REQUEST.size, 1)
        return request, descriptors

    def _fork(self, token: int, channel: int) -> int | None:
        """Returns 0 in the worker; in the zygote its pid, or None where there can be no other process."""
        try:
            pid = os.fork()
        except OSError as error:
            os.write(channel, pack("refused", f"no process can be forked: {error}"))
            return None
        if pid:
            self._pids[token] = pid
        return pid

    def _end(self, verb: bytes, token: int) -> None:
        pid = self._kill(token)
        if verb == END:
            self._ended.add(pid)
        elif verb == BURY:
            _, status, usage = os.wait4(pid, 0)
            cpu_s = usage.ru_utime + usage.ru_stime
            self._control.sendall(STATUS.pack(token, os.waitstatus_to_exitcode(status), cpu_s))

    def _kill(self, token: int) -> int:
        """Kills a worker and what it has started; returns its pid, which stays its own until it is reaped."""
        pid = self._pids.pop(token)
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):  # the leader of no group yet
                kill(pid, signal.SIGKILL)
        return pid

    def _end_all(self) -> None:
        self._ended |= {self._kill(token) for token in list(self._pids)}
        for pid in self._ended:
            os.waitpid(pid, 0)


class _Worker:
    def __init__(self, limits: sandbox.Limits) -> None:
        self._limits = limits
        self._channel = socket.socket(fileno=limits.channel)
        self._jobs: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "call": self._call,
            "audit": self._audit,
            "check": self._check,
        }

    def serve(self) -> None:
        """Locks the process down, serves one job, and ends the process."""
        try:
            sandbox.lock_down(self._limits)
        except Exception as error:
            self._channel.sendall(pack("refused", f"{type(error).__name__}: {error}"))
            os._exit(1)
        self._channel.detach()
        self._channel = socket.socket(fileno=sandbox.CHANNEL)
        self._channel.sendall(pack("ready", None))
        try:
            kind, job = self._receive()
            sandbox.limit(resource.RLIMIT_CPU, job["cpu_s"])
            answer = self._jobs[kind](job)
        except MemoryError:
            answer = _EXHAUSTED
        self._channel.sendall(answer)
        os._exit(0)

    def _receive(self) -> tuple[str, Any]:
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        return unpack(self._exactly(length))

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            count = self._channel.recv_into(rest)
            if count == 0:  # the pool has no use for this worker any more
                os._exit(0)
            rest = rest[count:]
        return bytes(data)

    def _ask(self, kind: str, payload: Any) -> Any:
        self._channel.sendall(pack(kind, payload))
        return self._receive()[1]

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

    def _check(self, job: dict[str, Any]) -> bytes:
        return pack("checked", sandbox.check(self._limits))


def _warm_up() -> None:
    """Runs a call of its own in the zygote, so that a worker finds the code specialised by the interpreter.

    Specialising writes into the code; done in a worker, it would cost a copy of each page that it touches.
    """
    source = "def warm(self, x):\n    return x\n"
    view: dict[str, Any] = {"name": None, "parents": [], "slots": {"n": encode(1)}, "large": []}
    job = {"target": "", "selector": "warm", "args": [1], "kwargs": {}, "overlay": {}}
    _, read = unpack(
        pack("call", {**job, "views": {"": {**view, "methods": {"warm": source}}}})[LENGTH.size :]
    )
    session = Session(lambda kind, payload: None, read["views"], read["target"], read["overlay"])
    unpack(pack("returned", _handed_in(session, _send(session, read), _Printed()))[LENGTH.size :])
    methods.compiled.cache_clear()


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
