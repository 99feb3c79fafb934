"""What the system has run out of: from what Python, ZODB and ZeroMQ raise then to the one error that says so.

A full disk and the like are nobody's fault and pass, so they must not look like a fault of the kernel. Each
organ raises what it meets; the places where an error decides something (the image, missions, hands, the
bridge) ask here first. Layer 0: knows the errors only.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from uvm.errors import ResourceExhausted

_RESOURCES = {
    errno.ENOSPC: "disk",
    errno.EFBIG: "disk",  # a limit on the size of files (ulimit -f)
    getattr(errno, "EDQUOT", errno.ENOSPC): "disk",
    errno.EMFILE: "descriptors",
    errno.ENFILE: "descriptors",
    errno.ENOMEM: "memory",
    errno.ENOBUFS: "memory",
    errno.EROFS: "read_only",
}
_TOLD = {
    "disk": "the disk is full; free some space, then try again",
    "descriptors": "no file descriptors are left; close connections or raise the limit (ulimit -n), "
    "then try again",
    "memory": "the kernel has no memory left; try again when there is more, or with less at once",
    "read_only": "the file system is read-only; make it writable, then try again",
}
_NO_THREAD = (
    "can't start new thread"  # a RuntimeError without a number; the system refuses for want of memory
)
_LOOK_S = 1.0  # a look at the disk is good for so long


def exhausted(error: BaseException) -> ResourceExhausted | None:
    """Returns what ran out, if that is what an error says; else None.

    `details` holds `resource` (`disk`, `descriptors`, `memory`, `read_only`) and, where known, `path`.
    """
    if isinstance(error, ResourceExhausted):
        return error
    resource = _resource(error)
    if resource is None:
        return None
    path = getattr(error, "filename", None)
    where = {"path": os.fsdecode(path)} if isinstance(path, (str, bytes)) else {}
    return ResourceExhausted(_TOLD[resource], resource=resource, **where)


def out_of_memory() -> ResourceExhausted:
    """Returns what to raise where another process of ours was told so."""
    return ResourceExhausted(_TOLD["memory"], resource="memory")


@contextmanager
def typed() -> Iterator[None]:
    """Raises `ResourceExhausted` for an error which says that something ran out; lets all others through."""
    try:
        yield
    except Exception as error:
        pressed = exhausted(error)
        if pressed is None or pressed is error:
            raise
        raise pressed from error


def _resource(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError):
        return "memory" if str(error) == _NO_THREAD else None
    number = getattr(error, "errno", None)  # an OSError's, or a ZMQError's, which is none
    return _RESOURCES.get(number) if isinstance(number, int) else None


def check_memory(size: int) -> None:
    """Refuses what will need so many bytes, where the process can't have them.

    Native code below may end the process where an allocation fails (ormsgpack and libzmq do), so it must not
    come to that. Costs no memory, since nothing is written to it.

    Raises:
        ResourceExhausted: it can't.
    """
    with typed():
        if sys.platform == "win32":
            mmap.mmap(-1, size).close()
        else:
            mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def started(threads: ThreadPoolExecutor, number: int) -> ThreadPoolExecutor:
    """Returns an executor whose threads all run already; `number` is how many it may have.

    One that starts a thread with each task queues the task first: if the system then gives no thread, the
    caller is told that it failed, and the task still runs later.
    """
    all_there = threading.Barrier(number)
    for ready in [threads.submit(all_there.wait) for _ in range(number)]:
        ready.result()
    return threads


class Room:
    """Looks whether the disk has room for more than finishing what is under way.

    Args:
        folder: on the disk in question.
        least_mib: less free space than this is none, MiB; 0 never looks.
    """

    def __init__(self, folder: Path, least_mib: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._least_mib = least_mib
        self._monotonic = monotonic
        self._look_at = 0.0
        self._free_mib = 0

    def check(self, needed_mib: int = 0) -> None:
        """Refuses what would write, where there is too little room; looks at most once a second.

        Args:
            needed_mib: what it writes, beyond the ordinary.

        Raises:
            ResourceExhausted: there is.
        """
        if not self._least_mib or not hasattr(os, "statvfs"):
            return
        now = self._monotonic()
        if now >= self._look_at:
            told = os.statvfs(self._folder)
            self._free_mib = told.f_bavail * told.f_frsize >> 20
            self._look_at = now + _LOOK_S
        if self._free_mib < self._least_mib + needed_mib:
            needed = f", {needed_mib} MiB are needed" * bool(needed_mib)
            raise ResourceExhausted(
                f"{self._free_mib} MiB are left on the disk{needed}, and MIN_FREE_MIB is {self._least_mib}; "
                f"free some space, then try again",
                resource="disk",
                path=str(self._folder),
                free_mib=self._free_mib,
            )
