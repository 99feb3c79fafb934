"""How the image comes up: lock, look at the file's end, sweep, migrate, verify. Layer 1.

Each step is named by the error that it raises; a step that changed something says so in a line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import zodburi
from BTrees.OOBTree import OOBTree, OOTreeSet
from zc.lockfile import LockError
from ZODB.POSException import POSError

from uvm.errors import ImageDamaged, ImageLocked, ImageUnreachable
from uvm.image.defused import defuse
from uvm.image.loading import Database, typed_errors
from uvm.image.migrations import migrate
from uvm.image.recovery import Tell, preflight, sweep
from uvm.image.steady import steady, whole_layout
from uvm.image.storage import ImageStorage, Index
from uvm.pressure import exhausted

POOL_SIZE = 64
_TREES = {"names": OOBTree, "missions": OOBTree, "open_missions": OOTreeSet, "holders": OOTreeSet}


def open_database(
    location: str, blob_dir: Path, tell: Tell, *, cache_objects: int, cache_mib: int
) -> Database:
    """Opens the database of an image, mended, migrated and verified.

    Args:
        location: a file name, or any zodburi URI; only a file is looked at before it is opened.
        tell: called with a line for each thing that was not as a clean end leaves it.
        cache_objects: objects that each connection keeps in memory between units of work.
        cache_mib: MiB that they may need.

    Raises:
        ImageLocked: another process has it open.
        ImageDamaged: it can't be read; the text says what to do.
        ImageUnreachable: its server does not answer.
        ForbiddenClass: the root holds what the allow-list does not know.
        ResourceExhausted: the disk is full, or the like.
    """
    defuse()
    storage, options = _storage(location, blob_dir, tell)
    options |= {"pool_size": POOL_SIZE, "historical_pool_size": POOL_SIZE}
    for name in ("cache_size", "historical_cache_size"):
        options[name] = cache_objects
        options[f"{name}_bytes"] = cache_mib << 20
    try:
        with typed_errors("opening"):
            database = Database(storage, **options)
            if (done := migrate(database)).startswith("schema"):
                tell(f"The image is brought up to date: {done}")
            with database.transaction() as connection:
                _verify(connection.root(), location)
    except BaseException:
        storage.close()
        raise
    return database


def _storage(location: str, blob_dir: Path, tell: Tell) -> tuple[Any, dict[str, Any]]:
    def look(path: Path) -> Index | None:
        index = preflight(path, tell)
        if swept := sweep(blob_dir):
            tell(f"Temporary blob files that a kill left behind: {swept}, removed")
        return index

    try:
        if "://" in location:
            factory, options = zodburi.resolve_uri(location)
            return _reached(location, factory), options
        Path(location).parent.mkdir(parents=True, exist_ok=True)
        whole_layout(blob_dir)
        return ImageStorage(Path(location), blob_dir, look), {}
    except LockError:
        raise ImageLocked(
            f"another kernel has {location} open; stop it with ./puter.sh stop", path=location
        ) from None
    except KeyError as error:
        raise ImageDamaged(f"DB_FILE: {error.args[0]}", path=location) from None
    except (OSError, MemoryError) as error:
        if (pressed := exhausted(error)) is not None:
            raise pressed from error
        raise ImageDamaged(
            f"{location} can't be opened ({error}); see to its folder and its disk, then start again",
            path=location,
        ) from error
    except (POSError, ValueError, EOFError) as error:
        raise ImageDamaged(
            f"{location} can't be opened ({type(error).__name__}: {error}); "
            "restore the newest verified backup: ./puter.sh restore",
            path=location,
        ) from error


def _reached(location: str, factory: Callable[[], Any]) -> Any:
    """Returns the storage of a URI; what goes wrong on the way to a server may pass.

    Raises:
        ImageUnreachable: its server does not answer.
    """
    try:
        return steady(factory())
    except Exception as error:  # each client of a server has errors of its own
        is_of_a_server = not location.startswith(("file://", "memory://", "demo:"))
        if not is_of_a_server or exhausted(error) is not None or isinstance(error, (ValueError, KeyError)):
            raise
        raise ImageUnreachable(
            f"{location} can't be reached ({type(error).__name__}: {error!s:.200}); is its server up?",
            path=location,
        ) from error


def _verify(root: Any, location: str) -> None:
    """Checks that the image is there from its root to the missions that were left open.

    Raises:
        ImageDamaged: it is not.
    """
    for name, kind in _TREES.items():
        tree = root.get(name)
        if type(tree) is not kind:
            raise _incomplete(f"its root has no {name!r}", location)
        if tree:
            tree.minKey(), tree.maxKey()  # from the top to both ends
    for mission_id in root["open_missions"]:
        if getattr(root["missions"].get(mission_id), "mission_id", None) != mission_id:
            raise _incomplete(f"the journal has no row of the open mission {mission_id!r:.60}", location)


def _incomplete(reason: str, location: str) -> ImageDamaged:
    return ImageDamaged(
        f"{location} is incomplete: {reason}; restore the newest verified backup: ./puter.sh restore",
        path=location,
    )
