"""The living image: the database, its transactions, and what may be in it.

`LivingImage.transaction` is the only place that commits or aborts. Each unit of work has a connection and an
explicit transaction manager of its own: asyncio tasks of one thread would otherwise share the thread's
transaction and commit each other's work. Layer 1.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
)
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, overload

from transaction import TransactionManager
from transaction.interfaces import NoTransaction
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf

from uvm.errors import (
    BatosError,
    Conflict,
    ImageDamaged,
    ObjectNotFound,
    ShuttingDown,
    UpkeepError,
)
from uvm.image import changes, past
from uvm.image.changes import Changes
from uvm.image.loading import typed_errors
from uvm.image.opening import open_database
from uvm.image.recovery import Tell
from uvm.image.steady import gave_up
from uvm.image.txn import Txn
from uvm.pressure import started

CONFLICT_RETRIES = 5

T = TypeVar("T")
OnCommit = Callable[[str, str, str], Awaitable[None]]


async def blocking(work: Callable[[], T], thread: Executor | None = None) -> T:
    """Runs `work` in a thread; a cancelled caller still waits for its end before it is cancelled.

    A commit must not go on behind the back of whoever closes its connection.

    Args:
        thread: where it runs; None is any of the loop's own.
    """
    done = asyncio.get_running_loop().run_in_executor(thread, work)
    cancelled = await _ended(done)
    if cancelled is not None:
        if not done.cancelled():
            done.exception()  # seen: the cancellation is what the caller hears of
        raise cancelled
    return done.result()


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end and returns its result; a cancellation that comes meanwhile comes too late.

    For commits whose outcome the caller must know: it must not take what is committed for interrupted.
    """
    task = asyncio.create_task(work)
    await _ended(task)
    return task.result()


