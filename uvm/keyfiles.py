"""Key files: read with suspicion, written whole, kept private. `uvm.keys` says which there are.

Used by the kernel and by clients; knows no other organ.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from uvm.errors import HomeError

MAX_KEY_FILE = 16_384  # bytes
STARVED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR}  # nothing is wrong with the file
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_public(path: Path) -> bytes:
    """Returns the public key in a key file, in Z85.

    Raises:
        HomeError: it is missing, torn, or no regular file.
        OSError: the system has no room to read it now.
    """
    return _load(path)[0]


def read_pair(path: Path) -> tuple[bytes, bytes]:
    """Returns public and secret key of a secret key file, in Z85.

    Raises:
        HomeError: it is missing, torn, no regular file, or others can read it.
    """
    public, secret = _load(path)
    _check_is_private(path)
    if secret is None or not _is_key(secret) or zmq.curve_public(secret) != public:
        raise _damaged(path, "holds no whole key pair")
    return public, secret


def exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def listed(folder: Path) -> list[Path]:
    """Returns the key files of a folder; what starts with a dot is about to become one.

    Raises:
        OSError: the folder is there but can't be read, which says nothing about what it holds.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []
    return [folder / name for name in names if name.endswith(".key") and not name.startswith(".")]


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Makes files 0600 and folders 0700."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HomeError(f"can't make the folder {folder} ({error.strerror})", path=str(folder)) from None


def make_pair(keys_dir: Path, secret: Path, *publics: Path) -> None:
    """Makes a pair; each file appears whole, the secret last: where it is, its public key was published."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=keys_dir) as folder:
        made_public, made_secret = zmq.auth.create_certificates(folder, "pair")
        for number, public in enumerate(publics):
            _place(keys_dir, shutil.copy(made_public, Path(folder) / f"{number}.key"), public)
        _place(keys_dir, made_secret, secret)


def publish(keys_dir: Path, source: Path, target: Path) -> None:
    """Copies a public key; `target` appears whole."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=keys_dir) as folder:
        _place(keys_dir, shutil.copy(source, folder), target)


def give(keys_dir: Path, path: Path) -> None:
    """Gives what root made to the owner of `keys_dir`: a service of that user must be able to read it."""
    if os.name == "nt" or os.geteuid() != 0:
        return
    owner = keys_dir.stat()
    if path.lstat().st_uid != owner.st_uid:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _place(keys_dir: Path, made: Path | str, target: Path) -> None:
    os.chmod(made, 0o600)
    give(keys_dir, Path(made))
    with open(made, "rb") as file:
        os.fsync(file.fileno())
    os.replace(made, target)


def mend_mode(folder: Path) -> list[str]:
    """Closes a folder that others could look into; refuses one that they could have changed."""
    if os.name == "nt":
        return []
    found = folder.stat()
    if (folder.name in ("clients", "carry") and folder.is_symlink()) or not _is_mine(found):
        raise HomeError(f"{folder} is a link or belongs to somebody else; it must not", path=str(folder))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise HomeError(
            f"others can write into {folder} (mode {_octal(found)}) and may have put keys there; look at it, "
            f"then: chmod 700 {folder}",
            path=str(folder),
        )
    if not found.st_mode & _OTHERS:
        return []
    folder.chmod(0o700)
    return [f"{folder} was open to others (mode {_octal(found)}); it is 700 now"]


def _check_is_private(path: Path) -> None:
    if os.name == "nt":
        return
    found = path.lstat()
    if found.st_mode & _OTHERS or not _is_mine(found):
        raise HomeError(
            f"others can read the secret key {path} (mode {_octal(found)}); if nobody has: chmod 600 {path}",
            path=str(path),
        )


def _is_mine(found: os.stat_result) -> bool:
    return os.geteuid() in (0, found.st_uid)


def _octal(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):03o}"


def _damaged(path: Path, what: str) -> HomeError:
    return HomeError(f"the key file {path} {what}; restore it from a copy, or delete it", path=str(path))


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_KEY_FILE:
            raise _damaged(path, "is no key file (a link, a folder, or too large)")
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in STARVED:
            raise
        reason = error.strerror if isinstance(error, OSError) else "it holds no key"
        raise _damaged(path, f"can't be read ({reason})") from None
    if not _is_key(public):
        raise _damaged(path, "holds no whole key")
    return public, secret


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except (ValueError, KeyError, IndexError, struct.error):
        return False
