"""Keys: which clients may speak to the kernel, and the files that say so.

    keys/                   0700
      kernel.key            the kernel's public key; every client needs it
      kernel.key_secret     0600
      client.key_secret     0600, the key pair of this machine's own client
      clients/NAME.key      the public keys that may connect; a running kernel obeys each change at once (one
                            that is written over in place, within 0.1 s)
      carry/NAME/           the folder of a new client, until it is carried to its machine

`python -m uvm.keys --keys-dir FOLDER add|list|revoke [NAME]` is what `./puter.sh key` runs. The files
themselves: `uvm.keyfiles`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from uvm.errors import BatosError, HomeError, InvalidField
from uvm.keyfiles import (
    exists,
    give,
    listed,
    make_folder,
    make_pair,
    mend_mode,
    private_files,
    publish,
    read_pair,
    read_public,
)

KERNEL, LOCAL = "kernel", "client"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_LOOK_S = 0.1  # how long the times of the key files may be old
_SETTLED_NS = 1_000_000_000  # a change within the same tick of the file system's clock must not be missed


def ensure_keys(keys_dir: Path) -> list[str]:
    """Makes the keys of the kernel and of its first client where they are missing.

    Looks at no file in `clients`: what is wrong there, `AllowedClients` reports, and it keeps out one client.

    Returns:
        What was mended, one line each: folders that others could look into.

    Raises:
        HomeError: a pair, the kernel's or this machine's own client's, is torn or no regular file, or others
            can read a secret or write into a folder.
    """
    folders = (keys_dir, keys_dir / "clients", keys_dir / "carry")
    with private_files():
        for folder in folders:
            make_folder(folder)
            give(keys_dir, folder)
        mended = [line for folder in folders for line in mend_mode(folder)]
        kernel, local = _secret(keys_dir, KERNEL), _secret(keys_dir, LOCAL)
        if not exists(kernel):
            make_pair(keys_dir, kernel, keys_dir / "kernel.key")
        if not exists(local):
            make_pair(keys_dir, local, keys_dir / "client.key", _public(keys_dir, LOCAL))
    read_pair(local)
    if read_public(keys_dir / "kernel.key") != read_pair(kernel)[0]:
        raise HomeError(
            f"{keys_dir / 'kernel.key'} is not the public half of {kernel}; restore one of them from a copy",
            path=str(kernel),
        )
    return mended


def add_client(keys_dir: Path, name: str) -> Path:
    """Admits a new client and returns the folder to carry to its machine, which is its `KEYS_DIR` there.

    For the name of this machine's own client, once revoked, nothing is made: its key is admitted again.

    Raises:
        InvalidField: a name that is none, or is taken.
    """
    ensure_keys(keys_dir)
    public = _public(keys_dir, _checked(name))
    if exists(public):
        raise InvalidField(f"there is already a key {name!r}; revoke it first", name=name)
    if name == LOCAL:
        publish(keys_dir, keys_dir / "client.key", public)
        return keys_dir
    folder = keys_dir / "carry" / name
    try:
        folder.mkdir(mode=0o700)  # of two at once, one wins
    except FileExistsError:
        raise InvalidField(f"{folder} is in the way; remove it first", name=name) from None
    give(keys_dir, folder)
    publish(keys_dir, keys_dir / "kernel.key", folder / "kernel.key")
    make_pair(keys_dir, _secret(folder, LOCAL), public)
    return folder


def revoke_client(keys_dir: Path, name: str, *, force: bool = False) -> None:
    """Refuses a client from now on; a folder of its that still waits to be carried away goes too.

    Raises:
        InvalidField: no such key, or this machine's own, which `./puter.sh` itself needs.
    """
    public = _public(keys_dir, _checked(name))
    if not exists(public):
        raise InvalidField(f"there is no key {name!r}; see: key list", name=name)
    if name == LOCAL and not force:
        raise InvalidField(
            f"{name!r} is this machine's own client; without it ./puter.sh can't speak to the kernel "
            f"(--force revokes it, key add {name} admits it again)",
            name=name,
        )
    public.unlink()
    if name != LOCAL:
        shutil.rmtree(keys_dir / "carry" / name, ignore_errors=True)


def clients(keys_dir: Path) -> dict[str, str]:
    """Returns the clients that may connect: name -> public key in Z85, or what is wrong with its file."""
    found = {}
    for path in listed(keys_dir / "clients"):
        try:
            found[path.stem] = read_public(path).decode()
        except HomeError as error:
            found[path.stem] = f"refused: {error}"
    return found


class AllowedClients:
    """The keys that may connect, as the folder `clients` has them right now.

    To ask costs one `stat`; the files are read again when the folder has changed. A file that is written over
    in place leaves the folder as it was, so the files' times are looked at too, at most ten times a second.

    Args:
        keys_dir: as `ensure_keys` leaves it.
        report: told of a key file that can't be read; nobody gets in by it.

    Attributes:
        revocations: how many times keys have gone.
    """

    def __init__(self, keys_dir: Path, report: Callable[[BaseException], None]) -> None:
        self._folder = keys_dir / "clients"
        self._report = report
        self._names: dict[str, str] = {}
        self._own: set[str] = set()
        self._stamp: tuple[int, ...] = ()  # the times of the folder and its files when they were read
        self._settled = False
        self._file_times: tuple[int, ...] = ()
        self._look_at = 0.0
        self._told: set[str] = set()
        self.revocations = 0
        self.refresh()

    def admit(self, key: str) -> None:
        """Admits a public key of the kernel's own, in Z85: it is in no file, so nobody can revoke it."""
        self._own.add(key)

    def is_own(self, key: str) -> bool:
        """Returns whether the kernel itself admitted this public key."""
        return key in self._own

    def allows(self, key: str) -> bool:
        """Returns whether this public key, in Z85, may connect or go on."""
        self.refresh()
        return key in self._names or key in self._own

    def refresh(self) -> None:
        """Reads the folder again if it has changed."""
        stamp = self._folder_time(), *self._times_of_files()
        if stamp != self._stamp or not self._settled:
            now = time.time_ns()
            self._settled = all(abs(now - then) > _SETTLED_NS for then in stamp)  # one may lie in the future
            self._stamp = stamp if self._read() else ()

    def _folder_time(self) -> int:
        try:
            return os.stat(self._folder).st_mtime_ns
        except OSError:
            return -1

    def _times_of_files(self) -> tuple[int, ...]:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            with contextlib.suppress(OSError):  # one has just gone, or there is no room: look again later
                self._file_times = tuple(path.lstat().st_mtime_ns for path in listed(self._folder))
        return self._file_times

    def callback(self, domain: str, key: bytes) -> bool:
        """Answers pyzmq's authenticator at each handshake; reads the folder whatever its time says."""
        self._read()
        name = key.decode("ascii")
        return name in self._names or name in self._own

    def _read(self) -> bool:
        """Returns whether the folder could be read; where the system has no room for that, the list stays."""
        names: dict[str, str] = {}
        try:
            for path in listed(self._folder):
                self._read_one(path, names)
        except OSError as error:
            self._tell(error)
            return False
        self.revocations += bool(self._names.keys() - names.keys())
        self._names = names
        return True

    def _read_one(self, path: Path, names: dict[str, str]) -> None:
        try:
            names[read_public(path).decode("ascii")] = path.stem
        except HomeError as error:
            if exists(path):  # else it was revoked in between
                self._tell(error)

    def _tell(self, error: HomeError | OSError) -> None:
        if str(error) not in self._told:
            self._told.add(str(error))
            self._report(error)


