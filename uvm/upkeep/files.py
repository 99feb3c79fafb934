"""Files of upkeep: written whole or not at all, on disk before they count, and who may write them now."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zc.lockfile import LockError, LockFile

from uvm.errors import ResourceExhausted, UpkeepBusy, UpkeepError

PART = ".part"  # ends the name of a file that is not whole yet
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


def exhausted(error: OSError, what: str) -> ResourceExhausted | UpkeepError:
    """Returns what an error of the system means for `what`, in one line."""
    path = str(error.filename or "")
    where = f" ({path})" if path else ""
    if error.errno in _FULL:
        return ResourceExhausted(
            f"{what}: no space left{where}; make room and try again", resource="disk", path=path
        )
    if error.errno == errno.EROFS:
        return ResourceExhausted(
            f"{what}: the file system is read-only{where}; mount it for writing",
            resource="read_only",
            path=path,
        )
    if error.errno in _DESCRIPTORS:
        return ResourceExhausted(
            f"{what}: no descriptors left; close files or raise `ulimit -n`", resource="descriptors"
        )
    return UpkeepError(f"{what}: {error.strerror or error}{where}", path=path)


@contextmanager
def typed_errors(what: str) -> Iterator[None]:
    """Turns errors of the system into errors of the tree."""
    try:
        yield
    except OSError as error:
        raise exhausted(error, what) from error


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Holds the lock in file `path`; the end of the process releases it, however it ends.

    Raises:
        UpkeepBusy: another process or thread holds it.
    """
    try:
        lock = LockFile(str(path))
    except LockError:
        raise UpkeepBusy(f"another {what} is under way ({path}); try again when it is done") from None
    try:
        yield
    finally:
        lock.close()


def image_lock(image: Path) -> Path:
    """Returns the lock of all upkeep that must not meet a pack of this image."""
    return Path(f"{image}.upkeep.lock")


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Brings a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """Copies a file; `target` has its name only when it is whole and on disk."""
    part = target.with_name(target.name + PART)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as reading, part.open("wb") as writing:
            shutil.copyfileobj(reading, writing, 1 << 20)
            writing.flush()
            os.fsync(writing.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        copy(source, target)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is whole whenever it is there."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns what `write_json` wrote; None where there is no such file, or not a whole one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def blob_files(folder: Path) -> dict[str, int]:
    """Returns the committed blob files below a folder: relative name -> size in bytes."""
    found: dict[str, int] = {}
    for base, folders, names in os.walk(folder):
        if Path(base) == folder and "tmp" in folders:
            folders.remove("tmp")  # blobs of transactions that have not committed
        for name in names:
            path = Path(base, name)
            if name.endswith(".blob") and path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def copy_blobs(source: Path, target: Path, names: dict[str, int]) -> int:
    """Copies the blob files that `target` does not have; returns how many bytes it copied.

    Blob files never change, so one of the same name and size is the same.
    """
    copied = 0
    for name, size in names.items():
        place = target / name
        if not place.is_file() or place.stat().st_size != size:
            copy(source / name, place)
            copied += size
    layout = source / ".layout"
    if names and layout.is_file() and not (target / ".layout").exists():
        copy(layout, target / ".layout")
    return copied


def prune_folders(folder: Path) -> None:
    """Removes the empty folders below a folder."""
    for base, _, _ in os.walk(folder, topdown=False):
        if Path(base) != folder:
            with suppress(OSError):  # it is not empty
                os.rmdir(base)
