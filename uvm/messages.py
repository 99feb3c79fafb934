"""What travels between clients and the kernel: commands, replies, events, and their limits.

A message is one MessagePack map (`uvm.codec`). Everything is validated here, at the edge, into frozen models;
the code inside trusts them. `docs/PROTOCOL.md` describes this module for other languages. Layer 0.
"""

from __future__ import annotations

import datetime as dt
import keyword
import time
import unicodedata
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from uvm import codec
from uvm.errors import (
    BatosError,
    InvalidField,
    MalformedMessage,
    UnknownCommand,
    UnsupportedVersion,
    to_wire,
)
from uvm.grant_options import GrantOptions

PROTOCOL_VERSION = 1
MAX_NAME = 100  # characters of an object's name, a selector, a slot
MAX_DESCRIPTION = 16_384  # characters of a brief's description
MAX_TEXT = 1_000_000  # characters of a text to remember
MAX_EXAMPLES = 100
MAX_DEADLINE_S = 30 * 86_400  # seconds that a mission may be given
MAX_PAGE = 1000  # rows of one answer
SUBSCRIBED = "~subscribed."  # begins a topic that is answered; sorts behind all events, as ZeroMQ subscribes


def _identifier(name: str) -> str:
    """Returns `name` if it can be a Python name in its normal form: what it looks like is what it is."""
    if unicodedata.normalize("NFKC", name) != name or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError("must be an identifier, such as greet_by_name")
    return name


def _public(name: str) -> str:
    if name.startswith("_"):
        raise ValueError("must not start with an underscore")
    return _identifier(name)


def _object_name(name: str) -> str:
    if codec.is_oid(name):
        raise ValueError("must not look like an oid (16 hexadecimal digits)")
    return _public(name)


def _target(name: str) -> str:
    return name if codec.is_oid(name) else _object_name(name)


def is_public_name(name: Any) -> bool:
    """Returns whether `name` may name a slot, a selector or an object."""
    try:
        return type(name) is str and len(name) <= MAX_NAME and bool(_object_name(name))
    except ValueError:
        return False


