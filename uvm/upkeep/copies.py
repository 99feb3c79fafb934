"""One copy of what is new in an image, as ZODB's `repozo` writes it; `backups` decides which, and when."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

from ZODB.FileStorage.format import CorruptedError
from ZODB.POSException import POSError
from ZODB.scripts import repozo

from uvm.errors import UpkeepError
from uvm.image.defused import defuse
from uvm.upkeep.manifests import Backup, write_dat

_UNREADABLE = (
    POSError,
    CorruptedError,
    repozo.RepozoError,
    AssertionError,
    KeyError,
    ValueError,
    struct.error,
)


def copy_image(folder: Path, image: Path, stamp: str, chain: list[Backup]) -> Backup:
    """Copies what is new in an image since the last backup of a chain, or all of it where there is none.

    Returns:
        A backup that is not verified yet; the last one where nothing is new.

    Raises:
        UpkeepError: the image can't be read.
    """
    defuse()
    last = chain[-1] if chain else None
    if chain:
        write_dat(folder, chain)
    try:
        repozo.do_backup(_options(folder, image, stamp, full=not chain))
    except _UNREADABLE as error:
        told = f"{type(error).__name__}: {error!s:.300}"
        raise UpkeepError(f"{image} can't be copied ({told}); see ./puter.sh verify") from error
    written = next(iter(folder.glob(f"{stamp}.*fs")), None)
    if written is None:  # nothing has changed
        assert last is not None
        return last
    begins = stamp if written.suffix == ".fs" or last is None else last.chain
    line = (folder / f"{begins}.dat").read_text(encoding="utf-8").splitlines()[-1]
    _, start, end, md5 = line.rsplit(None, 3)
    return Backup(stamp, begins, int(start), int(end), md5, "", 0, 0, {}, 0.0)


def _options(folder: Path, image: Path, stamp: str, *, full: bool) -> SimpleNamespace:
    """Returns what repozo takes its command line for; `test_now` is how it is told the time."""
    now = tuple(map(int, stamp.split("-")))
    return SimpleNamespace(
        file=str(image),
        repository=str(folder),
        full=full,
        quick=False,
        gzip=False,
        killold=False,
        date=None,
        test_now=now,
    )
