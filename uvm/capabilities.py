"""What may be granted to an object: the kinds of grants, their verbs, and how a verb is called.

Hands make facades of this table, the broker checks each use against it, prompts tell it to the writing model.
Imports the errors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uvm.errors import GrantMissing

_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a verb: its name, the exact types that it takes, and its default if it has one."""

    name: str
    types: tuple[type, ...]
    default: Any = _REQUIRED

    def told(self) -> str:
        """Returns the parameter as a signature has it."""
        return self.name if self.default is _REQUIRED else f"{self.name}={self.default!r}"


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that a grant lets a method do; `writes` says that it needs a grant that may write."""

    name: str
    parameters: tuple[Parameter, ...] = ()
    writes: bool = False

    def told(self) -> str:
        """Returns the verb with its parameters: `read_text(path)`."""
        return f"{self.name}({', '.join(parameter.told() for parameter in self.parameters)})"

    def bind(self, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the value of each parameter in a call with these arguments.

        Raises:
            TypeError: too many, too few, unknown, or of the wrong type.
        """
        if len(args) > len(self.parameters):
            raise TypeError(f"{self.told()} takes {len(self.parameters)} values, not {len(args)}")
        given = {parameter.name: value for parameter, value in zip(self.parameters, args, strict=False)}
        if wrong := kwargs.keys() & given.keys() | kwargs.keys() - {known.name for known in self.parameters}:
            raise TypeError(f"{self.told()} can't take {', '.join(sorted(wrong))!s:.100}")
        given |= kwargs
        return {parameter.name: self._value(parameter, given) for parameter in self.parameters}

    def _value(self, parameter: Parameter, given: Mapping[str, Any]) -> Any:
        value = given.get(parameter.name, parameter.default)
        if value is _REQUIRED:
            raise TypeError(f"{self.told()} needs {parameter.name}")
        if type(value) not in parameter.types and value is not parameter.default:
            kinds = " or ".join(kind.__name__ for kind in parameter.types)
            raise TypeError(f"{self.told()}: {parameter.name} is {kinds}, not {type(value).__name__}")
        return value


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of grant.

    Attributes:
        about: what it opens, in a few words; `{hosts}` stands for those granted.
        verbs: by name.
        usage: what follows the target in `/grant`.
        called: the grant itself is called, as in `self.ask(question)`; it has one verb, named as the kind.
    """

    about: str
    verbs: Mapping[str, Verb]
    usage: str
    called: bool = False

    def offered(self, slot: str, write: bool = True) -> list[str]:
        """Returns the calls that it offers under the name `slot`, as a method writes them."""
        usable = [verb for verb in self.verbs.values() if write or not verb.writes]
        if self.called:
            return [f"self.{slot}{verb.told().removeprefix(verb.name)}" for verb in usable]
        return [f"self.{slot}.{verb.told()}" for verb in usable]


def _kind(about: str, usage: str, *verbs: Verb, called: bool = False) -> Kind:
    return Kind(about, {verb.name: verb for verb in verbs}, usage, called)


_PATH = Parameter("path", (str,))
_TEXT = Parameter("text", (str,))
_DATA = Parameter("data", (bytes,))
_URL = Parameter("url", (str,))
_HEADERS = Parameter("headers", (dict,), None)

KINDS: dict[str, Kind] = {
    "files": _kind(
        "the files of one folder, by relative paths",
        "files PATH [write]",
        Verb("read_text", (_PATH,)),
        Verb("read_bytes", (_PATH,)),
        Verb("list", (Parameter("path", (str,), "."),)),
        Verb("exists", (_PATH,)),
        Verb("size", (_PATH,)),
        Verb("write_text", (_PATH, _TEXT), writes=True),
        Verb("write_bytes", (_PATH, _DATA), writes=True),
        Verb("append_text", (_PATH, _TEXT), writes=True),
        Verb("delete", (_PATH,), writes=True),
    ),
    "http": _kind(
        "the web at {hosts}; get returns a dict of 'status', 'headers' and 'text'",
        "http HOST …",
        Verb("get", (_URL, _HEADERS)),
        Verb("head", (_URL, _HEADERS)),
    ),
    "clock": _kind("the time, in UTC, as datetime and date", "clock", Verb("now"), Verb("today")),
    "recall": _kind(
        "the memory, searched by meaning; returns a list of dicts with 'text' and 'score'",
        "recall",
        Verb("recall", (Parameter("query", (str,)), Parameter("k", (int,), 5))),
        called=True,
    ),
    "ask": _kind(
        "a language model, which answers a question in text",
        "ask",
        Verb(
            "ask",
            (
                Parameter("question", (str,)),
                Parameter("persona", (str,), None),
                Parameter("max_tokens", (int,), 256),
            ),
        ),
        called=True,
    ),
}


def missing(label: str, target: str, name: str, **details: Any) -> GrantMissing:
    """Returns the error for a grant that nobody in the delegation chain of an object holds.

    Args:
        label: how people call the object.
        target: its oid.
        name: one of `KINDS`.
    """
    told = f"{label} has no grant '{name}'; grant it with `/grant {label} {KINDS[name].usage}`"
    return GrantMissing(told, target=target, grant=name, **details)
