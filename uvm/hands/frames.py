"""What the pool and a hand say to each other: length-prefixed frames, each a map of one kind to its payload.

    from the pool   payload
    call            {target, selector, args, kwargs, overlay, views}: the job, sent once
    audit           {source, selector, parameters}: another job
    compile         [[source, file]]: the third one
    view            a view or None: {name, parents, slots: {slot: encoded}, methods, code, large: [slot]},
                    and grants: {slot: kind} where it has any
    slot            the encoded value
    taken           True or False
    use             {ok: value} or {error: {type, message}}

    from the hand   payload
    ready           None: locked down, waiting for its job
    view            oid: asks for an object that it can reach, see `uvm.hands.shown`
    slot            [oid, slot]: asks for a slot that its view named as large
    taken           name: asks whether an object has that name
    use             [oid of the holder, slot, verb, args, kwargs]: uses a grant
    returned        {result, writes: {oid: [{slot: encoded value}, [deleted]]}, created, discarded, printed}
    raised          {message, exception, traceback, selector}, and grant: [oid, kind] where that is missing
    unstorable      {message, path, type}: the result or a slot to be kept is no plain value
    missed          {message, target, selector, parameters, call: encoded [args, kwargs] or None}
    exhausted       None: it ran into its memory limit
    refused         text: a layer of the sandbox could not be applied
    audited         {source, findings: [[rule, line, message, mended]], parameters, doc}
    compiled        [bytes or None], in the order of the job
    checked         {layer: whether it holds}: the only word of a worker that was made to try the sandbox out

"Encoded" is the bytes of `uvm.codec.encode`. Both sides import this module: it needs the codec alone.
"""

from __future__ import annotations

import struct
from typing import Any

from uvm.codec import decode, encode
from uvm.errors import MalformedMessage

MAX_PRINTED = 64 << 10  # characters

LENGTH = struct.Struct("!I")


def pack(kind: str, payload: Any) -> bytes:
    """Returns the frame of one message.

    Raises:
        ValueNotStorable: the payload is no plain value.
    """
    body = encode({kind: payload})
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> tuple[str, Any]:
    """Returns kind and payload of a frame whose length prefix has been taken off.

    Raises:
        MalformedMessage: not a map of one kind to its payload.
    """
    message = decode(body)
    if type(message) is not dict or len(message) != 1:
        raise MalformedMessage("a frame is a map with one entry")
    [(kind, payload)] = message.items()
    if type(kind) is not str:
        raise MalformedMessage("the kind of a frame is text")
    return kind, payload
