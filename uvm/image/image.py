"""The living image: the database, its transactions, and what may be in it.

`LivingImage.transaction` is the only place that commits or aborts. Each unit of work has a connection and an
explicit transaction manager of its own: asyncio tasks of one thread would otherwise share the thread's
transaction and commit each other's work. Layer 1.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, overload

import zodburi
from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from zc.lockfile import LockError
from ZODB.DB import getTID
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import ConflictError, POSError, POSKeyError, UndoError
from ZODB.serialize import referencesf
from ZODB.TimeStamp import TimeStamp

from uvm.codec import is_oid
from uvm.errors import (
    Conflict,
    ImageDamaged,
    ImageLocked,
    InvalidField,
    NotUndoable,
    ObjectExists,
    ObjectNotFound,
    TransactionNotFound,
    UpkeepError,
)
from uvm.image import allowed, packing, values
from uvm.image.defused import defuse
from uvm.image.loading import Database
from uvm.image.prototypes import UvmObject

SCHEMA = 1
CONFLICT_RETRIES = 5
POOL_SIZE = 64

T = TypeVar("T")
OnCommit = Callable[[str, str, str], Awaitable[None]]


async def blocking(work: Callable[[], T]) -> T:
    """Runs `work` in a thread; a cancelled caller still waits for its end before it is cancelled.

    A commit must not go on behind the back of whoever closes its connection.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(Exception):
            await task
        raise


@contextmanager
def _typed_errors(note: str) -> Iterator[None]:
    """Turns what ZODB raises into errors of the tree."""
    try:
        yield
    except ConflictError as error:
        raise Conflict(f"other transactions kept winning ({error})", note=note) from error
    except RecursionError as error:
        raise ImageDamaged("a value of the image is nested too deeply to be read", note=note) from error


class Txn:
    """One unit of work on the image: the view of it, and the changes to it.

    Attributes:
        tid: 16-digit hex id of the transaction, once it has committed something; else empty.
        writable: whether it can commit; False for a view.
    """

    def __init__(self, manager: TransactionManager, connection: Any, *, writable: bool = True) -> None:
        self._manager = manager
        self._connection = connection
        self._edits: Counter[str] = Counter()
        self.writable = writable
        self.tid = ""

    @property
    def root(self) -> PersistentMapping:
        """The root of the database: `names`, `missions`, `open_missions`, `schema`."""
        return self._connection.root()

    @property
    def names(self) -> Any:
        """BTree of the named objects: name -> UvmObject."""
        return self.root["names"]

    @property
    def missions(self) -> Any:
        """BTree of the journal: mission id -> MissionRow."""
        return self.root["missions"]

    def find(self, target: str) -> UvmObject:
        """Returns the object of this name or oid.

        Raises:
            ObjectNotFound: there is none.
        """
        found = self._by_oid(target) if is_oid(target) else self.names.get(target)
        if found is None:
            raise ObjectNotFound(f"no object {target!r} in the image", target=target)
        return found

    def _by_oid(self, oid: str) -> UvmObject | None:
        try:
            found = self._connection.get(bytes.fromhex(oid))
        except POSKeyError:
            return None
        return found if isinstance(found, UvmObject) else None

    def create(
        self,
        name: str,
        parents: tuple[UvmObject, ...],
        slots: dict[str, Any],
        cls: type[UvmObject] = UvmObject,
    ) -> UvmObject:
        """Adds a named object; it has its oid at once.

        Raises:
            ObjectExists: the name is taken.
        """
        if name in self.names:
            raise ObjectExists(f"there is already an object {name!r}", name=name)
        created = cls(name, parents, slots)
        self._connection.add(created)
        self.names[name] = created
        return created

    def edit(self, target: UvmObject, slots: Mapping[str, Any], gone: Iterable[str] = ()) -> None:
        """Writes slots as `storable` returned them and deletes others, where the object holds them."""
        target._slots.update(slots)
        for slot in gone:
            target._slots.pop(slot, None)
        self._edits[target.oid] += 1

    def edition(self, target: UvmObject) -> Hashable:
        """Returns what differs once anybody has changed the object: its serials, and the edits made here."""
        target._slots._p_activate()
        return target._p_serial, target._slots._p_serial, self._edits[target.oid]

    def rely_on(self, target: UvmObject) -> None:
        """Makes the commit fail as a conflict if another transaction changes the slots of `target` first.

        It needs to be asked for only where an object is read and another is written. A transaction that
        writes nothing pays nothing for it.
        """
        target._slots._p_activate()
        if target._slots._p_jar is not None:  # else it was made in this transaction
            self._connection.readCurrent(target._slots)

    def plain(self, value: Any) -> Any:
        """Returns a slot's value as a plain copy, with `Ref` for objects."""
        return values.to_plain(value)

    def storable(self, value: Any, find: Callable[[str], UvmObject] | None = None) -> Any:
        """Returns a plain value as a slot keeps it: a copy, with objects for `Ref`, looked up by `find`."""
        return values.from_plain(value, find or self.find)

    def forget_cached(self) -> None:
        """Drops the in-memory state of unchanged objects: the next access reads the stored form."""
        self._connection.cacheMinimize()

    def savepoint(self) -> Any:
        """Returns a savepoint: `rollback()` undoes what comes after it; nothing reaches the disk."""
        return self._manager.savepoint()

    def companion(self, kind: type[T]) -> T | None:
        """Returns the resource manager of this kind that takes part, or None."""
        return next((found for found in self._manager.get()._resources if isinstance(found, kind)), None)

    def join(self, resource: Any) -> None:
        """Lets a resource manager of the `transaction` package take part in the two-phase commit."""
        self._manager.get().join(resource)

    def doom(self) -> None:
        """Makes sure that this transaction can only end by aborting."""
        self._manager.doom()

    def undo(self, tid: str, image: LivingImage) -> None:
        """Adds the undoing of an earlier transaction to this one."""
        image.storage_undo(tid, self._manager.get())


