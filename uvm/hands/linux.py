"""The system calls of Linux that Python has no name for: what the layers of the sandbox are made of.

Each raises OSError where the kernel refuses. Runs in the zygote and its children: imports the standard
library alone, and finds out about the C library before any wall is up.
"""

from __future__ import annotations

import ctypes
import os
import sys

AVAILABLE = sys.platform == "linux"

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 1, 2, 3, 4
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = (
    0x0002_0000,
    0x0400_0000,
    0x0800_0000,
    0x1000_0000,
    0x4000_0000,
)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 16384, 1 << 18
_MS_REMOUNT, _MNT_DETACH = 32, 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_RESTRICT = 444, 446  # the same on every architecture
_LANDLOCK_VERSION = 1  # flag: tell the version instead of creating a rule set
_CAPABILITY_VERSION_3 = 0x2008_0522

if AVAILABLE:
    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    _LIBC.syscall.restype = ctypes.c_long
    _LIBC.unshare.argtypes = [ctypes.c_int]
    _LIBC.mount.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p]
    _LIBC.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def _demand(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int = 0, more: int = 0) -> int:
    return _demand(int(_LIBC.prctl(option, value, more, 0, 0)), f"prctl {option}")


def set_parent_death_signal(number: int) -> None:
    """Has the kernel send this process a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def parent_death_signal() -> int:
    """Returns the signal that the end of the parent sends, 0 for none."""
    found = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.addressof(found))
    return found.value


def set_no_new_privileges() -> None:
    """Makes sure that no exec gives this process or its children more rights; can't be taken back."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def no_new_privileges() -> bool:
    """Returns whether `set_no_new_privileges` was called here or in an ancestor."""
    return _prctl(_PR_GET_NO_NEW_PRIVS) == 1


def set_not_dumpable() -> None:
    """Closes this process to debuggers and to readers of its memory of the same user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def dumpable() -> bool:
    """Returns whether other processes of the same user may look into this one."""
    return _prctl(_PR_GET_DUMPABLE) != 0


class SeccompFilter:
    """A compiled seccomp program, ready to be installed.

    Args:
        program: the BPF instructions, 8 bytes each.
    """

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    def __init__(self, program: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(program, len(program))
        self._program = self._Program(len(program) // 8, ctypes.addressof(self._instructions))
        self._address = ctypes.addressof(self._program)

    def install(self) -> None:
        """Lets the filter decide about every system call of this process from now on."""
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._address)


def leave_namespaces() -> None:
    """Gives this process network, IPC, host name and mounts of its own, and an empty root it can't write to.

    Root does it as root; an ordinary user needs a user namespace, which some systems forbid.
    """
    flags = _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS | _CLONE_NEWNS
    uid, gid = os.geteuid(), os.getegid()
    _demand(_LIBC.unshare(flags if uid == 0 else flags | _CLONE_NEWUSER), "unshare")
    if uid:
        _tell("setgroups", "deny")
        _tell("uid_map", f"{uid} {uid} 1")
        _tell("gid_map", f"{gid} {gid} 1")
    _empty_root()


def _tell(file: str, text: str) -> None:
    with open(f"/proc/self/{file}", "w") as told:
        told.write(text)


def _empty_root() -> None:
    _mount(b"none", b"/", b"none", _MS_REC | _MS_PRIVATE)  # what follows stays in this namespace
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount(b"none", b"/tmp", b"tmpfs", flags, b"size=4k,nr_inodes=1,mode=0555")
    os.chdir("/tmp")
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: its number is not known on {os.uname().machine}")
    _demand(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _demand(_LIBC.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")
    _mount(b"none", b"/", b"none", _MS_REMOUNT | _MS_RDONLY | flags)


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes = b"") -> None:
    _demand(_LIBC.mount(source, target, kind, flags, data), f"mount {target.decode()}")


def landlock_version() -> int:
    """Returns the version of Landlock's interface, 0 where there is none."""
    return max(0, int(_LIBC.syscall(_SYS_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)))


def landlock_everything() -> None:
    """Forbids all that Landlock knows: every file, TCP, and signals and sockets beyond this process's own."""
    version = landlock_version()
    files = 16 if version >= 5 else 12 + min(version, 3)  # rights, one bit each
    rights = (ctypes.c_uint64 * 3)((1 << files) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _demand(_LIBC.syscall(_SYS_LANDLOCK_CREATE, rights, size, 0), "landlock_create_ruleset")
    try:
        _demand(_LIBC.syscall(_SYS_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    finally:
        os.close(rules)


def drop_capabilities() -> None:
    """Gives up every capability, those inside a user namespace of our own included."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _demand(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def capabilities() -> int:
    """Returns the bits of the capabilities that this process has or may take up."""
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _demand(_LIBC.capget(header, sets), "capget")
    return sets[0] | sets[1] | (sets[3] | sets[4]) << 32
