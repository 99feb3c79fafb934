"""Putting a backup in the place of the image, so that a kill at any moment leaves one of the two whole.

The image that was there is never deleted: it keeps its blobs and lies beside, as `.before-restore-UTC`.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from zc.lockfile import LockError, LockFile

from uvm.disk import sync_folder
from uvm.errors import ImageLocked, UpkeepError
from uvm.upkeep import files
from uvm.upkeep.backups import Backups
from uvm.upkeep.manifests import STAMP, Backup
from uvm.upkeep.verify import Tell, verify

SCRATCH = ".restore-"


@dataclass(frozen=True)
class Restored:
    """What a restore did: where the image is, and where the one before is, if there was one."""

    backup: Backup
    image: Path
    aside: Path | None
    aside_blobs: Path | None


def restore(
    backups: Backups, image: Path, blob_dir: Path, *, until: str | None = None, tell: Tell = lambda _: None
) -> Restored:
    """Restores the newest backup, or the newest until a time, verifies it, and puts it in the image's place.

    Args:
        until: a stamp, as `parse_time` returns it.

    Raises:
        NoBackup: there is none.
        ImageLocked: a kernel has the image open.
        NotVerified: the backup does not verify; nothing was changed.
        UpkeepBusy: other upkeep of this image, or of these backups, is under way.
        ResourceExhausted, UpkeepError: nothing was changed, or the image is the new one already.
    """
    backups.newest(until)
    with files.typed_errors(f"restoring {image}"):
        image.parent.mkdir(parents=True, exist_ok=True)
        with _locked(image), files.alone(files.image_lock(image), "upkeep of this image"):
            _sweep(image)
            scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{image.name}-", dir=image.parent))
            try:
                with backups.alone():
                    backup = _unpacked(backups, until, scratch / image.name, tell)
                return _exchange(backup, scratch, image, blob_dir)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def _unpacked(backups: Backups, until: str | None, into: Path, tell: Tell) -> Backup:
    """Restores a backup, verified, into a scratch folder; returns which."""
    backup = backups.newest(until)  # as it is now that nobody prunes them
    needed = backup.bytes + sum(backup.blobs.values())
    files.check_space(into.parent, needed, f"restoring backup {backup.stamp}")
    backups.unpack(backup, into)
    verify(into, backups.folder / "blobs", tell, save_index=True).check()
    backups.unpack_blobs(backup, into.parent / "blobs")
    return backup


@contextmanager
def _locked(image: Path) -> Iterator[None]:
    """Holds the lock that whoever opens the image takes."""
    try:
        lock = LockFile(f"{image}.lock")
    except LockError:
        raise ImageLocked(
            f"a kernel has {image} open; stop it with ./puter.sh stop", path=str(image)
        ) from None
    try:
        yield
    finally:
        lock.close()


def _sweep(image: Path) -> None:
    for folder in image.parent.glob(f"{SCRATCH}{image.name}-*"):
        shutil.rmtree(folder)


def _exchange(backup: Backup, scratch: Path, image: Path, blob_dir: Path) -> Restored:
    """Puts the restored image in its place; the one before gets a second name first, and so do its blobs."""
    stamp = dt.datetime.now(dt.UTC).strftime(STAMP)
    aside = aside_blobs = None
    before = files.blob_files(blob_dir) if blob_dir.is_dir() else {}
    if image.exists():
        aside = _unused(image, stamp)
        files.link_or_copy(image, aside)
    if before:
        aside_blobs = _unused(blob_dir, stamp)
        for name in before:
            files.link_or_copy(blob_dir / name, aside_blobs / name)
    if backup.blobs:
        _place_blobs(scratch / "blobs", blob_dir, backup.blobs)
    Path(f"{image}.index").unlink(missing_ok=True)  # of the image before; without one it is only slower
    os.replace(scratch / image.name, image)
    sync_folder(image.parent)
    with suppress(FileNotFoundError):
        os.replace(scratch / f"{image.name}.index", f"{image}.index")
    for name in before.keys() - backup.blobs.keys():
        (blob_dir / name).unlink()
    return Restored(backup, image, aside, aside_blobs)


def _unused(path: Path, stamp: str) -> Path:
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.before-restore-{stamp}" + f"-{number}" * (number > 1))
        if not aside.exists():
            return aside
    raise UpkeepError(f"too many images beside {path}; remove some of {path.name}.before-restore-*")


def _place_blobs(source: Path, blob_dir: Path, names: dict[str, int]) -> None:
    """Moves blob files into the folder of the image; one that is there already is the same."""
    for name, size in names.items():
        place = blob_dir / name
        if not place.is_file() or place.stat().st_size != size:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, place)
            sync_folder(place.parent)
    layout = source / ".layout"
    if layout.exists() and not (blob_dir / ".layout").exists():
        os.replace(layout, blob_dir / ".layout")


def parse_time(text: str) -> str:
    """Returns the stamp of a time that a user wrote: ISO 8601, UTC where it names no zone, or a stamp.

    Raises:
        UpkeepError: it is none.
    """
    try:
        return dt.datetime.strptime(text, STAMP).strftime(STAMP)
    except ValueError:
        pass
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError:
        raise UpkeepError(
            f"{text!r:.60} is no time; write 2026-01-31T18:30 (UTC), or the name of a backup"
        ) from None
    if len(text) <= len("2026-01-31"):
        when = when.replace(hour=23, minute=59, second=59)  # a day alone means its end
    return (when if when.tzinfo else when.replace(tzinfo=dt.UTC)).astimezone(dt.UTC).strftime(STAMP)