def _public(keys_dir: Path, name: str) -> Path:
    return keys_dir / "clients" / f"{name}.key"


def _secret(folder: Path, name: str) -> Path:
    return folder / f"{name}.key_secret"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or name == KERNEL:
        raise InvalidField(
            f"{name!r:.80} can't name a key: lower-case letters, digits, - and _, at most 63, not {KERNEL!r}",
            name=name[:80],
        )
    return name


# The command line


def _told(keys_dir: Path) -> Iterator[str]:
    for name, key in clients(keys_dir).items():
        note = "  (this machine's own client)" if name == LOCAL else ""
        if (keys_dir / "carry" / name).exists():
            note = f"  (its folder waits: {keys_dir / 'carry' / name})"
        yield f"{name}  {key}{note}"


def _run(options: argparse.Namespace) -> Iterator[str]:
    """Does what is asked and yields the lines to print."""
    keys_dir: Path = options.keys_dir
    if options.verb == "list":
        yield from _told(keys_dir)
    elif options.verb == "revoke":
        revoke_client(keys_dir, options.name, force=options.force)
        yield f"Key {options.name} is revoked; a running kernel refuses it from now on."
    elif (folder := add_client(keys_dir, options.name)) == keys_dir:
        yield f"Key {options.name} is admitted again."
    else:
        yield f"Key {options.name} may connect now. Its folder, which holds a secret: {folder}"
        yield "Move that folder to the client's machine and set there BATOS_KEYS_DIR to it, and"
        yield "BATOS_ZMQ_ENDPOINT and BATOS_ZMQ_EVENTS_ENDPOINT to this kernel's addresses."


def main(arguments: list[str]) -> int:
    """Runs `key add|list|revoke` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="puter key", description="Which clients may speak to the kernel.", allow_abbrev=False
    )
    parser.add_argument("--keys-dir", type=Path, required=True, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="add|list|revoke")
    verbs.add_parser("list", help="the clients that may connect")
    add = verbs.add_parser("add", help="make a key for a new client, and the folder to carry to its machine")
    revoke = verbs.add_parser("revoke", help="refuse a client from now on, its open connections too")
    revoke.add_argument("--force", action="store_true", help="even this machine's own client")
    for verb in (add, revoke):
        verb.add_argument("name", metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        for line in _run(options):
            print(line)
    except (BatosError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
