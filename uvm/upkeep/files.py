"""Files of upkeep: written whole or not at all, on disk before they count, and who may write them now."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zc.lockfile import LockError, LockFile

from uvm.disk import whole
from uvm.errors import BatosError, ResourceExhausted, UpkeepBusy, UpkeepError
from uvm.pressure import exhausted

_PIECE = 1 << 20


@contextmanager
def typed_errors(what: str) -> Iterator[None]:
    """Turns errors of the system into errors of the tree, which name what failed by it."""
    try:
        yield
    except BatosError:
        raise
    except Exception as error:
        if (pressed := exhausted(error)) is not None:
            path = pressed.details.get("path")
            where = f" ({path})" if path else ""
            raise ResourceExhausted(f"{what}: {pressed}{where}", **pressed.details) from error
        if not isinstance(error, OSError):
            raise
        path = str(error.filename or "")
        where = f" ({path})" if path else ""
        raise UpkeepError(f"{what}: {error.strerror or error}{where}", path=path) from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuses what will need so many bytes in a folder, where they are not free.

    Raises:
        ResourceExhausted: they are not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceExhausted(
            f"{what}: it needs {needed:,} bytes, {free:,} are free; make room and try again",
            resource="disk",
            path=str(folder),
        )


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


def copy(source: Path, target: Path) -> str:
    """Copies a file; `target` has its name only when it is whole and on disk.

    Returns:
        The SHA-256 of what was read, in hex digits.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reading, whole(target) as writing:
        while piece := reading.read(_PIECE):
            digest.update(piece)
            writing.write(piece)
    return digest.hexdigest()


def sum_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    with whole(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns what `write_json` wrote; None where there is no such file, or not a whole one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # the last: brackets in brackets
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


def copy_blobs(
    source: Path, target: Path, names: dict[str, int], known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Copies the blob files that `target` does not have, or has damaged.

    Blob files never change, so one of the same name, size and sum is the same.

    Args:
        names: relative name -> size in bytes.
        known: relative name -> SHA-256 that a file in `target` should have; without one, the size decides.

    Returns:
        Relative name -> SHA-256.
    """
    sums: dict[str, str] = {}
    for name, size in names.items():
        place = target / name
        if place.is_file() and place.stat().st_size == size:
            sums[name] = sum_of(place)
        if name not in sums or sums[name] != (known or {}).get(name, sums[name]):
            sums[name] = copy(source / name, place)
    layout = source / ".layout"
    if names and layout.is_file() and not (target / ".layout").exists():
        copy(layout, target / ".layout")
    return sums


def prune_folders(folder: Path) -> None:
    """Removes the empty folders below a folder."""
    for base, _, _ in os.walk(folder, topdown=False):
        if Path(base) != folder:
            with suppress(OSError):  # it is not empty
                os.rmdir(base)
