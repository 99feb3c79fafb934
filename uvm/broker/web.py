"""Reading from the web for a method: hosts that were listed, addresses that are public, within limits.

A name is resolved once, its addresses are checked, and the connection goes to one of these very addresses, so
that a name can't mean something else the second time. No cookies, no proxies, no stored passwords.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self
from urllib.parse import quote, urljoin, urlsplit

import httpcore2

from uvm.broker.threads import Threads
from uvm.grant_options import host_name, with_port

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

MAX_REDIRECTS = 3
MAX_URL = 4096  # characters
MAX_HEADERS = 32
MAX_HEADER = 4096  # characters
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = {301, 302, 303, 307, 308}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED_HEADERS = frozenset(
    [
        "host",
        "connection",
        "content-length",
        "transfer-encoding",
        "te",
        "trailer",
        "upgrade",
        "expect",
        "accept-encoding",
    ]
)
_CHARSET = re.compile(r"charset=[\"']?(us-ascii|iso-8859-1|iso-8859-15|latin-1|windows-1252|utf-16)\b", re.I)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Url:
    """A checked web address; `target` is path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def place(self) -> str:
        """The host, with its port where that is not the scheme's own."""
        return with_port(self.host, self.port) if self.port != _PORTS[self.scheme] else _bracketed(self.host)

    @property
    def told(self) -> str:
        """The address without its query, which may hold secrets."""
        return f"{self.scheme}://{self.place}{self.target.partition('?')[0]}"


def parse(text: str) -> Url:
    """Returns a web address in its parts.

    Raises:
        ValueError: it is none, or has a user's name in it.
    """
    if len(text) > MAX_URL or re.search(r"[\x00-\x20\x7f\\]", text):
        raise ValueError(f"{text!r:.100} is no web address: too long, or with blanks in it")
    split = urlsplit(text)
    if split.scheme not in _PORTS or "@" in split.netloc or not split.hostname:
        raise ValueError(f"{text!r:.100} is no address like https://host/path")
    target = quote(split.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = f"?{quote(split.query, safe='/%:@!$&()*+,;=~-._?')}" if split.query else ""
    return Url(split.scheme, host_name(split.hostname), split.port or _PORTS[split.scheme], target + query)


async def fetch(
    method: str,
    address: str,
    headers: Mapping[Any, Any] | None,
    *,
    hosts: Sequence[str],
    max_bytes: int,
    timeout_s: float,
    resolve: Resolve,
) -> dict[str, Any]:
    """Returns `{status, headers, text}` of what is at a web address.

    Args:
        method: GET or HEAD.
        hosts: in the spelling of `uvm.grant_options`.
        max_bytes: of the body.
        timeout_s: of everything together, redirects included.
        resolve: host and port -> addresses.

    Raises:
        PermissionError: a host that is not listed, or one that leads to a private address.
        ValueError: no web address, no usable header, an answer that is too large or compressed.
        TimeoutError, ConnectionError: it did not come in time, or not at all.
    """
    sent = _checked_headers(headers or {})
    try:
        async with asyncio.timeout(timeout_s):
            return await _follow(method, parse(address), sent, hosts, max_bytes, resolve)
    except (TimeoutError, httpcore2.TimeoutException):
        raise TimeoutError(f"{parse(address).told} did not answer within {timeout_s:g} s") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.UnsupportedProtocol) as error:
        raise ConnectionError(f"{parse(address).told}: {type(error).__name__}: {error}"[:300]) from None


async def _follow(
    method: str, url: Url, headers: dict[str, str], hosts: Sequence[str], max_bytes: int, resolve: Resolve
) -> dict[str, Any]:
    for _ in range(MAX_REDIRECTS + 1):
        addresses = await _addresses(url, hosts, resolve)
        answer, location = await _request(method, url, headers, addresses, max_bytes)
        if answer["status"] not in _REDIRECTS or location is None:
            return answer
        there = parse(urljoin(f"{url.scheme}://{url.place}{url.target}", location))
        if (url.scheme, there.scheme) == ("https", "http"):
            raise PermissionError(f"{url.told} leads from https to http")
        if there.place != url.place:
            headers = {}  # what was meant for one host is not told to another
        url = there
    raise ValueError(f"{url.told}: more than {MAX_REDIRECTS} redirects")


