"""One unit of work on the image: its view of the objects, and its changes to them.

Made by `uvm.image.image.LivingImage`, which alone commits and aborts. Layer 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from ZODB.POSException import POSKeyError

from uvm.codec import is_oid
from uvm.errors import ObjectExists, ObjectNotFound
from uvm.image import values
from uvm.image.prototypes import UvmObject

T = TypeVar("T")


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
    def newest(self) -> str:
        """16-digit hex id of the newest transaction of the storage, in this view or not."""
        return str(self._connection.db().lastTransaction().hex())

    @property
    def root(self) -> PersistentMapping:
        """The root of the database: `names`, `missions`, `open_missions`, `holders`, `schema`."""
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

    def stored(self, oid: str) -> Any:
        """Returns the object of any class that has this oid: slots, a method, a mission's row.

        Raises:
            ObjectNotFound: there is none.
        """
        try:
            return self._connection.get(bytes.fromhex(oid))
        except POSKeyError:
            raise ObjectNotFound(f"no record {oid} in the image", target=oid) from None

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

    def trim_cache(self) -> None:
        """Lets go of what was loaded beyond the size of the cache: for walks over many objects."""
        self._connection.cacheGC()

    def savepoint(self) -> Any:
        """Returns a savepoint: `rollback()` undoes what comes after it; nothing reaches the disk."""
        return self._manager.savepoint()

    @property
    def changed(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._manager.get()._resources)

    def companion(self, kind: type[T]) -> T | None:
        """Returns the resource manager of this kind that takes part, or None."""
        return next((found for found in self._manager.get()._resources if isinstance(found, kind)), None)

    def join(self, resource: Any) -> None:
        """Lets a resource manager of the `transaction` package take part in the two-phase commit."""
        self._manager.get().join(resource)

    def mark(self, name: str, value: str) -> None:
        """Lets the transaction carry a value beside its note, for `LivingImage.carries`."""
        self._manager.get().setExtendedInfo(name, value)

    def doom(self) -> None:
        """Makes sure that this transaction can only end by aborting."""
        self._manager.doom()
