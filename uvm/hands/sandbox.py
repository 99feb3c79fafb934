"""The walls around generated code: named layers, each with the act that applies it and a test of it.

The zygote puts up what its workers can inherit, once; each worker adds the rest after its fork and before it
reads its job. `tier` tells honestly what they are worth. Runs in the zygote and its children: imports the
standard library alone.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from uvm.hands import linux

CHANNEL = 3  # the one descriptor that a worker keeps beside /dev/null on 0, 1 and 2
NOBODY = 65534  # uid and gid that root steps down to

if sys.platform != "win32":
    import resource


@dataclass(frozen=True, slots=True)
class Limits:
    """What the layers of all workers of one zygote need to know.

    Attributes:
        memory_mib: address space of a worker beyond what the zygote starts with, MiB.
        cpu_s: CPU time of a worker, s.
        filter: seccomp program; empty where there is none.
        without: layers to leave out; for measurements of what each one stops, never in a kernel.
        required: optional layers that must not be missing, because they held before.
    """

    memory_mib: int
    cpu_s: int
    filter: bytes = b""
    without: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: `apply` raises OSError where it can't; `holds` tries it out, in a worker made for that.

    `optional` tells that a system may refuse it (then it does not hold, and the tier says so); any other
    layer that can't be applied ends the process.
    """

    name: str
    apply: Callable[[Sandbox], object]
    holds: Callable[[Sandbox], bool]
    available: bool = True
    optional: bool = False


@dataclass(slots=True)
class Sandbox:
    """The layers of one zygote and its workers.

    Attributes:
        parent: pid of the process that this one must not outlive.
        missing: optional layers that the system refused, with its words.
    """

    limits: Limits
    parent: int
    missing: dict[str, str] = field(default_factory=dict)
    seccomp: linux.SeccompFilter | None = None

    def enclose(self) -> None:
        """Applies, in the zygote, every layer that its workers inherit, as far as the platform has it.

        Raises:
            OSError, ValueError, OverflowError: a layer could not be applied; nothing must run here.
        """
        if self.limits.filter:
            self.seccomp = linux.SeccompFilter(self.limits.filter)
        for layer in self._wanted(INHERITED):
            try:
                layer.apply(self)
            except OSError as error:
                if not layer.optional or layer.name in self.limits.required:
                    raise
                self.missing[layer.name] = str(error)

    def lock_down(self, parent: int) -> None:
        """Applies a worker's own layers; the last one leaves it a few system calls.

        Args:
            parent: pid of the zygote.

        Raises:
            OSError, ValueError: as `enclose`.
        """
        self.parent = parent
        for layer in self._wanted(OWN):
            layer.apply(self)

    def check(self, parent: int) -> dict[str, bool]:
        """Locks this worker down and returns which layers hold; each is tried out before the next one.

        A later layer would hide an earlier one: under seccomp nothing opens, whatever the others say.
        """
        self.parent = parent
        found = {layer.name: self._holds(layer) for layer in INHERITED}
        for layer in OWN:
            if layer in self._wanted(OWN):
                layer.apply(self)
            found[layer.name] = self._holds(layer)
        return found

    def _wanted(self, layers: Iterable[Layer]) -> list[Layer]:
        return [layer for layer in layers if layer.available and layer.name not in self.limits.without]

    def _holds(self, layer: Layer) -> bool:
        try:
            return layer.available and layer.name not in self.missing and layer.holds(self)
        except OSError:
            return False


def tier(layers: Mapping[str, bool]) -> str:
    """Returns what the layers are worth: A and B are sandboxes, C is only a process with limits."""
    if not layers.get("seccomp"):
        return "C"
    return "A" if all(layers.values()) else "B"


def limit(kind: int, value: int) -> None:
    """Sets a resource limit of this process, soft and hard: what is exceeded can't be raised or ignored."""
    resource.setrlimit(kind, (value, value))


def die_with(parent: int) -> None:
    """Makes the kernel kill this process when the thread that started it ends, where Linux can.

    Args:
        parent: pid of the starting process, which may have died before this call.
    """
    if linux.AVAILABLE:
        linux.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _step_down(sandbox: Sandbox) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    linux.drop_capabilities()
    die_with(sandbox.parent)  # a change of user has taken that back


