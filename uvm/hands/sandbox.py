"""The lock-down of a worker: named layers, each with the act that applies it and a test whether it holds.

A worker applies them after its fork and before it reads its job. `tier` tells honestly what they are worth.
Runs in the zygote and its children: imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

LINUX = sys.platform == "linux"
CHANNEL = 3  # the one descriptor that a worker keeps beside /dev/null on 0, 1 and 2

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 1, 2, 3, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39

if sys.platform != "win32":
    import resource

if LINUX:
    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the layers of one worker need to know.

    Attributes:
        channel: descriptor of the worker's socket.
        parent: pid of the zygote.
        memory_mib: address space beyond the zygote's, MiB.
        start_bytes: address space of the zygote, which a worker begins with.
    """

    channel: int
    parent: int
    memory_mib: int
    start_bytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: `apply` raises OSError where it can't; `holds` tries it out, in a worker made for that."""

    name: str
    apply: Callable[[Limits], object]
    holds: Callable[[Limits], bool]
    available: bool = True


def _prctl(option: int, value: int = 0) -> int:
    result = int(_LIBC.prctl(option, value, 0, 0, 0))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
    return result


def die_with(parent: int) -> None:
    """Makes the kernel kill this process when the thread that started it ends.

    Args:
        parent: pid of the starting process, which may have died before this call.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _dies_with_parent(limits: Limits) -> bool:
    found = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.addressof(found))
    return found.value == signal.SIGKILL


def harden(parent: int) -> None:
    """Ties this process to its parent and closes it to other processes of the user, where Linux can."""
    if LINUX:
        die_with(parent)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)


def limit(kind: int, value: int) -> None:
    """Sets a resource limit of this process, soft and hard: what is exceeded can't be raised or ignored."""
    resource.setrlimit(kind, (value, value))


def address_space() -> int:
    """Returns the size of this process's address space in bytes, 0 where the system does not tell."""
    if not LINUX:
        return 0
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _limit_memory(limits: Limits) -> None:
    limit(resource.RLIMIT_AS, limits.start_bytes + (limits.memory_mib << 20))


def _memory_is_limited(limits: Limits) -> bool:
    try:
        bytearray((limits.memory_mib + 1) << 20)
    except MemoryError:
        return True
    return False


def _keep_one_descriptor(limits: Limits) -> None:
    os.dup2(0, 1)  # the zygote's stdin is /dev/null
    os.dup2(0, 2)
    if limits.channel != CHANNEL:
        os.dup2(limits.channel, CHANNEL)
    os.closerange(CHANNEL + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    limit(resource.RLIMIT_NOFILE, 0)  # what is open stays usable; no other will ever open


def _no_descriptor_opens(limits: Limits) -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return True
    return False


def _limit_files(limits: Limits) -> None:
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)


def _files_are_limited(limits: Limits) -> bool:
    return resource.getrlimit(resource.RLIMIT_FSIZE) == resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


def _forks_fail(limits: Limits) -> bool:
    try:
        pid = os.fork()  # the kernel lets root fork whatever the limit says
    except OSError:
        return True
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return False


LAYERS = (
    Layer("session", lambda limits: os.setsid(), lambda limits: os.getsid(0) == os.getpid()),
    Layer("dies_with_parent", lambda limits: die_with(limits.parent), _dies_with_parent, LINUX),
    Layer(
        "no_new_privileges",
        lambda limits: _prctl(_PR_SET_NO_NEW_PRIVS, 1),
        lambda limits: _prctl(_PR_GET_NO_NEW_PRIVS) == 1,
        LINUX,
    ),
    Layer(
        "not_dumpable",
        lambda limits: _prctl(_PR_SET_DUMPABLE, 0),
        lambda limits: _prctl(_PR_GET_DUMPABLE) == 0,
        LINUX,
    ),
    Layer("memory", _limit_memory, _memory_is_limited, LINUX),
    Layer("files", _limit_files, _files_are_limited),
    Layer("processes", lambda limits: limit(resource.RLIMIT_NPROC, 0), _forks_fail),
    # The last one: as long as it has not been applied, a worker can say what failed.
    Layer("descriptors", _keep_one_descriptor, _no_descriptor_opens),
)


def lock_down(limits: Limits) -> None:
    """Applies every layer that this platform has.

    Raises:
        OSError, ValueError, OverflowError: a layer could not be applied; the worker must not run anything.
    """
    for layer in LAYERS:
        if layer.available:
            layer.apply(limits)


def check(limits: Limits) -> dict[str, bool]:
    """Returns which layers hold, each tried out; the limit on CPU time comes with the job, which knows it."""
    found = {layer.name: layer.available and layer.holds(limits) for layer in LAYERS}
    return found | {"cpu": resource.getrlimit(resource.RLIMIT_CPU)[1] != resource.RLIM_INFINITY}


def tier(layers: dict[str, bool]) -> str:
    """Returns what the layers are worth: A and B are sandboxes, C is only a process with limits."""
    if not layers.get("seccomp"):
        return "C"
    return "A" if layers.get("namespaces") and layers.get("landlock") else "B"
