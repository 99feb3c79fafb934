"""Plain values to MessagePack and back, without loss: for the wire, for hands, for the checks of the image.

A *plain value* is None, bool, int of any size, float, complex, str, bytes, list, tuple, set, frozenset,
dict, date, time, datetime (naive or with a fixed offset), timedelta, timezone, Decimal, Fraction, or a
`Ref` to an object of the image. Types are exact: a subclass (a `Counter`, a named tuple) is refused, since
it could not come back as what it was. What MessagePack lacks travels as an extension; `docs/PROTOCOL.md`
lists the codes. Runs inside hands too, so it needs nothing but `ormsgpack` and `uvm.errors`.
"""

from uvm.codec.kinds import MAX_DEPTH, REF, Ref, is_oid
from uvm.codec.reading import decode, exceeds
from uvm.codec.walks import matches, references
from uvm.codec.writing import encode

__all__ = ["MAX_DEPTH", "REF", "Ref", "decode", "encode", "exceeds", "is_oid", "matches", "references"]
