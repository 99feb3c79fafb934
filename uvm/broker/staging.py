"""What a transaction writes into granted folders: nothing touches the disk before the transaction commits.

A resource manager of the `transaction` package. Voting writes temporary files and brings them to the disk,
with an entry of the moves log; finishing renames them, after the image has committed; aborting removes them.
Imports `folder`, `moves` and the errors.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ZODB.POSException import ConflictError

from uvm.broker import folder
from uvm.broker.folder import Parts, Signature
from uvm.broker.moves import MISSING, Entry, Move, MovesLog, settle
from uvm.errors import FilesNotWritten
from uvm.pressure import exhausted

_LAST = "\U0010ffff"  # sorts after every storage: the image commits before files appear
if sys.platform != "win32":  # there are no hands there, and so no grants
    import fcntl

    _NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Place:
    """A file in a granted folder; two grants may lead to the same one."""

    root: str
    parts: Parts

    @property
    def path(self) -> str:
        """Where it is on the disk."""
        return os.path.join(self.root, *self.parts)


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of a file: its new content, or None to delete it.

    Attributes:
        before: signature of the file that was read, which the change builds on, or `MISSING`; None where
            none was read.
        granted: whether the grant still holds; asked when the transaction votes.
    """

    place: Place
    content: bytes | None
    before: Signature | None
    granted: Callable[[], bool]


@dataclass(slots=True)
class _Ready:
    """A change that only needs to be made visible: `temporary` in `root` becomes the file in `parent`."""

    change: Change
    root: int
    parent: int
    temporary: str | None
    target: Signature

    def move(self) -> Move:
        return Move(self.change.place.root, self.change.place.parts, self.temporary, self.target)


class StagedFiles:
    """The changes of one transaction.

    Args:
        log: told of the moves before the image commits.
        since: id of the newest transaction of the image.

    Attributes:
        changes: by path on the disk.
        token: of the entry in the log; the transaction carries it.
    """

    def __init__(self, changes: dict[str, Change], log: MovesLog, since: str) -> None:
        self.changes = changes
        self.token = secrets.token_hex(16)
        self._log = log
        self._since = since
        self._ready: list[_Ready] = []
        self._voted = False
        self._held = ExitStack()  # the descriptors between voting and the end

    # The contract of a resource manager

    def sortKey(self) -> str:  # noqa: N802 (the name that the package asks for)
        """Returns a key after those of all storages."""
        return f"{_LAST}{id(self)}"

    def tpc_begin(self, _: Any) -> None:
        """Has nothing to begin."""

    def commit(self, _: Any) -> None:
        """Has nothing to do before the vote."""

    def tpc_vote(self, _: Any) -> None:
        """Writes everything to the disk, under temporary names.

        Raises:
            FilesNotWritten: a file can't be written, or its grant is gone.
            ConflictError: a file that a change builds on has changed.
        """
        for path in sorted(self.changes):
            change = self.changes[path]
            if not change.granted():
                raise FilesNotWritten(f"{_told(change)}: the grant was revoked meanwhile", committed=False)
            try:
                self._ready.append(self._prepare(change))
            except OSError as error:
                raise _not_written(change, error, committed=False) from error
        try:
            self._log.write(Entry(self.token, self._since, tuple(ready.move() for ready in self._ready)))
        except OSError as error:
            raise _not_written(change, error, committed=False) from error
        self._voted = True

    def tpc_finish(self, _: Any) -> None:
        """Makes everything visible.

        Raises:
            FilesNotWritten: a file could not be put in its place, though the image has committed.
        """
        failed = None
        for ready in self._ready:
            try:
                settle(ready.root, ready.parent, ready.change.place.parts[-1], ready.temporary)
            except OSError as error:
                failed = failed or _not_written(ready.change, error, committed=True)
        self._ready.clear()
        self._held.close()
        if failed is not None:
            raise failed
        self._log.forget(self.token)

    def tpc_abort(self, _: Any) -> None:
        """Removes whatever was written.

        Once it has voted, only an image that failed in its last step leads here: whether that committed, the
        next start finds out, and does with the files what it finds.
        """
        for ready in () if self._voted else self._ready:
            if ready.temporary is not None:
                _discard(ready.temporary, ready.root)
        self._ready.clear()
        self._held.close()

    abort = tpc_abort

    def savepoint(self) -> _Savepoint:
        """Returns what takes the changes back to what they are now."""
        return _Savepoint(self, dict(self.changes))

    def _prepare(self, change: Change) -> _Ready:
        root = self._held.enter_context(folder.opened(change.place.root))
        parent = self._held.enter_context(folder.parent_of(root, change.place.parts))
        sweep(root, self._log.waiting())
        now = folder.found(parent, change.place.parts)
        target = MISSING if now is None else folder.signature(now)
        if change.before not in (None, target):
            raise ConflictError(f"{_told(change)} was changed by somebody else")
        if change.content is None:
            return _Ready(change, root, parent, None, target)
        name, file = self._temporary(root)
        ready = _Ready(change, root, parent, name, target)
        try:
            _fill(file, change.content, now)
        except BaseException:
            _discard(name, root)
            raise
        return ready

    def _temporary(self, root: int) -> tuple[str, int]:
        """Returns name and descriptor of a new file, locked so that no sweep takes it for a leftover."""
        while True:
            name = f"{folder.TEMPORARY}{secrets.token_hex(8)}"
            file = os.open(name, _NEW_FILE, 0o666, dir_fd=root)
            self._held.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_nlink:
                    return name, file
            except BlockingIOError:
                pass  # a sweep came between making and locking it, and takes it away
            except BaseException:
                _discard(name, root)
                raise


class _Savepoint:
    def __init__(self, staged: StagedFiles, changes: dict[str, Change]) -> None:
        self._staged = staged
        self._changes = changes

    def rollback(self) -> None:
        """Takes the changes back."""
        self._staged.changes = dict(self._changes)


def sweep(root: int, kept: frozenset[str]) -> None:
    """Removes what a kernel that was killed left half-written in a folder, given by its descriptor."""
    for name in os.listdir(root):
        if folder.LEFTOVER.fullmatch(name) and name not in kept:
            with contextlib.suppress(OSError), ExitStack() as stack:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
                stack.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its kernel lives
                os.unlink(name, dir_fd=root)


def _discard(name: str, root: int) -> None:
    """Removes a temporary file; one that can't be removed is left for the next sweep."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=root)


def _fill(file: int, content: bytes, before: os.stat_result | None) -> None:
    """Brings the content to the disk, with owner and rights of the file that it will replace."""
    if before is not None:
        with contextlib.suppress(PermissionError):
            os.fchown(file, before.st_uid, before.st_gid)
        os.fchmod(file, before.st_mode & 0o777)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.fsync(file)


def _not_written(change: Change, error: OSError, *, committed: bool) -> FilesNotWritten:
    reason = error.strerror or str(error)
    after = "; the image has committed, and the next start tries it again" if committed else ""
    pressed = exhausted(error)
    want = {} if pressed is None else {"resource": pressed.details["resource"]}
    return FilesNotWritten(f"{_told(change)} was not written: {reason}{after}", committed=committed, **want)


def _told(change: Change) -> str:
    return "/".join(change.place.parts)
