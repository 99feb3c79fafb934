"""Real want for kernels under test: small disks, disks that turn read-only, few descriptors, little memory.

A disk is a file system of its own, mounted where only a holder process and the kernels started with it see
it; it is gone when the holder ends.
"""

from __future__ import annotations

import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from evals.kernels import KernelProcess

ON_DISK = {
    "DB_FILE": "data/live_image.fs",
    "BLOB_DIR": "data/live_image.fs.blob",
    "METACOGNITION_LOG_FILE": "data/metacognition.jsonl",
    "MIN_FREE_MIB": "0",
}
# What a kernel takes for the wall clock and for fsync: both do as the first 16 bytes of a file say.
_SHIM = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *told; /* seconds that the clock is off; the errno that fsync fails with */

__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("SHIM_TOLD"), O_RDONLY);
    told = mmap(0, 16, PROT_READ, MAP_SHARED, file, 0);
    close(file);
}

int clock_gettime(clockid_t id, struct timespec *at) {
    int failed = syscall(SYS_clock_gettime, id, at);
    if (!failed && told && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += told[0];
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int fsync(int file) {
    if (told && told[1]) {
        errno = told[1];
        return -1;
    }
    return syscall(SYS_fsync, file);
}
"""
_BLOCK = b"\0" * 4096


class Disk:
    """A file system at `home/data`, for one kernel after the other.

    Args:
        home: of the kernels.
        mount: what mounts it, in a shell, at `$0`.
    """

    def __init__(self, home: Path, mount: str) -> None:
        self._home = home
        place = home / "data"
        place.mkdir(parents=True, exist_ok=True)
        alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
        self.holder = subprocess.Popen(
            [*alone, "sh", "-c", f"{mount} && echo mounted && exec cat", str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.holder.stdout is not None
        assert self.holder.stderr is not None
        if self.holder.stdout.readline() != b"mounted\n":
            reason = self.holder.stderr.read().decode(errors="replace").strip()
            self.close()
            pytest.skip(f"no file system can be mounted here: {reason}")
        self.path = Path(f"/proc/{self.holder.pid}/root{place}")

    def close(self) -> None:
        self.holder.communicate()

    def kernel(self, settings: dict[str, str]) -> KernelProcess:
        """Returns a kernel, not yet started, whose image and log are on this disk."""
        kernel = KernelProcess(self._home, {**ON_DISK, **settings})
        inside = ["nsenter", f"--target={self.holder.pid}", "--mount", f"--wdns={self._home}"]
        if os.geteuid() != 0:
            inside += ["--user", "--preserve-credentials"]
        kernel.command = [*inside, *kernel.command]
        return kernel

    def fill(self, leave: int = 0) -> None:
        """Takes all room but `leave` bytes."""
        told = os.statvfs(self.path)
        left = told.f_bavail * told.f_frsize - leave
        with (self.path / "filler").open("ab", buffering=0) as filler:
            try:
                while left > 0:
                    left -= filler.write(_BLOCK[:left])
            except OSError:  # full
                assert leave == 0

    def free(self) -> None:
        (self.path / "filler").unlink()


def small_disk(home: Path, mib: int = 8) -> Disk:
    return Disk(home, f'mount -t tmpfs -o size={mib}m none "$0"')


def brittle_disk(home: Path) -> Disk:
    """Returns an ext4 file system that an error turns read-only; called again, the same one."""
    missing = [tool for tool in ("mkfs.ext4", "findmnt") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip("needs root, mkfs.ext4 and findmnt")
    file = home.parent / "brittle.ext4"
    if not file.exists():
        with file.open("wb") as image:
            image.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(file)], check=True)
    return Disk(home, f'mount -o loop,errors=remount-ro {file} "$0"')


def turn_read_only(disk: Disk) -> None:
    """Has the kernel of the system meet an error on a brittle disk."""
    place = disk.path.relative_to(f"/proc/{disk.holder.pid}/root")
    found = ["findmnt", "--noheadings", "--output=SOURCE", f"--task={disk.holder.pid}", f"/{place}"]
    device = Path(subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()).name
    Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("a test")


class Shim:
    """A library between a kernel and the C library."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        source, self._library, self._told = folder / "shim.c", folder / "shim.so", folder / "shim.told"
        source.write_text(_SHIM)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(self._library), str(source)], check=True)
        self.tell()

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "SHIM_TOLD": str(self._told)}

    def tell(self, clock_s: int = 0, fsync_errno: int = 0) -> None:
        """Sets by how much the wall clock is off, and what fsync fails with."""
        with self._told.open("r+b" if self._told.exists() else "wb") as file:
            file.write(struct.pack("=qq", clock_s, fsync_errno))


@contextmanager
def limited(pid: int, which: int, most: int) -> Iterator[None]:
    """Gives a running process less of a resource, for a while."""
    assert pid > 1
    soft, hard = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (most, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, which, (soft, hard))


def address_space(pid: int) -> int:
    """Returns how many bytes of address space a process has taken."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()