async def _addresses(url: Url, hosts: Sequence[str], resolve: Resolve) -> list[str]:
    """Returns the addresses that a listed host may be reached at.

    Raises:
        PermissionError: it is not listed, or an address of it is not public.
        ConnectionError: it has none.
    """
    default = url.port == _PORTS[url.scheme]
    if with_port(url.host, url.port) not in hosts and not (default and url.host in hosts):
        raise PermissionError(f"{url.place} is not among the hosts granted: {', '.join(hosts)}"[:300])
    literal = _literal(url.host)
    if literal is not None:
        return [str(literal)]
    found = [ipaddress.ip_address(text.partition("%")[0]) for text in await resolve(url.host, url.port)]
    for address in found:
        if not (address.is_loopback if url.host == "localhost" else is_public(address)):
            raise PermissionError(f"{url.host} leads to {address}, which is no public address")
    if not found:
        raise ConnectionError(f"{url.host} has no address")
    return [str(address) for address in found]


def is_public(address: Address) -> bool:
    """Returns whether an address is of the public network, whatever other address it may wrap."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(inner is not None for inner in wrapped) or int(address) >> 32 == 0:
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def _request(
    method: str, url: Url, headers: dict[str, str], addresses: list[str], max_bytes: int
) -> tuple[dict[str, Any], str | None]:
    """Returns an answer and the place that it redirects to, if it names one."""
    sent = {"user-agent": "BATOS", "accept": "*/*"} | headers
    sent |= {"host": url.place, "accept-encoding": "identity", "connection": "close"}
    where = httpcore2.URL(
        scheme=url.scheme.encode(), host=url.host.encode(), port=url.port, target=url.target.encode()
    )
    context = httpcore2.default_ssl_context() if url.scheme == "https" else None
    async with (
        _Pinned(addresses) as backend,
        httpcore2.AsyncConnectionPool(context, max_connections=1, network_backend=backend) as pool,
    ):
        fields = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
        async with pool.stream(method, where, headers=fields) as response:
            told = _told_headers(response.headers)
            if method != "HEAD" and told.get("content-encoding", "identity").casefold() != "identity":
                raise ValueError(f"{url.told} came compressed, though it was asked not to")
            body = await _body(response, max_bytes, url)
    text = body.decode(_charset(told), errors="replace")
    return {"status": response.status, "headers": told, "text": text}, told.get("location")


async def _body(response: httpcore2.Response, max_bytes: int, url: Url) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"{url.told} is larger than {max_bytes} bytes")
    return bytes(body)


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to the addresses given, whatever the host is called, and leaves no connection open."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses
        self._inner = httpcore2.AnyIOBackend()
        self._opened: list[httpcore2.AsyncNetworkStream] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._opened:  # the pool forgets one whose TLS handshake is cancelled
            await stream.aclose()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (the library's)
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Returns a connection to the first address that accepts one."""
        refusal: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in self._addresses:
            try:
                stream = await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
                self._opened.append(stream)
                return stream
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                refusal = error
        raise refusal


def resolver(threads: Threads) -> Resolve:
    """Returns the system's own way to look a name up, in these threads."""

    async def resolve(host: str, port: int) -> list[str]:
        try:
            found = await threads.run(partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            raise ConnectionError(f"{host} is not known: {error.strerror or error}") from None
        return list(dict.fromkeys(str(address[4][0]) for address in found))

    return resolve


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _checked_headers(headers: Mapping[Any, Any]) -> dict[str, str]:
    if len(headers) > MAX_HEADERS:
        raise ValueError(f"more than {MAX_HEADERS} headers")
    for name, value in headers.items():
        plain = type(name) is str and type(value) is str and len(value) <= MAX_HEADER
        if not plain or not _TOKEN.fullmatch(name) or re.search(r"[^\t\x20-\x7e]", value):
            raise ValueError(f"{name!r:.60} is no header, which is a name and an ASCII text")
        if name.casefold() in _RESERVED_HEADERS or name.casefold().startswith("proxy-"):
            raise ValueError(f"the header {name} is not a method's to set")
    return {name.casefold(): value for name, value in headers.items()}


def _told_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    told: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").casefold(), raw_value.decode("latin-1")
        told[name] = f"{told[name]}, {value}" if name in told else value
    return told


def _charset(headers: Mapping[str, str]) -> str:
    """Returns the charset that an answer names, where it is a common one; else UTF-8."""
    found = _CHARSET.search(headers.get("content-type", ""))
    return found[1] if found else "utf-8"