_Name = StringConstraints(min_length=1, max_length=MAX_NAME)
Selector = Annotated[str, _Name, AfterValidator(_public)]
SlotName = Annotated[str, _Name, AfterValidator(_public)]
ObjectName = Annotated[str, _Name, AfterValidator(_object_name)]
Target = Annotated[str, _Name, AfterValidator(_target)]
MissionId = Annotated[str, StringConstraints(pattern=r"^[0-9a-z-]{1,64}$")]
AsOf = dt.datetime | Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
RequestId = Annotated[str, StringConstraints(max_length=64)] | int


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Example(_Frozen):
    """One case that a method must satisfy: a call and what it returns, or the exception that it raises."""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    returns: Any = None
    raises: Annotated[str, StringConstraints(max_length=MAX_NAME)] | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if ("returns" in self.model_fields_set) == (self.raises is not None):
            raise ValueError("an example has either `returns` or `raises`")
        return self

    def plain(self) -> dict[str, Any]:
        """Returns the fields that were given, their values as they are: pydantic's dump is lossy."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


class MissionBrief(_Frozen):
    """A request for a capability.

    Attributes:
        type: `unhandled_message` (a capability that is missing), `revision` (replace an existing method) or
            `task` (a study for a persona).
        args: without a description and examples, the arguments of the call that was not understood, which is
            sent again once the method exists; with one of them, if all are identifiers, the names of the
            parameters.
        parameters: names of the parameters, where the sender wants to say so explicitly.
    """

    type: Literal["unhandled_message", "revision", "task"] = "unhandled_message"
    selector: Selector
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    parameters: list[Selector] | None = None
    description: Annotated[str, StringConstraints(max_length=MAX_DESCRIPTION)] | None = None
    examples: Annotated[list[Example], Field(max_length=MAX_EXAMPLES)] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = self.parameter_names()
        if names is not None and (len(set(names)) < len(names) or "self" in names):
            raise ValueError("parameters must differ from each other and from self")
        return self

    def plain(self) -> dict[str, Any]:
        """Returns the brief as the journal keeps it: the fields that were given, their values as they are."""
        fields = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        return fields | ({"examples": [one.plain() for one in self.examples]} if "examples" in fields else {})

    def parameter_names(self) -> list[str] | None:
        """Returns the names of the parameters, or None where the brief leaves them open."""
        if self.parameters is not None:
            return list(self.parameters)
        return list(self.args) if self._args_are_names() else None

    def call(self) -> tuple[list[Any], dict[str, Any]] | None:
        """Returns the arguments of the call that was not understood, or None where there was none."""
        known = self.args or self.kwargs or not (self._described() or self.parameters)
        if self._args_are_names() or not known:
            return None
        return self.args, self.kwargs

    def arity(self) -> int | None:
        """Returns the number of arguments, or None where the brief leaves it open."""
        names = self.parameter_names()
        if names is not None:
            return len(names)
        call = self.call()
        if call is not None:
            return len(call[0]) + len(call[1])
        if self.examples:
            return len(self.examples[0].args) + len(self.examples[0].kwargs)
        return None

    def _described(self) -> bool:
        return bool(self.description or self.examples)

    def _args_are_names(self) -> bool:
        named = all(isinstance(arg, str) and arg.isidentifier() for arg in self.args)
        return bool(self.args) and named and self._described() and self.parameters is None


class InitiateCognitiveCycle(_Frozen):
    command: Literal["initiate_cognitive_cycle"]
    target_oid: Target
    mission_brief: MissionBrief
    wait: bool = True
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S)] | None = None


class SendMessage(_Frozen):
    command: Literal["send_message"]
    target_oid: Target
    selector: Selector
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    on_missing: Literal["create", "error"] = "create"
    as_of: AsOf | None = None


class Inspect(_Frozen):
    command: Literal["inspect"]
    target_oid: Target
    as_of: AsOf | None = None


class ListObjects(_Frozen):
    command: Literal["list_objects"]
    prefix: Annotated[str, StringConstraints(max_length=MAX_NAME)] = ""
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    after: Annotated[str, StringConstraints(max_length=MAX_NAME)] | None = None
    as_of: AsOf | None = None


class CreateObject(_Frozen):
    command: Literal["create_object"]
    name: ObjectName
    parents: Annotated[list[Target], Field(max_length=32)] | None = None
    slots: dict[SlotName, Any] = {}


class SetSlot(_Frozen):
    command: Literal["set_slot"]
    target_oid: Target
    slot: SlotName
    value: Any


class DeleteSlot(_Frozen):
    command: Literal["delete_slot"]
    target_oid: Target
    slot: SlotName


class MethodHistory(_Frozen):
    command: Literal["method_history"]
    target_oid: Target
    selector: Selector


class RevertMethod(_Frozen):
    command: Literal["revert_method"]
    target_oid: Target
    selector: Selector
    version: Annotated[int, Field(ge=1)] | None = None


class Undo(_Frozen):
    command: Literal["undo"]
    transaction_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Remember(_Frozen):
    command: Literal["remember"]
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]
    source: Annotated[str, StringConstraints(max_length=1000)] = "architect"


class Recall(_Frozen):
    command: Literal["recall"]
    query: Annotated[str, StringConstraints(min_length=1, max_length=MAX_DESCRIPTION)]
    k: Annotated[int, Field(ge=1, le=100)] = 5


class Grant(_Frozen):
    """Lets the methods of an object use a part of the world; `options` are those of the kind."""

    command: Literal["grant"]
    target_oid: Target
    kind: Literal["files", "http", "clock", "recall", "ask"]
    slot: SlotName
    options: GrantOptions

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, fields: dict[str, Any]) -> dict[str, Any]:
        kind, slot, options = (fields.get(name) for name in ("kind", "slot", "options"))
        if type(options) is dict and "kind" in options:
            raise ValueError("options: the kind stands beside them")
        options = {} if options is None else options
        told = {**options, "kind": kind} if type(options) is dict else options
        return {**fields, "slot": kind if slot is None else slot, "options": told}


class Revoke(_Frozen):
    command: Literal["revoke"]
    target_oid: Target
    slot: SlotName


class Grants(_Frozen):
    command: Literal["grants"]
    target_oid: Target | None = None


class Missions(_Frozen):
    command: Literal["missions"]
    state: Literal["queued", "running", "complete", "failed", "cancelled", "quarantined"] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


class Mission(_Frozen):
    command: Literal["mission"]
    mission_id: MissionId


class CancelMission(_Frozen):
    command: Literal["cancel_mission"]
    mission_id: MissionId


class Upkeep(_Frozen):
    command: Literal["upkeep"]
    what: Literal["backup", "pack"]
    days: Annotated[float, Field(ge=0, le=36_500)] | None = None


class Status(_Frozen):
    command: Literal["status"]


class Ping(_Frozen):
    command: Literal["ping"]


class Shutdown(_Frozen):
    command: Literal["shutdown"]


Command = (
    InitiateCognitiveCycle
    | SendMessage
    | Inspect
    | ListObjects
    | CreateObject
    | SetSlot
    | DeleteSlot
    | MethodHistory
    | RevertMethod
    | Undo
    | Remember
    | Recall
    | Grant
    | Revoke
    | Grants
    | Missions
    | Mission
    | CancelMission
    | Upkeep
    | Status
    | Ping
    | Shutdown
)
COMMANDS: dict[str, type[Command]] = {
    get_args(model.model_fields["command"].annotation)[0]: model for model in get_args(Command)
}


class Request(BaseModel):
    """A validated request: the sender's id, echoed in the reply, and the command."""

    model_config = ConfigDict(frozen=True)

    id: RequestId
    command: Command


