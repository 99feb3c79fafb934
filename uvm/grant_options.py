"""What a grant may say: the options of each kind, validated at the edge, and host names in one spelling.

Part of the wire: `uvm.messages` puts these models into its commands. Imports nothing of BAT OS.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePath
from typing import Annotated, Literal

import idna
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

MIB = 1 << 20
MAX_FILE_BYTES = 4 * MIB  # has to fit into one frame of a hand, with room to spare
MAX_BODY_BYTES = 4 * MIB
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_PORTED = re.compile(r"(?P<host>\[.*\]|[^:]*):(?P<port>[0-9]{1,5})")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a name that ends in one is read as an address by resolvers


def host_name(text: str) -> str:
    """Returns a host name or address in the one spelling that is compared and connected to.

    Lower case, IDNA 2008 as ASCII, without the dot of the root; IPv6 addresses without brackets.

    Raises:
        ValueError: it is none.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return ipaddress.ip_address(bare).compressed if "%" not in bare else _refuse(text)
    except ValueError:
        if "%" in bare or bare != text:
            _refuse(text)
    try:
        name = idna.encode(text.removesuffix("."), uts46=True).decode("ascii").lower()
    except idna.IDNAError:
        name = text.removesuffix(".").lower()  # names with underscores are in use, though no host should
    labels = name.split(".")
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
        _refuse(text)
    return name


def _refuse(text: str) -> str:
    raise ValueError(f"{text!r:.80} is no host name")


def with_port(host: str, port: int) -> str:
    """Returns a host with a port as lists of hosts spell it: `example.com:8080`, `[::1]:8080`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(text: str) -> str:
    """Returns an entry of a list of hosts in its one spelling."""
    match = _PORTED.fullmatch(text)
    if match is None:
        return host_name(text)
    if not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{text!r:.80} has no such port")
    return with_port(host_name(match["host"]), int(match["port"]))


def _absolute(path: str) -> str:
    if "\0" in path or not PurePath(path).is_absolute():
        raise ValueError("must be an absolute path of a folder")
    return path


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FilesOptions(_Options):
    """A folder; `max_bytes` is the largest file that is read or written."""

    kind: Literal["files"]
    path: Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_absolute)]
    write: bool = False
    max_bytes: Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)] = MIB


class HttpOptions(_Options):
    """Hosts, with a port where it is not that of the scheme; limits of one answer."""

    kind: Literal["http"]
    hosts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=300), AfterValidator(_host)]],
        Field(min_length=1, max_length=100),
    ]
    max_bytes: Annotated[int, Field(ge=1, le=MAX_BODY_BYTES)] = MIB
    timeout_s: Annotated[float, Field(gt=0, le=60, strict=False)] = 10.0


class NoOptions(_Options):
    """The kinds that need nothing said."""

    kind: Literal["clock", "recall", "ask"]


GrantOptions = Annotated[FilesOptions | HttpOptions | NoOptions, Field(discriminator="kind")]
