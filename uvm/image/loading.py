"""How records become objects: only of allowed classes, only of the shape that their class has.

Everything that can be wrong with a record ends as an error of the tree. Without the checks a record could
give a BTree a neighbour that is none, and the C code behind it would end the process. Layer 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from BTrees.IOBTree import IOBTree
from BTrees.OIBTree import OIBTree
from BTrees.OOBTree import OOBTree, OOTreeSet
from persistent import Persistent
from persistent.mapping import PersistentMapping
from ZODB import serialize
from ZODB.Connection import Connection as ZodbConnection
from ZODB.DB import DB
from ZODB.POSException import ConflictError, POSKeyError, ReadOnlyError
from ZODB.utils import oid_repr

from uvm.errors import BatosError, Conflict, ImageDamaged
from uvm.image import allowed
from uvm.image.shapes import Shape, fits, names, stored
from uvm.pressure import exhausted, typed

_TREES: dict[type, type] = {tree: tree._bucket_type for tree in (OOBTree, IOBTree, OIBTree, OOTreeSet)}
_SHAPES: dict[type, Shape] = {PersistentMapping: {"data": lambda held: names(held) and stored(held.values())}}
_BUCKETS: dict[type, int] = {bucket: 1 if tree is OOTreeSet else 2 for tree, bucket in _TREES.items()}


class Reader(serialize.ObjectReader):
    """Checks what a record holds before the object gets it."""

    def setGhostState(self, obj: Persistent, pickle: bytes) -> None:  # noqa: N802 (ZODB's name)
        state = self.getState(pickle)
        _check(obj, state)
        obj.__setstate__(state)


class Connection(ZodbConnection):
    """A connection whose errors are those of the tree: ConflictError is left to whoever retries."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._reader = Reader(self, self._cache, self._db.classFactory)

    def setstate(self, obj: Persistent) -> None:
        """Loads an object's state.

        Raises:
            ForbiddenClass: its record names what the allow-list does not have.
            ImageDamaged: its record is missing or is none of its class.
            ResourceExhausted: it can't be read now.
        """
        try:
            super().setstate(obj)
        except (BatosError, ConflictError, ReadOnlyError):
            raise
        except Exception as error:
            raise _damaged(obj._p_oid, error) from error

    def get(self, oid: bytes) -> Any:
        """Returns an object by its oid.

        Raises:
            POSKeyError: there is none.
            ForbiddenClass, ImageDamaged: as `setstate`.
        """
        try:
            return super().get(oid)
        except (BatosError, ConflictError, POSKeyError):
            raise
        except Exception as error:
            raise _damaged(oid, error) from error


class Database(DB):
    """A database whose records may name allowed classes only."""

    klass = Connection

    def __init__(self, storage: Any, **options: Any) -> None:
        super().__init__(storage, class_factory=allowed.find_class, **options)


@contextmanager
def typed_errors(note: str) -> Iterator[None]:
    """Turns what ZODB raises into errors of the tree."""
    try:
        with typed():
            yield
    except ConflictError as error:
        raise Conflict(f"other transactions kept winning ({error})", note=note) from error
    except RecursionError as error:
        raise ImageDamaged("a value of the image is nested too deeply to be read", note=note) from error


def _damaged(oid: Any, error: Exception) -> BatosError:
    cause = error.__cause__ or error
    if isinstance(cause, BatosError):
        return cause
    if (pressed := exhausted(cause)) is not None:  # the record may well be sound
        return pressed
    told = f"object {oid.hex() if isinstance(oid, bytes) else oid!r:.40}"
    if isinstance(cause, POSKeyError):
        return ImageDamaged(f"{told}: its record, or one that it needs, is missing ({oid_repr(oid)})")
    return ImageDamaged(f"{told}: its record can't be read ({type(cause).__name__}: {cause!s:.300})")


def _check(obj: Persistent, state: Any) -> None:
    """Raises ImageDamaged where `state` is no state of the object's class."""
    kind = type(obj)
    if kind in _TREES:
        sound = state is None or _is_tree(obj, state)
    elif kind in _BUCKETS:
        sound = _is_bucket(obj, kind, state)
    else:
        sound = fits(kind, _SHAPES.get(kind) or kind._shape, state)
    if not sound:
        raise ImageDamaged(f"a record of class {kind.__name__} does not hold what that class has")


def _is_tree(tree: Persistent, state: Any) -> bool:
    bucket = _TREES[type(tree)]
    match state:
        case ((tuple(only),),) if len(only) == 1:
            return _are_items(bucket, only[0])
        case (tuple(data), first):
            kinds = {type(tree), bucket}
            children = [child for child in data[::2] if type(child) in kinds and child is not tree]
            whole = len(data) % 2 == 1 and len(children) == len(data) // 2 + 1
            return whole and type(first) is bucket and stored((*data, first))
    return False


def _is_bucket(bucket: Persistent, kind: type, state: Any) -> bool:
    match state:
        case (items,):
            return _are_items(kind, items)
        case (items, following):
            linked = type(following) is kind and following is not bucket and stored((following,))
            return linked and _are_items(kind, items)
    return False


def _are_items(kind: type, items: Any) -> bool:
    """Returns whether there are keys, with their values: C takes an empty bucket in a tree for impossible."""
    return type(items) is tuple and len(items) > 0 and len(items) % _BUCKETS[kind] == 0 and stored(items)