async def _ended(task: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Waits until `task` is done, however often the caller is cancelled; returns the last cancellation."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


class LivingImage:
    """The database and its transactions.

    Args:
        location: a file name, or any zodburi URI.
        blob_dir: folder of the blobs of an image that is a file.
        on_commit: called after each commit with the transaction's id, note and user.
        on_end: called when the storage has closed itself, and only a new start helps.
        cache_objects: objects that each connection keeps in memory between units of work.
        cache_mib: MiB that they may need.
    """

    def __init__(
        self,
        location: str,
        blob_dir: Path,
        on_commit: OnCommit | None = None,
        on_end: Callable[[], None] | None = None,
        *,
        cache_objects: int = 10_000,
        cache_mib: int = 16,
    ) -> None:
        self.location = location
        self._blob_dir = blob_dir
        self._cache_objects = cache_objects
        self._cache_mib = cache_mib
        self._on_commit = on_commit
        self._on_end = on_end
        self._db: Any = None
        self._committer = started(ThreadPoolExecutor(1, "commits"), 1)  # one at a time, as FileStorage has it

    @classmethod
    def in_memory(cls) -> LivingImage:
        """Returns an image that lives in memory alone: for tests and demonstrations."""
        return cls("memory://", Path())

    def open(self, tell: Tell = lambda line: None) -> None:
        """Opens the database; lays the foundations of a new one, mends and migrates an older one.

        Args:
            tell: called with a line for each thing that was not as a clean end leaves it.

        Raises:
            ImageLocked: another process has it open.
            ImageDamaged: it can't be read; the text says what to do.
            ForbiddenClass: the root holds what the allow-list does not know.
        """
        self._db = open_database(
            self.location,
            self._blob_dir,
            tell,
            cache_objects=self._cache_objects,
            cache_mib=self._cache_mib,
        )

    def close(self) -> None:
        """Closes the database; safe to call twice."""
        if self._db is not None:
            self._committer.shutdown()
            self._db.close()
            self._db = None

    @asynccontextmanager
    async def transaction(self, note: str, *, user: str = "kernel") -> AsyncIterator[Txn]:
        """Gives a unit of work its transaction; commits at the end, aborts on any exception or doom.

        Raises:
            Conflict: another transaction changed the same objects first; `attempt` tries again.
        """
        manager = TransactionManager(explicit=True)
        connection = self._db.open(manager)
        try:
            unit = manager.begin()
            unit.note(note)
            unit.user = user
            txn = Txn(manager, connection)
            try:
                with typed_errors(note):
                    yield txn
                    if unit.isDoomed():
                        manager.abort()
                    else:
                        await self._commit(manager, txn)
            except BaseException as error:
                if gave_up(self._db.storage):
                    raise self._closed_itself() from error
                with suppress(NoTransaction):  # committed already, and then cancelled
                    manager.abort()
                raise
        finally:
            connection.close()

    def _closed_itself(self) -> BatosError:
        """Returns what it means that the storage has closed itself, and has the kernel told of it."""
        if self._on_end is not None:
            self._on_end()
        return ShuttingDown(
            "the image's file failed in the last step of a commit, and the kernel starts again; whether this "
            "change was kept, a look will tell",
            committed=None,
        )

    async def _commit(self, manager: TransactionManager, txn: Txn) -> None:
        if not txn.changed:  # nothing was changed: spare the lock and the thread
            manager.abort()
            return
        note, user = manager.get().description, manager.get().user
        try:
            await blocking(lambda: self._commit_now(manager, txn), self._committer)
        finally:
            if txn.tid and self._on_commit is not None:
                await self._on_commit(txn.tid, note, user)

    def _commit_now(self, manager: TransactionManager, txn: Txn) -> None:
        """Commits, in the one thread that does; so the newest transaction afterwards is this one."""
        before = self.last_transaction()
        try:
            manager.commit()
        finally:  # a companion that fails last undoes nothing
            after = self.last_transaction()
            txn.tid = after if after != before else ""  # the same: companions alone had something

    @asynccontextmanager
    async def reading(self, as_of: dt.datetime | str | None = None) -> AsyncIterator[Txn]:
        """Gives a unit of work a view that it can't change, of now or of an earlier time or transaction.

        Raises:
            InvalidField: `as_of` lies in the future, or before the image's history begins.
        """
        try:
            with self.view(as_of) as txn:
                yield txn
        except (POSKeyError, ImageDamaged, ObjectNotFound) as error:
            if as_of is not None and past.may_be_gone(error):
                begins = await blocking(lambda: changes.begins(self._db))
                past.check_begun(as_of, begins)
            raise

    @contextmanager
    def view(self, as_of: dt.datetime | str | None = None) -> Iterator[Txn]:
        """Gives what `reading` gives, in threads too."""
        manager = TransactionManager(explicit=True)
        at = None if as_of is None else past.moment(as_of, self._db.lastTransaction())
        connection = self._db.open(manager, at=at)
        try:
            manager.begin()
            with typed_errors("reading"):
                yield Txn(manager, connection, writable=False)
        finally:
            manager.abort()
            connection.close()

    @overload
    async def attempt(self, note: str, unit: Callable[[Txn], Awaitable[T]], *, user: str = "kernel") -> T: ...

    @overload
    async def attempt(self, note: str, unit: Callable[[Txn], T], *, user: str = "kernel") -> T: ...

    async def attempt(self, note: str, unit: Callable[[Txn], Any], *, user: str = "kernel") -> Any:
        """Runs `unit` in a transaction, again where another transaction won; returns what it returned.

        Raises:
            Conflict: it lost `CONFLICT_RETRIES` times.
        """
        for left in range(CONFLICT_RETRIES - 1, -1, -1):
            try:
                async with self.transaction(note, user=user) as txn:
                    result = unit(txn)
                    return await result if isinstance(result, Awaitable) else result
            except Conflict:
                if not left:
                    raise
        raise AssertionError("unreachable")

    @property
    def packable(self) -> bool:
        """Whether it is a file, which can be packed."""
        return isinstance(self._db.storage, FileStorage)

    def pack(self, until: float) -> None:
        """Forgets versions that were replaced before `until`, and what nobody refers to; blocks for long.

        Other threads go on committing. The file before stays beside it as `.old`, and so do blobs.

        Args:
            until: Unix seconds.

        Raises:
            UpkeepError: the image is no file, or is damaged; it is as it was.
            OSError: the disk is full or broken; the image is as it was.
        """
        if not self.packable:
            raise UpkeepError(f"{self.location} is no image file; pack it with the tools of its server")
        try:
            self._db.storage.pack(until, referencesf)
        except (BatosError, OSError, MemoryError):
            raise
        except Exception as error:  # ZODB loads what a damaged file holds, and may meet anything
            raise UpkeepError(
                f"{self.location} can't be packed ({type(error).__name__}: {error!s:.300}); "
                "see ./puter.sh verify",
                path=self.location,
            ) from error

    def last_transaction(self) -> str:
        """Returns the 16-digit hex id of the newest transaction."""
        return str(self._db.lastTransaction().hex())

    def carries(self, name: str, value: str, *, since: str) -> bool:
        """Returns whether a transaction from `since` on was marked with this value. Blocking."""
        units = self._db.storage.iterator(bytes.fromhex(since))  # to its end, or it would leave a file open
        return value in {unit.extension.get(name) for unit in units}

    def size(self) -> int:
        """Returns the size of the database in bytes, without blobs."""
        return int(self._db.getSize())

    def records(self) -> int:
        """Returns how many objects have a record, parts of other objects included, without reading any."""
        return int(self._db.objectCount())

    async def changes(self, tid: str) -> Changes:
        """Returns what an earlier transaction changed; see `uvm.image.changes.read`."""
        return await blocking(lambda: changes.read(self._db, tid))

    async def changed_since(self, tid: str, oid: str, slot: str | None = None) -> list[dict[str, str]]:
        """Returns the newest later transactions that wrote a record: `{transaction_id, note, user}`."""
        return await blocking(lambda: changes.since(self._db, oid, tid, slot))
