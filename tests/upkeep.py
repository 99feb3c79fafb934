"""What the tests of upkeep share: small images on disk, and processes that are killed at each step."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from uvm.image.image import LivingImage
from uvm.upkeep.backups import Backups
from uvm.upkeep.files import blob_files
from uvm.upkeep.manifests import Backup
from uvm.upkeep.restore import restore

PROJECT = Path(__file__).resolve().parent.parent
_CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Home:
    """A home with an image `live_image.fs`, which nobody has open between two calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "live_image.fs"
        self.blob_dir = folder / "live_image.fs.blob"
        self.backups = Backups(folder / "backups")

    @contextmanager
    def opened(self) -> Iterator[LivingImage]:
        image = LivingImage(str(self.image), self.blob_dir)
        image.open()
        try:
            yield image
        finally:
            image.close()

    def write(self, name: str, value: Any) -> None:
        """Sets slot `value` of an object, in one transaction."""

        async def unit(image: LivingImage) -> None:
            async with image.transaction(f"write {name}") as txn:
                found = txn.names.get(name) or txn.create(name, (), {})
                txn.edit(found, {"value": value})

        with self.opened() as image:
            asyncio.run(unit(image))

    def read(self, name: str) -> Any:
        with self.opened() as image, image.view() as txn:
            return txn.find(name).value if name in txn.names else None

    def back_up(self, **options: Any) -> Backup:
        return self.backups.make(self.image, self.blob_dir, **{"keep": 4, "full_every": 7, **options})

    def restore(self, until: str | None = None) -> Any:
        return restore(self.backups, self.image, self.blob_dir, until=until)

    def add_blobs(self, *contents: bytes) -> dict[str, int]:
        """Puts committed blob files, made by an image of their own, into the folder of blobs."""
        source = self.folder / "blobs_of_another"
        source.mkdir(exist_ok=True)
        database = DB(FileStorage(str(source / "other.fs"), blob_dir=str(self.blob_dir)))
        with database.transaction() as connection:
            for content in contents:
                connection.root()[f"{len(connection.root())}"] = Blob(content)
        database.close()
        return blob_files(self.blob_dir)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line of upkeep in this home."""
        return subprocess.run(
            [sys.executable, str(PROJECT / "upkeep.py"), *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "BATOS_HOME": str(self.folder)}


def blob_image(path: Path, content: bytes) -> tuple[Path, Path]:
    """Makes an image whose root holds a blob; returns the file and its folder of blobs."""
    blobs = path.with_name(f"{path.name}.blob")
    database = DB(FileStorage(str(path), blob_dir=str(blobs)))
    with database.transaction() as connection:
        connection.root()["blob"] = Blob(content)
    database.close()
    transaction.abort()
    return path, blobs


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a process that is killed before its `step`-th change of the file system.

    Returns whether it was: False says that it had fewer steps and came to its end.
    """
    child = os.fork()
    if child == 0:
        _die_at(step)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended):
        assert os.WTERMSIG(ended) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(ended) == 0
    return False


def _die_at(step: int) -> None:
    """Kills this process at a step; counts what opens files for writing, and what renames and removes."""
    own = os.getpid()
    assert own > 1
    left = step

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if event in _CHANGES or writes:
            left -= 1
            if not left:
                os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)