def _has_no_rights(sandbox: Sandbox) -> bool:
    return 0 not in (*os.getresuid(), *os.getresgid()) and linux.capabilities() == 0


def _is_alone(sandbox: Sandbox) -> bool:
    return not os.path.lexists("/proc") and [name for _, name in socket.if_nameindex()] == ["lo"]


def _no_folder_opens(sandbox: Sandbox) -> bool:
    return _fails(errno.EACCES, lambda: os.close(os.open("/", os.O_RDONLY)))


def _limit_memory(sandbox: Sandbox) -> None:
    limit(resource.RLIMIT_AS, _address_space() + (sandbox.limits.memory_mib << 20))


def _address_space() -> int:
    """Returns the size of this process's address space in bytes, 0 where the system does not tell."""
    if not linux.AVAILABLE or not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _memory_is_limited(sandbox: Sandbox) -> bool:
    try:
        bytearray((sandbox.limits.memory_mib + 1) << 20)
    except MemoryError:
        return True
    return False


def _limit_files(sandbox: Sandbox) -> None:
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)


def _files_are_limited(sandbox: Sandbox) -> bool:
    return resource.getrlimit(resource.RLIMIT_FSIZE) == resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


def _forks_fail(sandbox: Sandbox) -> bool:
    try:
        pid = os.fork()  # root, and who has the capability, forks whatever the limit says
    except OSError:
        return True
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return False


def _cpu_is_limited(sandbox: Sandbox) -> bool:
    return resource.getrlimit(resource.RLIMIT_CPU) == (sandbox.limits.cpu_s, sandbox.limits.cpu_s)


def _keep_one_descriptor(sandbox: Sandbox) -> None:
    os.closerange(CHANNEL + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    limit(resource.RLIMIT_NOFILE, 0)  # what is open stays usable; no other will ever open


def _no_descriptor_opens(sandbox: Sandbox) -> bool:
    return _fails(errno.EMFILE, os.pipe)


def _install_filter(sandbox: Sandbox) -> None:
    if sandbox.seccomp is not None:
        sandbox.seccomp.install()


def _calls_are_filtered(sandbox: Sandbox) -> bool:
    return sandbox.seccomp is not None and _fails(errno.EPERM, lambda: os.stat("/"))


def _fails(number: int, act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError as error:
        return error.errno == number
    return False


# In the order of their application: each may need what a later one takes away.
INHERITED = (
    Layer("memory", _limit_memory, _memory_is_limited, linux.AVAILABLE),
    Layer(
        "namespaces",
        lambda sandbox: linux.leave_namespaces(),
        _is_alone,
        linux.AVAILABLE,
        optional=True,
    ),
    Layer("unprivileged", _step_down, _has_no_rights, linux.AVAILABLE),
    Layer(
        "no_new_privileges",
        lambda sandbox: linux.set_no_new_privileges(),
        lambda sandbox: linux.no_new_privileges(),
        linux.AVAILABLE,
    ),
    Layer(
        "not_dumpable",
        lambda sandbox: linux.set_not_dumpable(),
        lambda sandbox: not linux.dumpable(),
        linux.AVAILABLE,
    ),
    Layer("files", _limit_files, _files_are_limited),
    Layer(
        "landlock",
        lambda sandbox: linux.landlock_everything(),
        _no_folder_opens,
        linux.AVAILABLE,
        optional=True,
    ),
)
OWN = (
    Layer("session", lambda sandbox: os.setsid(), lambda sandbox: os.getsid(0) == os.getpid()),
    Layer(
        "dies_with_parent",
        lambda sandbox: die_with(sandbox.parent),
        lambda sandbox: linux.parent_death_signal() == signal.SIGKILL,
        linux.AVAILABLE,
    ),
    Layer("processes", lambda sandbox: limit(resource.RLIMIT_NPROC, 0), _forks_fail),
    Layer("cpu", lambda sandbox: limit(resource.RLIMIT_CPU, sandbox.limits.cpu_s), _cpu_is_limited),
    Layer("descriptors", _keep_one_descriptor, _no_descriptor_opens),
    Layer("seccomp", _install_filter, _calls_are_filtered, linux.AVAILABLE),
)
NAMES = tuple(layer.name for layer in (*INHERITED, *OWN))