class Rejected(Exception):
    """A request that was refused at the edge; `id` is the sender's, as far as it could be read."""

    def __init__(self, request_id: str | int | None, error: BatosError) -> None:
        super().__init__(str(error))
        self.id = request_id
        self.error = error


def parse_request(data: bytes) -> Request:
    """Returns the request in `data`.

    Raises:
        Rejected: with a MalformedMessage, UnsupportedVersion, UnknownCommand or InvalidField inside.
    """
    try:
        message = codec.decode(data)
    except BatosError as error:
        raise Rejected(None, error) from None
    if type(message) is not dict or not all(type(key) is str for key in message):
        raise Rejected(None, MalformedMessage("a message is a map with string keys"))
    request_id = message.pop("id", None)
    if not _is_id(request_id):
        raise Rejected(
            None, InvalidField("id: a string of up to 64 characters, or an int of 64 bits", field="id")
        )
    try:
        return Request.model_construct(id=request_id, command=_command(message))
    except BatosError as error:
        raise Rejected(request_id, error) from None


def _is_id(value: Any) -> bool:
    if type(value) is str:
        return len(value) <= 64
    return type(value) is int and -(2**63) <= value < 2**64


def _command(message: dict[str, Any]) -> Command:
    version = message.pop("v", None)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise UnsupportedVersion(
            f"this kernel speaks protocol version {PROTOCOL_VERSION}", got=_shown(version)
        )
    name = message.get("command")
    model = COMMANDS.get(name) if type(name) is str else None
    if model is None:
        raise UnknownCommand(f"no command {_shown(name)}", commands=sorted(COMMANDS))
    try:
        return model.model_validate(message)
    except ValidationError as error:
        raise _invalid(error) from None
    except RecursionError:
        raise InvalidField("nested too deeply", field="") from None


def _shown(value: Any) -> str:
    """Returns a stranger's value for an error's text: short, and without computing what it costs to print."""
    return repr(value[:60]) if type(value) is str else f"of type {type(value).__name__}"


def _invalid(error: ValidationError) -> InvalidField:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidField(f"{field or 'message'}: {reason}", field=field, problems=error.error_count())


def pack_request(request_id: str, command: str, fields: dict[str, Any]) -> bytes:
    """Returns a request as bytes; the client's side of `parse_request`."""
    return codec.encode({"v": PROTOCOL_VERSION, "id": request_id, "command": command, **fields})


def pack_result(request_id: str | int, result: Any) -> bytes:
    """Returns a successful reply as bytes."""
    return codec.encode({"v": PROTOCOL_VERSION, "id": request_id, "ok": True, "result": result})


def pack_error(request_id: str | int | None, error: BaseException) -> bytes:
    """Returns an error reply as bytes; details that can't be sent (too deep, no plain data) are left out."""
    described = to_wire(error)
    reply = {"v": PROTOCOL_VERSION, "id": request_id, "ok": False, "error": described}
    try:
        return codec.encode(reply)
    except BatosError:
        described["details"] = {key: value for key, value in described["details"].items() if _sendable(value)}
        return codec.encode(reply)


def _sendable(value: Any) -> bool:
    try:
        codec.encode([[[value]]])  # as deep as it lies in a reply
    except BatosError:
        return False
    return True


def pack_event(event: str, fields: dict[str, Any]) -> bytes:
    """Returns an event as bytes; `ts` is Unix time in seconds."""
    return codec.encode({"v": PROTOCOL_VERSION, "event": event, "ts": time.time(), **fields})


def unpack(data: bytes) -> dict[str, Any]:
    """Returns a reply or an event as a map.

    Raises:
        MalformedMessage: not a map of this protocol's version.
    """
    message = codec.decode(data)
    if type(message) is not dict or message.get("v") != PROTOCOL_VERSION:
        raise MalformedMessage("not a message of this protocol version")
    return message
