"""Before the image's file is opened: is its tail sound, and is anything left of a kill? Runs under its lock.

A kill leaves an unfinished transaction, which was never acknowledged; a power cut may leave anything behind
the last transaction that was. Both are cut, and what is not the ordinary remainder of a kill is kept in a
file beside. Where whole transactions follow the damage nothing is touched: that needs a decision.
Transactions that a saved index knows, and the file no longer has, are told of. Each step
can be killed and is then done again by the next start. Layer 1.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ZODB.fsIndex import fsIndex

from uvm.disk import sync_folder
from uvm.errors import ImageDamaged
from uvm.image.chain import MAGIC, NO_TID, Chain, ChainReader
from uvm.image.storage import Index, fits, index_of, vouched_index

LONG = 256 << 20  # bytes to be read that are worth a line
_PIECE = 1 << 20
_TEMPORARY = re.compile(r"(BUC|CTFT|tmp|savepoints)\w*(\.tmp)?")  # as ZODB calls them
_HELP = "restore the newest verified backup: ./puter.sh restore; look into the file: ./puter.sh inspect"

Tell = Callable[[str], None]


def preflight(path: Path, tell: Tell) -> Index | None:
    """Looks at an image file, mends its end where nothing is lost by it, and returns its index.

    Args:
        tell: called with a line for whoever starts the kernel, where there is something to say.

    Returns:
        The index of the whole file; None where there is no transaction yet.

    Raises:
        ImageDamaged: the file is none of ZODB's, is damaged before transactions that are whole, or is empty
            although its index knows of transactions.
    """
    _settle_pack(path, tell)
    _remove_leftovers(path)
    size = path.stat().st_size if path.exists() else 0
    known = vouched_index(path)
    if size == 0:
        if known is not None:
            raise _emptied(path, known)
        index_of(path).unlink(missing_ok=True)
        return None
    with path.open("rb", buffering=0) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise _refusal(path, "it is no image of ZODB; see what DB_FILE names")
        reader = ChainReader(file, size)
        index, chain = _read(path, reader, known, tell)
        lost = known if known is not None and _proves_loss(known, chain) else None
        is_unfinished = chain.end < size and lost is None and reader.is_unfinished(chain.end, chain.last)
        if chain.end < size and not is_unfinished:
            _check_nothing_follows(path, reader, chain)
    if lost is not None:
        _tell_of_loss(path, chain, lost, tell)
    if chain.end < size:
        _cut(path, chain, is_unfinished, index, tell)
    return Index(index.entries, chain.end, chain.last, index.saved) if chain.end > len(MAGIC) else None


def sweep(blob_dir: Path) -> int:
    """Removes the temporary files that kills left in the folder of blobs; returns how many."""
    folder = blob_dir / "tmp"
    if folder.is_symlink() or not folder.is_dir():
        return 0
    swept = 0
    for entry in [entry for entry in folder.iterdir() if _TEMPORARY.fullmatch(entry.name)]:
        with suppress(OSError):  # what can't be removed stays: it is in nobody's way
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            swept += 1
    return swept


def _read(path: Path, reader: ChainReader, known: Index | None, tell: Tell) -> tuple[Index, Chain]:
    """Returns the index up to the end of the chain, and the chain."""
    index = known if known is not None and fits(known, reader) else Index(fsIndex(), len(MAGIC), NO_TID, 0)
    unread = reader.size - index.end
    if unread > LONG:
        tell(f"The index of {path} ends early: reading {unread / (1 << 20):,.0f} MiB, which takes a while")
    chain = reader.follow(index.end, index.tid, index.entries.__setitem__)
    return index, chain


def _check_nothing_follows(path: Path, reader: ChainReader, chain: Chain) -> None:
    """Raises ImageDamaged where to cut the file at the chain's end would lose a whole transaction, or all."""
    damage = f"it is damaged at byte {chain.end:,} of {chain.size:,}"
    after = reader.next_sound(chain.end, chain.last)
    if after is not None:
        raise _refusal(
            path,
            f"{damage}, and whole transactions follow from byte {after.start:,}; nothing was changed",
            at=chain.end,
            next=after.start,
        )
    if chain.end == len(MAGIC) and any(any(piece) for piece in _pieces(reader, chain.end)):
        raise _refusal(path, f"{damage}, before its first transaction; nothing was changed", at=chain.end)