class LivingImage:
    """The database and its transactions.

    Args:
        location: a file name, or any zodburi URI.
        blob_dir: folder of the blobs of an image that is a file.
        on_commit: called after each commit with the transaction's id, note and user.
    """

    def __init__(self, location: str, blob_dir: Path, on_commit: OnCommit | None = None) -> None:
        self.location = location
        self._blob_dir = blob_dir
        self._on_commit = on_commit
        self._db: Any = None
        self._commit_lock = asyncio.Lock()
        self._beginning: bytes | None = None  # of the history; None until somebody asks

    @classmethod
    def in_memory(cls) -> LivingImage:
        """Returns an image that lives in memory alone: for tests and demonstrations."""
        return cls("memory://", Path())

    def open(self) -> None:
        """Opens the database, and lays the foundations of a new one.

        Raises:
            ImageLocked: another process has it open.
            ImageDamaged: the file can't be read.
            ForbiddenClass: the root holds what the allow-list does not know.
        """
        defuse()
        storage, options = self._storage()
        if isinstance(storage, FileStorage):
            storage.packer = packing.packer
        options |= {"pool_size": POOL_SIZE, "historical_pool_size": POOL_SIZE}
        try:
            with _typed_errors("opening"):
                self._db = Database(storage, **options)
                self._lay_foundations()
        except BaseException:
            storage.close()
            raise

    def _storage(self) -> tuple[Any, dict[str, Any]]:
        try:
            if "://" in self.location:
                factory, options = zodburi.resolve_uri(self.location)
                return factory(), options
            Path(self.location).parent.mkdir(parents=True, exist_ok=True)
            packing.mend(Path(self.location))
            return FileStorage(self.location, blob_dir=str(self._blob_dir)), {}
        except LockError:
            raise ImageLocked(
                f"another kernel has {self.location} open; stop it with ./puter.sh stop", path=self.location
            ) from None
        except KeyError as error:
            raise ImageDamaged(f"DB_FILE: {error.args[0]}", path=self.location) from None
        except (POSError, ValueError, OSError, EOFError) as error:
            raise ImageDamaged(
                f"{self.location} can't be opened ({type(error).__name__}: {error}); restore a copy of it",
                path=self.location,
            ) from error

    def _lay_foundations(self) -> None:
        with self._db.transaction("foundations of a new image") as connection:
            root = connection.root()
            if "schema" not in root:
                root.update(allowed.foundations(), schema=SCHEMA)
            if root["schema"] != SCHEMA:
                raise ImageDamaged(
                    f"the image has schema {root['schema']}, this kernel knows {SCHEMA}; use a newer one",
                    path=self.location,
                )

    def close(self) -> None:
        """Closes the database; safe to call twice."""
        if self._db is not None:
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
                with _typed_errors(note):
                    yield txn
                    if unit.isDoomed():
                        manager.abort()
                    else:
                        await self._commit(manager, txn)
            except BaseException:
                manager.abort()
                raise
        finally:
            connection.close()

    async def _commit(self, manager: TransactionManager, txn: Txn) -> None:
        if not manager.get()._resources:  # nothing was changed: spare the lock and the thread
            manager.abort()
            return
        note, user = manager.get().description, manager.get().user
        try:
            async with self._commit_lock:  # FileStorage commits one at a time anyway; this makes the tid ours
                before = self.last_transaction()
                try:
                    await blocking(manager.commit)
                finally:  # a companion that fails last, or a cancelled caller, undoes nothing
                    after = self.last_transaction()
                    txn.tid = after if after != before else ""  # the same: companions alone had something
        finally:
            if txn.tid and self._on_commit is not None:
                await self._on_commit(txn.tid, note, user)

    @asynccontextmanager
    async def reading(self, as_of: dt.datetime | str | None = None) -> AsyncIterator[Txn]:
        """Gives a unit of work a view that it can't change, of now or of an earlier time or transaction.

        Raises:
            InvalidField: `as_of` lies in the future, or before what a pack has left of the history.
        """
        with self.view(as_of) as txn:
            yield txn

    @contextmanager
    def view(self, as_of: dt.datetime | str | None = None) -> Iterator[Txn]:
        """Gives what `reading` gives, in threads too."""
        manager = TransactionManager(explicit=True)
        at = bytes.fromhex(as_of) if isinstance(as_of, str) else as_of
        try:
            if at is not None:
                self._check_history(getTID(at, None))
            connection = self._db.open(manager, at=at)
        except ValueError as error:
            raise InvalidField(f"as_of: {error}", field="as_of") from None
        try:
            manager.begin()
            with _typed_errors("reading"):
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
        except (POSError, CorruptedError, KeyError, ValueError) as error:
            raise UpkeepError(
                f"{self.location} can't be packed ({type(error).__name__}: {error!s:.300}); "
                "see ./puter.sh verify",
                path=self.location,
            ) from error
        finally:
            self._beginning = None

    def _history_begins(self) -> bytes:
        if self._beginning is None:
            self._beginning = packing.beginning(self._db.storage._file_name) if self.packable else b""
        return self._beginning

    def _told_beginning(self) -> str:
        begins = TimeStamp(self._history_begins())
        return f"the history was packed and begins at {begins} UTC (transaction {begins.raw().hex()})"

    def _check_history(self, before: bytes) -> None:
        if before <= self._history_begins():
            raise InvalidField(f"as_of: {self._told_beginning()}", field="as_of")

    def last_transaction(self) -> str:
        """Returns the 16-digit hex id of the newest transaction."""
        return str(self._db.lastTransaction().hex())

    def size(self) -> int:
        """Returns the size of the database in bytes, without blobs."""
        return int(self._db.getSize())

    def storage_undo(self, tid: str, unit: Any) -> None:
        """Joins the undoing of transaction `tid` to `unit`.

        Raises:
            TransactionNotFound: the storage has no such transaction, or can't undo.
        """
        undo_id = self._undo_id(bytes.fromhex(tid))
        if undo_id is None and bytes.fromhex(tid) <= self._history_begins():
            raise TransactionNotFound(
                f"transaction {tid} can't be undone: {self._told_beginning()}", transaction_id=tid
            )
        if undo_id is None:
            raise TransactionNotFound(f"no transaction {tid} that could be undone", transaction_id=tid)
        self._db.undo(undo_id, unit)

    def _undo_id(self, tid: bytes) -> Any:
        """Returns the storage's own name of a transaction: an implementation detail of `undoLog`."""
        if not self._db.supportsUndo():
            return None

        wanted = base64.encodebytes(tid).rstrip()
        first = 0
        while page := self._db.undoLog(first, first + 1000):
            for entry in page:
                if entry["id"] == wanted:
                    return entry["id"]
            first += len(page)
        return None

    async def undo(self, tid: str) -> str:
        """Undoes one transaction and returns the id of the transaction that did it.

        Raises:
            TransactionNotFound: there is none of this id.
            NotUndoable: later transactions build on it.
        """
        try:
            async with self.transaction(f"undo {tid}") as txn:
                txn.undo(tid, self)
            return txn.tid
        except UndoError as error:
            raise NotUndoable(
                f"transaction {tid} can't be undone: later ones changed the same objects ({error})",
                transaction_id=tid,
            ) from None
