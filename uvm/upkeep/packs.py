"""A pack and what belongs to it: the file before stays until the packed one has been verified."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from ZODB.TimeStamp import TimeStamp

from uvm.errors import NotVerified, UpkeepError
from uvm.image.image import LivingImage
from uvm.upkeep import files
from uvm.upkeep.verify import Tell, verify

DAY_S = 86_400


@dataclass(frozen=True)
class Packed:
    """What a pack did: bytes before and after, and the Unix time up to which it forgot."""

    before: int
    bytes: int
    until: float

    def told(self) -> str:
        """Returns one line about it."""
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.until))
        sizes = f"{self.before} bytes before, {self.bytes} after"
        return f"{sizes}; versions replaced before {day} UTC are forgotten"


def pack(image: LivingImage, days: float) -> Packed:
    """Packs an open image; blocks for long, while other threads go on.

    Args:
        days: versions replaced in the last so many days, before now or the newest transaction, stay.

    Raises:
        UpkeepError, ResourceExhausted: the image is as it was.
    """
    before, until = image.size(), _now(image) - days * DAY_S
    with files.typed_errors(f"packing {image.location}"):
        image.pack(until)
    return Packed(before, image.size(), until)


def _now(image: LivingImage) -> float:
    """Returns the time, in Unix seconds, or that of the newest transaction where the clock is ahead of it.

    A clock that was set a year ahead must not make all of the history old.
    """
    newest = TimeStamp(bytes.fromhex(image.last_transaction())).timeTime()
    return min(time.time(), float(newest) + 1)


def left(image: Path) -> bool:
    """Returns whether the file before a pack is still there."""
    return Path(f"{image}.old").exists()


def forget(image: Path, blob_dir: Path) -> None:
    """Removes the file before a pack, and the blobs of that time, once the packed one is verified."""
    Path(f"{image}.old").unlink(missing_ok=True)
    shutil.rmtree(f"{blob_dir}.old", ignore_errors=True)


def unverified(image: Path, error: NotVerified) -> UpkeepError:
    """Returns what to say where the image does not verify after a pack."""
    return UpkeepError(
        f"{error}; the image before the pack is kept as {image}.old: stop the kernel and restore a backup",
        path=str(image),
    )


def pack_closed(image: Path, blob_dir: Path, days: float, tell: Tell, say: Tell) -> Packed:
    """Packs an image that no kernel has open, verifies it, and removes the file before.

    Args:
        tell: told which phase begins.
        say: told what was found, and mended, when the image was opened.

    Raises:
        ImageLocked: a kernel has it open.
        UpkeepBusy: another upkeep of this image is under way.
        UpkeepError, ResourceExhausted: the image is as it was, or the file before is kept.
    """
    if not image.is_file():
        raise UpkeepError(f"there is no living image at {image} yet; start the kernel once")
    living = LivingImage(str(image), blob_dir)
    living.open(say)
    try:
        with files.alone(files.image_lock(image), "upkeep of this image"):
            if left(image):
                _verify(image, blob_dir, tell)
            tell("packing")
            packed = pack(living, days)
            _verify(image, blob_dir, tell)
            return packed
    finally:
        living.close()


def _verify(image: Path, blob_dir: Path, tell: Tell) -> None:
    try:
        verify(image, blob_dir, tell).check()
    except NotVerified as error:
        raise unverified(image, error) from None
    forget(image, blob_dir)