def _pieces(reader: ChainReader, start: int) -> Iterator[bytes]:
    for place in range(start, reader.size, _PIECE):
        yield reader.bytes_at(place, min(_PIECE, reader.size - place))


def _refusal(path: Path, reason: str, **details: int) -> ImageDamaged:
    return ImageDamaged(f"{path} can't be opened: {reason}; {_HELP}", path=str(path), **details)


def _proves_loss(known: Index, chain: Chain) -> bool:
    """Returns whether the index knows of more than there is, by place and by id.

    A pack makes the file shorter than an index of before, and may take its last transaction out of it.
    """
    return known.end > chain.end and known.tid > chain.last


def _emptied(path: Path, known: Index) -> ImageDamaged:
    reason = (
        f"it holds no transactions, and its index knows of {known.end:,} bytes up to {known.tid.hex()}; "
        f"nothing was changed; to begin a new image, delete {index_of(path)}"
    )
    return _refusal(path, reason)


def _tell_of_loss(path: Path, chain: Chain, lost: Index, tell: Tell) -> None:
    """Tells of transactions that were acknowledged and are gone, before the index that proves it goes too."""
    if chain.end == len(MAGIC):
        raise _emptied(path, lost)
    tell(
        f"TRANSACTIONS ARE MISSING: {path} ends with {chain.last.hex()}, and its index knows of others up to "
        f"{lost.tid.hex()}; look whether a backup has them, before newer ones replace it: ./puter.sh restore"
    )
    if chain.end == chain.size:
        index_of(path).unlink(missing_ok=True)  # else the cut removes it


def _cut(path: Path, chain: Chain, is_unfinished: bool, index: Index, tell: Tell) -> None:
    """Cuts the file where its last sound transaction ends; keeps aside what a kill alone does not leave."""
    lost = chain.size - chain.end
    if is_unfinished:
        said = f"An unfinished transaction ({lost:,} bytes) is cut off {path}; it was never acknowledged"
    else:
        kept = _keep_aside(path, chain)
        said = f"The last {lost:,} bytes of {path} are no whole transaction: cut off, and kept in {kept}"
    if not index.saved:  # it was not relied on, and may reach beyond the cut
        index_of(path).unlink(missing_ok=True)
    with path.open("r+b") as file:
        file.truncate(chain.end)
        os.fsync(file.fileno())
    tell(said)


def _keep_aside(path: Path, chain: Chain) -> Path:
    """Copies the file from the chain's end on to a file of its own, safe on the disk; returns its path."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (f"{path.name}.tail-{stamp}{f'-{n}' if n else ''}" for n in range(1_000_000))
    kept = next(place for name in names if not (place := path.with_name(name)).exists())
    draft = _draft_of_tail(path)
    try:
        with path.open("rb") as source, draft.open("wb") as target:
            source.seek(chain.end)
            shutil.copyfileobj(source, target, _PIECE)
            target.flush()
            os.fsync(target.fileno())
        draft.rename(kept)
        sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ImageDamaged(
            f"the damaged end of {path} can't be kept aside ({error.strerror}), so nothing was cut; "
            f"make room for {chain.size - chain.end:,} bytes in {path.parent} and start again",
            path=str(path),
        ) from error
    return kept


def _draft_of_tail(path: Path) -> Path:
    return path.with_name(path.name + ".tail.part")


def _settle_pack(path: Path, tell: Tell) -> None:
    """Puts the image back that a kill caught between the two renames that end a pack.

    ZODB would make a new, empty one. What was packed is complete then, but may not be on the disk yet; the
    file before is.
    """
    before, packed = path.with_name(path.name + ".old"), path.with_name(path.name + ".pack")
    if not path.exists() and before.exists() and packed.exists():
        before.rename(path)
        sync_folder(path.parent)
        tell(f"A pack of {path} was interrupted at its end: the image is as it was before; pack it again")


def _remove_leftovers(path: Path) -> None:
    """Removes what only a killed pack, a killed saving of the index, or a killed recovery leave."""
    names = (path.name + ".pack", index_of(path).name + ".index_tmp", _draft_of_tail(path).name)
    for name in names:
        path.with_name(name).unlink(missing_ok=True)
