"""What the kernel orders from the zygote over their control socket, and what the zygote reports back.

An order is one packet: a verb and the tokens, the kernel's own names for workers, that it is about. The
descriptors of the sockets of new workers travel with it. Both sides import this module.
"""

from __future__ import annotations

import struct

FORK = b"f"  # a worker for each token; its socket comes along
CHECK = b"c"  # the same, for one worker that only tries the sandbox out
END = b"e"  # kill these, where they still are there
BURY = b"b"  # the same for one, and report how it ended
MAX_TOKENS = 64  # of one order; a packet carries at most 253 descriptors

STATUS = struct.Struct("!Iid")  # the report: token, exit status (negative: a signal), CPU time in s


def pack_order(verb: bytes, tokens: list[int]) -> bytes:
    """Returns the packet of one order."""
    return verb + struct.pack(f"!{len(tokens)}I", *tokens)


def unpack_order(packet: bytes) -> tuple[bytes, tuple[int, ...]]:
    """Returns verb and tokens of a packet."""
    return packet[:1], struct.unpack(f"!{len(packet) // 4}I", packet[1:])
