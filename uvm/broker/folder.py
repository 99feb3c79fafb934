"""One folder of the disk, and no way out of it: every step is taken relative to an open descriptor.

No path is resolved by the system as a whole: component after component is opened without following links, so
neither `..`, links nor a folder swapped at the wrong moment leads outside. Blocking.
Imports nothing of BAT OS.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

Signature = tuple[int, int, int, int]  # of a file: it changes when the file does
Parts = tuple[str, ...]

TEMPORARY = ".batos-"  # how the names of files on their way to disk begin
LEFTOVER = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")  # such a name in full
MAX_PATH = 1024  # characters
MAX_PART = 255  # bytes
MAX_DEPTH = 32  # components
MAX_ENTRIES = 10_000
_PSEUDO = ("/proc", "/sys", "/dev")
_ODD = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
if sys.platform != "win32":  # there are no hands there, and so no grants
    _FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    _LISTED = os.O_RDONLY | _FOLDER
    _WAY = _FOLDER | getattr(os, "O_PATH", os.O_RDONLY)  # a step needs no right to list
    _FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def parts_of(path: str) -> Parts:
    """Returns the components of a relative path; none for the folder itself.

    Raises:
        PermissionError: it leads out of the folder, or no ordinary file has such a name.
    """
    if len(path) > MAX_PATH:
        raise PermissionError(f"{path[:100]!r} is no name for a file: it is too long")
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if path.startswith("/") or ".." in parts:
        raise PermissionError(f"{path!r:.100}: paths are relative to the folder granted, without '..'")
    odd = len(parts) > MAX_DEPTH or _ODD.search(path)
    if odd or any(len(part.encode()) > MAX_PART for part in parts):
        raise PermissionError(f"{path!r:.100} is no name for a file")
    if any(part.startswith(TEMPORARY) for part in parts):
        raise PermissionError(f"{path!r:.100}: names that begin with {TEMPORARY!r} are BAT OS's own")
    return parts


def settled(path: str, protected: tuple[Path, ...]) -> str:
    """Returns a folder's path without links in it, if the folder may be granted.

    Args:
        protected: what belongs to BAT OS itself.

    Raises:
        ValueError: it is no folder, or it is, contains or lies within something protected.
    """
    real = Path(os.path.realpath(path))
    if not real.is_dir():
        raise ValueError(f"{path} is no folder")
    for own in (*map(Path, _PSEUDO), *(Path(os.path.realpath(known)) for known in protected)):
        if real == own or own in real.parents or real in own.parents:
            raise ValueError(f"{path} can't be granted: {own} is the system's or BAT OS's own")
    return str(real)


@contextmanager
def opened(root: str) -> Iterator[int]:
    """Gives a descriptor of the folder granted.

    Raises:
        FileNotFoundError: it is no longer where it was, or a link has taken its place.
    """
    with ExitStack() as way:
        here = _open(way, "/", _WAY)
        try:
            for part in Path(root).parts[1:]:
                here = _open(way, part, _WAY, here)
            end = os.open(".", _LISTED, dir_fd=here)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError("the folder granted is no longer where it was") from None
    try:
        yield end
    finally:
        os.close(end)


@contextmanager
def parent_of(folder: int, parts: Parts) -> Iterator[int]:
    """Gives a descriptor of the folder that holds the last component; all lie on one file system.

    Raises:
        FileNotFoundError, PermissionError: a component is missing, or is no folder.
    """
    device = os.fstat(folder).st_dev
    with ExitStack() as way:
        here = folder
        for part in parts[:-1]:
            try:
                here = _open(way, part, _WAY, here)
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no folder {part!r}, for {_told(parts)}") from None
            except NotADirectoryError:
                raise PermissionError(
                    f"{part!r} is no folder, for {_told(parts)}; links are refused"
                ) from None
            if os.fstat(here).st_dev != device:
                raise PermissionError(f"{_told(parts)} leads to another file system")
        end = os.open(".", _WAY, dir_fd=here)
    try:
        yield end
    finally:
        os.close(end)


def found(parent: int, parts: Parts) -> os.stat_result | None:
    """Returns what is known of the regular file at the last component, or None where nothing is.

    Raises:
        IsADirectoryError, PermissionError: it is a folder, a link, or anything else that is no plain file.
    """
    try:
        known = os.stat(parts[-1], dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    _check_plain(known, parts)
    return known


def read(root: str, parts: Parts, limit: int) -> tuple[bytes, Signature]:
    """Returns the content of a file, and its signature at that moment.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such plain file.
        ValueError: it has more than `limit` bytes.
    """
    with opened(root) as folder, parent_of(folder, named(parts)) as parent, ExitStack() as stack:
        if found(parent, parts) is None:  # looked at first: opening a device may do something
            raise FileNotFoundError(f"there is no file {_told(parts)}")
        try:
            file = _open(stack, parts[-1], _FILE, parent)
        except OSError as error:
            raise type(error)(f"{_told(parts)} can't be read: {error.strerror}") from None
        known = os.fstat(file)
        _check_plain(known, parts)
        content = bytearray()
        while len(content) <= limit and (more := os.read(file, limit + 1 - len(content))):
            content += more
        check_size(len(content), limit, parts, known.st_size)
        return bytes(content), signature(known)


def check_size(size: int, limit: int, parts: Parts, whole: int | None = None) -> None:
    """Raises ValueError where a file is larger than the grant allows."""
    if size > limit:
        raise ValueError(f"{_told(parts)} has {whole or size} bytes; the grant allows {limit}")


def look(root: str, parts: Parts) -> os.stat_result | None:
    """Returns what is known of a plain file or a folder; None where nothing is, or something refused."""
    with opened(root) as folder:
        if not parts:
            return os.fstat(folder)
        try:
            with parent_of(folder, parts) as parent:
                known = os.stat(parts[-1], dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, PermissionError):
            return None
        return known if stat.S_ISDIR(known.st_mode) or _is_plain(known) else None


def entries(root: str, parts: Parts) -> list[str]:
    """Returns the names of the plain files in a folder, and of its folders, those with a slash at the end.

    Raises:
        FileNotFoundError, PermissionError: there is no such folder.
        ValueError: it has more than `MAX_ENTRIES`.
    """
    with opened(root) as folder, parent_of(folder, (*parts, "")) as parent, ExitStack() as stack:
        names = os.listdir(_open(stack, ".", _LISTED, parent))
        if len(names) > MAX_ENTRIES:
            raise ValueError(f"there are more than {MAX_ENTRIES} names in {_told(parts)}")
        shown = (_shown(parent, name) for name in names if not name.startswith(TEMPORARY))
        return sorted(name for name in shown if name)


def signature(known: os.stat_result) -> Signature:
    """Returns what changes when the file does."""
    return known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns


def _shown(parent: int, name: str) -> str:
    """Returns a name as it is listed, or "" for what is refused or already gone."""
    try:
        known = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return ""
    if _ODD.search(name) or not (stat.S_ISDIR(known.st_mode) or _is_plain(known)):
        return ""
    return f"{name}/" if stat.S_ISDIR(known.st_mode) else name


def _is_plain(known: os.stat_result) -> bool:
    return stat.S_ISREG(known.st_mode) and known.st_nlink <= 1


def _check_plain(known: os.stat_result, parts: Parts) -> None:
    if stat.S_ISDIR(known.st_mode):
        raise IsADirectoryError(f"{_told(parts)} is a folder")
    if not _is_plain(known):
        raise PermissionError(f"{_told(parts)} is no plain file; links and devices are refused")


def named(parts: Parts) -> Parts:
    """Returns the components, of which there is at least one.

    Raises:
        IsADirectoryError: there is none: the path is the folder itself.
    """
    if not parts:
        raise IsADirectoryError("'.' is a folder")
    return parts


def _told(parts: Parts) -> str:
    return repr("/".join(parts) or ".")


def _open(stack: ExitStack, name: str, flags: int, folder: int | None = None) -> int:
    """Returns a descriptor that is closed with the stack."""
    descriptor = os.open(name, flags, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor
