"""What a person can say exactly: `shop_obj.add_item("apples", 4)` and `/commands`. No model reads these.

Imports `messages`, to check what it returns, the kinds of grants, and the errors.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvm.capabilities import KINDS
from uvm.errors import BatosError, InvalidField, UnknownCommand
from uvm.messages import Rejected, pack_request, parse_request
from uvm.parser.context import Context

Command = dict[str, Any]
LOCAL = ("help", "quit")  # what the client answers itself

_CALL = re.compile(r"(?:(?P<target>\w+)\.)?(?P<selector>[^\W\d]\w*)\((?P<rest>.*)", re.DOTALL)
_METHOD = re.compile(r"(?P<target_oid>\w+)\.(?P<selector>\w+)(?:\s+(?P<version>\d+))?")
_SLOT_NAME = re.compile(r"(?P<target_oid>\w+)\.(?P<slot>\w+)")
_SLOT = re.compile(r"(?P<target_oid>\w+)\.(?P<slot>\w+)\s*=\s*(?P<value>.+)", re.DOTALL)


def parse_exact(text: str, context: Context | None = None) -> Command | None:
    """Returns the command that `text` says in exact syntax, or None where it is a sentence.

    Args:
        context: needed for calls that name no object, such as `square(12)`; without it they are sentences.

    Raises:
        InvalidField: an exact form with a mistake in it; the text says what is allowed.
        UnknownCommand: a `/command` that does not exist.
    """
    text = text.strip()
    if text.startswith("/"):
        return checked(_slash(text))
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    if match["target"] is not None:
        return checked(_message(match["target"], match["selector"], text))
    return _bare_call(match["selector"], text, context)


def checked(command: Command) -> Command:
    """Returns `command`, which the kernel will accept in this form (what is the client's own passes).

    Raises:
        InvalidField: a field is wrong.
    """
    fields = {name: value for name, value in command.items() if name != "command"}
    if command["command"] in LOCAL:
        return command
    try:
        parse_request(pack_request("0", command["command"], fields))
    except Rejected as rejected:
        raise rejected.error from None
    return command


def _bare_call(selector: str, text: str, context: Context | None) -> Command | None:
    """A call that names no object goes to the one that understands it; what is no call is a sentence."""
    if context is None or context.home is None:
        return None
    try:
        message = _message("", selector, text)
    except InvalidField:
        return None
    able = [name for name in context.objects if selector in context.understood(name)]
    if len(able) > 1 and context.home not in able:
        choices = ", ".join(f"{name}.{selector}" for name in able)
        raise InvalidField(f"several objects understand {selector}: say one of {choices}", field="target_oid")
    target = able[0] if len(able) == 1 else context.home
    return checked({**message, "target_oid": target})


def _message(target: str, selector: str, text: str) -> Command:
    call = _evaluate(text.removeprefix(f"{target}."))  # an oid would be no name
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise InvalidField(f"{text:.60} is no call; say OBJECT.METHOD(VALUE, …)", field="args")
    args = [_value(arg) for arg in call.args]
    kwargs = {keyword.arg or "**": _value(keyword.value) for keyword in call.keywords}
    if "**" in kwargs:
        raise InvalidField("** can't stand in a call here", field="kwargs")
    message = {"command": "send_message", "target_oid": target, "selector": selector, "args": args}
    return {**message, "kwargs": kwargs} if kwargs else message


def literal(text: str) -> Any:
    """Returns the value of a Python literal.

    Raises:
        InvalidField: it is none.
    """
    return _value(_evaluate(text))


def _evaluate(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is the user's business
            return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InvalidField(f"{text.strip():.60}: {error.msg}", field="args", offset=error.offset) from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise InvalidField(f"{text.strip():.60}: {error or 'nested too deeply'}", field="args") from None


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        shown = ast.unparse(node)
        raise InvalidField(
            f"{shown:.60} is no value; text stands in quotes: 'apples', numbers and lists as in Python",
            field="args",
        ) from None


# /commands


@dataclass(frozen=True, slots=True)
class Slash:
    """A command that starts with a slash: what may follow it, what it does, and how it is read."""

    usage: str
    meaning: str
    read: Callable[[str], Command]


def _slash(text: str) -> Command:
    name, rest = [*text[1:].split(None, 1), "", ""][:2]
    slash = SLASHES.get(name.casefold())
    if slash is None:
        raise UnknownCommand(f"no command /{name:.40}; /help lists them", commands=sorted(SLASHES))
    try:
        return slash.read(rest.strip())
    except BatosError as error:
        usage = f"/{name.casefold()} {slash.usage}".rstrip()
        raise InvalidField(f"{error}; say {usage}", field="command") from None


def _alone(command: str) -> Callable[[str], Command]:
    def read(rest: str) -> Command:
        if rest:
            raise InvalidField(f"nothing may follow, not {rest!r:.40}")
        return {"command": command}

    return read


def _with(command: str, field: str, *, optional: bool = False) -> Callable[[str], Command]:
    def read(rest: str) -> Command:
        if not rest and not optional:
            raise InvalidField("something is missing")
        return checked({"command": command, field: rest} if rest else {"command": command})

    return read


def _with_match(command: str, form: re.Pattern[str]) -> Callable[[str], Command]:
    def read(rest: str) -> Command:
        match = form.fullmatch(rest)
        if match is None:
            raise InvalidField("that can't be read" if rest else "something is missing")
        fields: dict[str, Any] = {name: text for name, text in match.groupdict().items() if text is not None}
        if "version" in fields:
            fields["version"] = int(fields["version"])
        if "value" in fields:
            fields["value"] = literal(fields["value"])
        return checked({"command": command, **fields})

    return read


def _create(rest: str) -> Command:
    names = rest.split()
    if not names:
        raise InvalidField("something is missing")
    parents = {"parents": names[1:]} if names[1:] else {}
    return checked({"command": "create_object", "name": names[0], **parents})


def _grant(rest: str) -> Command:
    try:
        where, kind, *said = shlex.split(rest)
    except ValueError:
        raise InvalidField("something is missing, or a quotation mark is open") from None
    target, _, slot = where.partition(".")
    read = _OPTIONS.get(kind)
    if read is None:
        raise InvalidField(f"{kind:.40} is no kind of grant; there are {', '.join(_OPTIONS)}")
    command = {"command": "grant", "target_oid": target, "kind": kind, "options": read(said)}
    return checked({**command, "slot": slot} if slot else command)


def _folder(said: list[str]) -> dict[str, Any]:
    if not 1 <= len(said) <= 2 or said[1:] not in ([], ["write"]):
        raise InvalidField("after files comes a PATH, quoted if it has blanks, then `write` or nothing")
    return {"path": os.path.abspath(os.path.expanduser(said[0])), "write": len(said) == 2}


def _hosts(said: list[str]) -> dict[str, Any]:
    return {"hosts": said}


def _no_options(said: list[str]) -> dict[str, Any]:
    if said:
        raise InvalidField(f"nothing may follow, not {said[0]!r:.40}")
    return {}


_OPTIONS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "files": _folder,
    "http": _hosts,
    "clock": _no_options,
    "recall": _no_options,
    "ask": _no_options,
}

SLASHES: dict[str, Slash] = {
    "help": Slash("", "shows this", _alone("help")),
    "objects": Slash("[PREFIX]", "lists the objects", _with("list_objects", "prefix", optional=True)),
    "inspect": Slash("OBJECT", "shows slots, parents and methods", _with("inspect", "target_oid")),
    "create": Slash("NAME [PARENT …]", "makes an object", _create),
    "set": Slash("OBJECT.SLOT = VALUE", "writes a data slot", _with_match("set_slot", _SLOT)),
    "unset": Slash("OBJECT.SLOT", "deletes a data slot", _with_match("delete_slot", _SLOT_NAME)),
    "history": Slash(
        "OBJECT.METHOD",
        "tells a method's versions",
        _with_match("method_history", _METHOD),
    ),
    "revert": Slash(
        "OBJECT.METHOD [VERSION]", "brings an earlier version back", _with_match("revert_method", _METHOD)
    ),
    "undo": Slash("TRANSACTION", "undoes a transaction", _with("undo", "transaction_id")),
    "grant": Slash(
        "OBJECT[.SLOT] KIND …",
        f"lets methods use a part of the world: {', '.join(kind.usage for kind in KINDS.values())}",
        _grant,
    ),
    "revoke": Slash("OBJECT.SLOT", "takes a grant back", _with_match("revoke", _SLOT_NAME)),
    "grants": Slash("[OBJECT]", "lists what was granted", _with("grants", "target_oid", optional=True)),
    "remember": Slash("TEXT", "keeps a text in the memory", _with("remember", "text")),
    "recall": Slash("QUERY", "searches the memory", _with("recall", "query")),
    "missions": Slash("[STATE]", "lists the missions", _with("missions", "state", optional=True)),
    "mission": Slash("ID", "shows a mission", _with("mission", "mission_id")),
    "cancel": Slash("ID", "cancels a mission", _with("cancel_mission", "mission_id")),
    "status": Slash("", "says how the kernel is", _alone("status")),
    "ping": Slash("", "asks the kernel for a sign of life", _alone("ping")),
    "shutdown": Slash("", "stops the kernel", _alone("shutdown")),
    "quit": Slash("", "leaves the client", _alone("quit")),
}
