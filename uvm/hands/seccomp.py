"""The list of system calls that a worker may make, compiled for this machine by libseccomp.

Kernel's side: a zygote is given the compiled program, so that it needs no library for it. Everything that is
not on the list fails with EPERM inside the worker.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile

# What an interpreter needs that computes, allocates, waits and talks over descriptors that it already has.
ALLOWED = (
    *("read", "write", "close", "fstat", "lseek", "poll", "ppoll"),
    *("munmap", "brk", "mremap", "madvise"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "sigaltstack", "restart_syscall"),
    *("sched_yield", "futex", "getpid", "gettid", "exit", "exit_group", "getrandom"),
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time"),
)
NEVER_EXECUTABLE = ("mmap", "mprotect")  # allowed without PROT_EXEC, which is their third argument
_PROTECTION = 2


def compile_filter() -> bytes | None:
    """Returns the BPF program for this machine's architecture; None where there is no libseccomp."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError):  # no Linux, or no libseccomp.so.2
        return None
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in ALLOWED:
        if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:  # not all architectures have all
            rules.add_rule(pyseccomp.ALLOW, name)
    plain = pyseccomp.Arg(_PROTECTION, pyseccomp.MASKED_EQ, mmap.PROT_EXEC, 0)
    for name in NEVER_EXECUTABLE:
        rules.add_rule(pyseccomp.ALLOW, name, plain)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        return os.pread(file.fileno(), 1 << 20, 0)
