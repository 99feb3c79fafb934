"""A folder of backups: chains of one full backup and the increments after it, as ZODB's `repozo` writes them.

A backup counts only once its manifest (`STAMP.json`) is there, which is written last, after a copy restored
from the folder has been verified. Whatever has no manifest is what a kill or a fault has left: the next
backup sweeps it away. Blob files lie in `blobs/`, once for all backups.
"""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from uvm.disk import PART, sync_folder
from uvm.errors import NoBackup, NotVerified, ResourceExhausted, UpkeepBusy, UpkeepError
from uvm.upkeep import files
from uvm.upkeep.copies import copy_image
from uvm.upkeep.manifests import STAMP, Backup, read, write_dat
from uvm.upkeep.verify import Report, Tell, verify

MARKER = "batos-backups.json"
SCRATCH = "scratch-"
_CHUNK = 1 << 20
_NO_LOCK = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS}
_PARTS = re.compile(r"(\d{4}(?:-\d\d){5})\.(fs|deltafs|dat|index|json)")


class Backups:
    """A folder of backups.

    Args:
        tell: told which phase begins.
    """

    def __init__(self, folder: Path, tell: Tell = lambda _: None) -> None:
        self.folder = folder
        self._tell = tell

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the folder, so that no backup begins in it, which would sweep it.

        A folder that is read-only, or somebody else's, is read without.

        Raises:
            UpkeepBusy: somebody else holds it.
        """
        with ExitStack() as held:
            try:
                held.enter_context(files.alone(self.folder / ".lock", "backup into this folder"))
            except OSError as error:
                if error.errno not in _NO_LOCK:
                    raise
            yield

    def kept(self) -> list[Backup]:
        """Returns the backups that count, the oldest first."""
        found = (read(path) for path in sorted(self.folder.glob("*.json")) if path.name != MARKER)
        backups = [backup for backup in found if backup is not None]
        chains = {backup.chain for backup in backups if backup.full}
        return [backup for backup in backups if backup.chain in chains]

    def newest(self, until: str | None = None) -> Backup:
        """Returns the newest backup, or the newest that was made until a time.

        Raises:
            NoBackup: there is none.
        """
        backups = [backup for backup in self.kept() if until is None or backup.stamp <= until]
        if not backups:
            earliest = next((f"; the first is of {backup.stamp}" for backup in self.kept()), "")
            when = f" of {until} UTC or before" if until else ""
            raise NoBackup(
                f"no verified backup{when} in {self.folder}{earliest}; make one: ./puter.sh backup",
                folder=str(self.folder),
            )
        return backups[-1]

    def unpack(self, backup: Backup, into: Path) -> None:
        """Restores the image file of a backup, comparing each part with its sum; the caller holds the folder.

        Raises:
            NotVerified: a part is missing or damaged.
        """
        self._tell(f"restoring {backup.stamp}")
        with into.open("xb") as file:
            for one in self._chain(backup):
                self._append(one, file)
            file.flush()
            os.fsync(file.fileno())

    def unpack_blobs(self, backup: Backup, into: Path) -> None:
        """Copies the blob files of a backup, comparing each with its sum; the caller holds the folder.

        Raises:
            NotVerified: one is missing or damaged.
        """
        try:
            sums = files.copy_blobs(self.folder / "blobs", into, backup.blobs)
        except FileNotFoundError as error:
            raise NotVerified(f"{error.filename} is missing", problems=[str(error.filename)]) from None
        for name, known in backup.sums.items():
            if sums.get(name, known) != known:
                raise NotVerified(f"blob {name} is damaged; use another backup", problems=[name])

    def check(self, backup: Backup) -> Report:
        """Verifies a backup by restoring it into a scratch folder; returns what it holds.

        Raises:
            NotVerified: it does not restore, or what it restores is not sound.
            UpkeepBusy: a backup into this folder, or another verification, is under way.
        """
        with self.alone():
            return self._check(backup)

    def _check(self, backup: Backup) -> Report:
        with self._scratch() as scratch:
            self.unpack(backup, scratch / "image.fs")
            report = verify(scratch / "image.fs", self.folder / "blobs", self._tell)
        problems = list(report.problems)
        problems += self._problems_of_blobs(backup)
        problems += ["it ends within a transaction"] * bool(report.unfinished)
        if problems:
            raise NotVerified(f"backup {backup.stamp} does not verify: {problems[0]}", problems=problems)
        return report

    def _problems_of_blobs(self, backup: Backup) -> list[str]:
        store = self.folder / "blobs"
        present = files.blob_files(store)
        missing = [name for name, size in backup.blobs.items() if present.get(name) != size]
        whole = (backup.sums.keys() & backup.blobs.keys()) - set(missing)
        damaged = [name for name in sorted(whole) if files.sum_of(store / name) != backup.sums[name]]
        return [f"blob {name} is missing" for name in missing] + [
            f"blob {name} is damaged; the next backup copies it anew" for name in damaged
        ]

    def _chain(self, backup: Backup) -> list[Backup]:
        """Returns the backups that one consists of, itself the last; it need not count yet."""
        earlier = (one for one in self.kept() if one.chain == backup.chain and one.stamp < backup.stamp)
        return [*earlier, backup]

    def _append(self, one: Backup, image: IO[bytes]) -> None:
        digest = hashlib.md5(usedforsecurity=False)  # as repozo has it: against damage, not against forgers
        try:
            with (self.folder / one.file).open("rb") as part:
                while data := part.read(_CHUNK):
                    digest.update(data)
                    image.write(data)
        except FileNotFoundError:
            raise NotVerified(f"{self.folder / one.file} is missing", problems=[one.file]) from None
        if image.tell() != one.bytes or digest.hexdigest() != one.md5:
            raise NotVerified(f"{self.folder / one.file} is damaged; use another backup", problems=[one.file])

    def make(self, image: Path, blob_dir: Path, *, keep: int, full_every: int, full: bool = False) -> Backup:
        """Makes a backup of an image, verifies it, and removes chains that are too many.

        Args:
            keep: how many chains are kept, this one included.
            full_every: how many backups a chain may have.
            full: whether to begin a new chain in any case.

        Raises:
            NotVerified: the backup does not verify; it is removed, older ones are whole.
            UpkeepBusy: another upkeep of this image, or another backup into this folder, is under way.
            ResourceExhausted: no space left.
            UpkeepError: anything else; older backups are whole.
        """
        if not image.is_file():
            raise UpkeepError(f"there is no living image at {image} yet; start the kernel once")
        with files.typed_errors(f"backup into {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (
                files.alone(files.image_lock(image), "upkeep of this image"),
                files.alone(self.folder / ".lock", "backup into this folder"),
            ):
                self._claim(image)
                self._sweep()
                backup = self._make(image, blob_dir, full_every, full)
                self._prune(keep)
                return backup

    def _claim(self, image: Path) -> None:
        """Makes sure that the folder holds backups of this image, or nothing yet."""
        marker = self.folder / MARKER
        mine = _way(self.folder, image)
        known = files.read_json(marker)
        if known is None:
            strangers = [name for name in os.listdir(self.folder) if name not in (".lock", MARKER)]
            if strangers:
                raise UpkeepError(
                    f"{self.folder} holds {strangers[0]} and is no folder of backups; name an empty one"
                )
            files.write_json(marker, {"image": mine})
        elif known.get("image") != mine:
            raise UpkeepError(
                f"{self.folder} holds backups of another image ({known.get('image')}); name another folder, "
                f"or put {mine} in {marker} where the image was moved"
            )

    def _sweep(self) -> None:
        """Removes what never counted: half-written files, backups that were not verified, scratch folders."""
        stamps = {path.stem for path in self.folder.glob("*.json")}
        for path in list(self.folder.iterdir()):
            parts = _PARTS.fullmatch(path.name)
            if path.name.startswith(SCRATCH):
                shutil.rmtree(path)
            elif path.name == "tmp.tmp" or path.suffix == PART or (parts and parts[1] not in stamps):
                path.unlink()
        for path in (self.folder / "blobs").rglob(f"*{PART}"):
            path.unlink()

    def _make(self, image: Path, blob_dir: Path, full_every: int, full: bool) -> Backup:
        kept = self.kept()
        chain = [backup for backup in kept if backup.chain == kept[-1].chain]
        if full or not chain or len(chain) >= full_every:
            return self._attempt(image, blob_dir, None)
        try:
            return self._attempt(image, blob_dir, chain[-1])
        except (ResourceExhausted, UpkeepBusy):
            raise
        except UpkeepError as error:  # the chain may be what is damaged
            self._tell(f"{error}; beginning a new chain")
            return self._attempt(image, blob_dir, None)

    def _attempt(self, image: Path, blob_dir: Path, last: Backup | None) -> Backup:
        """Makes one backup after `last`, or a full one; leaves nothing where it fails."""
        stamp = self._next_stamp()
        self._check_space(image, blob_dir, last)
        try:
            self._tell(f"copying {image}")
            written = copy_image(self.folder, image, stamp, [] if last is None else self._chain(last))
            self._tell("copying blobs")
            blobs, sums = self._copy_blobs(blob_dir)
            sync_folder(self.folder)
            return self._verified(replace(written, blobs=blobs, sums=sums))
        except BaseException:
            for path in self.folder.glob(f"{stamp}.*"):
                path.unlink()
            (self.folder / "tmp.tmp").unlink(missing_ok=True)
            raise

    def _next_stamp(self) -> str:
        """Returns now, or a second after the newest backup where the clock says that it was later.

        Files of a backup whose manifest can't be read have their stamp too.
        """
        now = dt.datetime.now(dt.UTC).strftime(STAMP)
        parts = (_PARTS.fullmatch(name) for name in os.listdir(self.folder))
        newest = max((found[1] for found in parts if found), default="")
        if now > newest:
            return now
        return (dt.datetime.strptime(newest, STAMP) + dt.timedelta(seconds=1)).strftime(STAMP)

    def _check_space(self, image: Path, blob_dir: Path, last: Backup | None) -> None:
        size = image.stat().st_size
        needed = 2 * size - (last.bytes if last is not None else 0)  # the backup, and a copy to verify it
        present = files.blob_files(self.folder / "blobs")
        new = {name: size for name, size in files.blob_files(blob_dir).items() if present.get(name) != size}
        files.check_space(self.folder, needed + sum(new.values()), f"backup into {self.folder}")

    def _copy_blobs(self, blob_dir: Path) -> tuple[dict[str, int], dict[str, str]]:
        """Returns sizes and sums of the blob files, which are all in the folder then."""
        known = {name: one for backup in self.kept() for name, one in backup.sums.items()}
        present: dict[str, int] = {}
        sums: dict[str, str] = {}
        for name, size in files.blob_files(blob_dir).items():
            with suppress(FileNotFoundError):  # of a transaction that was aborted meanwhile
                sums |= files.copy_blobs(blob_dir, self.folder / "blobs", {name: size}, known)
                present[name] = size
        return present, sums

    def _verified(self, backup: Backup) -> Backup:
        """Verifies a backup, and lets it count."""
        report = self._check(backup)
        sound = replace(
            backup,
            transaction_id=report.transaction_id,
            transactions=report.transactions,
            objects=report.objects,
            verified=time.time(),
        )
        files.write_json(self.folder / f"{sound.stamp}.json", asdict(sound))
        write_dat(self.folder, self._chain(sound))
        return sound

    def _prune(self, keep: int) -> None:
        """Removes all but the newest chains, manifests first, and the blobs that no backup names any more."""
        backups = self.kept()
        chains = sorted({backup.chain for backup in backups})
        gone = [backup for backup in backups if backup.chain in chains[:-keep]]
        for backup in reversed(gone):
            (self.folder / f"{backup.stamp}.json").unlink()
        if gone:
            sync_folder(self.folder)
            self._sweep()
        named = {name for backup in self.kept() for name in backup.blobs}
        for name in files.blob_files(self.folder / "blobs").keys() - named:
            (self.folder / "blobs" / name).unlink()
        files.prune_folders(self.folder / "blobs")

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Gives a folder beside the backups that is removed in the end."""
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _way(folder: Path, image: Path) -> str:
    """Returns how an image is reached from a folder, which stays so where both are moved together."""
    try:
        return Path(os.path.relpath(image.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return str(image.resolve())
