"""Moments of the image's past: what `as_of` means, and where the history begins. Layer 1.

A transaction's id is the moment of its commit; `as_of` it shows the state just after it. The image is the
same until the next commit, so a time after the newest one means the image as it is.
"""

from __future__ import annotations

import datetime as dt

from persistent.timestamp import TimeStamp
from ZODB.DB import getTID
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, u64

from uvm.codec import is_oid
from uvm.errors import InvalidField, ObjectNotFound

MAX_SKEW_S = 60  # by how much another machine's clock may be ahead of ours


def moment(as_of: dt.datetime | str, newest: bytes) -> bytes:
    """Returns the transaction id at which the image is to be looked at, the newest one at most.

    Args:
        as_of: 16-digit hex id of a transaction, or a time; without a zone it is UTC.
        newest: id of the newest transaction.

    Raises:
        InvalidField: it lies in the future, or is no time that the image can tell.
    """
    if isinstance(as_of, str):
        if bytes.fromhex(as_of) > newest:
            told = f"as_of: no transaction {as_of} yet; the newest is {newest.hex()}"
            raise InvalidField(told, field="as_of")
        return bytes.fromhex(as_of)
    zoned = as_of if as_of.tzinfo is not None else as_of.replace(tzinfo=dt.UTC)
    if zoned > dt.datetime.now(dt.UTC) + dt.timedelta(seconds=MAX_SKEW_S):
        raise InvalidField(f"as_of: {as_of} lies in the future", field="as_of")
    return min(_id_of(as_of), newest)


def _id_of(as_of: dt.datetime) -> bytes:
    try:
        after: bytes = getTID(as_of, None)  # ZODB's is that of the moment after
        return bytes(p64(u64(after) - 1))
    except (ValueError, OverflowError) as error:
        raise InvalidField(f"as_of: {as_of} can't be looked up ({error})", field="as_of") from None


def may_be_gone(error: BaseException) -> bool:
    """Returns whether an error in a view of the past may mean that the past is not kept."""
    if isinstance(error, ObjectNotFound):
        return is_oid(str(error.details.get("target", "")))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, POSKeyError):
        cause = cause.__cause__
    return cause is not None


def check_begun(as_of: dt.datetime | str, begins: bytes) -> None:
    """Checks that the image's history has begun at a moment.

    Raises:
        InvalidField: it has not, or what came before `begins` was packed.
    """
    at = bytes.fromhex(as_of) if isinstance(as_of, str) else _id_of(as_of)
    if at < begins:
        time = dt.datetime.fromtimestamp(TimeStamp(begins).timeTime(), dt.UTC)
        told = (
            f"as_of: the image's history begins at {time:%Y-%m-%d %H:%M:%S} UTC (transaction {begins.hex()})"
        )
        raise InvalidField(told, field="as_of", begins=begins.hex())
