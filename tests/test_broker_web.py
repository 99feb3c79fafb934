"""Granted hosts: what a method may fetch, and every way around the list that a web address offers."""

import asyncio
import gzip
import ipaddress
import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.broker import HOLDER, Refused, World
from uvm.broker import web
from uvm.broker.broker import MAX_THREADS
from uvm.broker.threads import Threads
from uvm.grant_options import HttpOptions, host_name

LIMITS: dict[str, Any] = {"max_bytes": 1000, "timeout_s": 5.0}
SYSTEM: dict[str, Any] = {**LIMITS, "resolve": web.resolver(Threads("names", 2))}


class Server:
    """A web server of our own; each path has its answer.

    Attributes:
        seen: requests, as their lines.
    """

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.port = 0
        self.serving: list[asyncio.Future[None]] = []
        self.other = ""
        self._answers: dict[str, Callable[[asyncio.StreamWriter], Awaitable[None]]] = {
            "/ok": lambda out: self.answer(out, "200 OK", "grüß".encode()),
            "/latin": lambda out: self.answer(
                out, "200 OK", "grüß".encode("latin-1"), "Content-Type: text/plain; charset=iso-8859-1"
            ),
            "/gone": lambda out: self.answer(out, "404 Not Found", b"no"),
            "/large": lambda out: self.answer(out, "200 OK", b"x" * 1001),
            "/squeezed": lambda out: self.answer(
                out, "200 OK", gzip.compress(b"x" * 10**6), "Content-Encoding: gzip"
            ),
            "/once": lambda out: self.redirect(out, "/ok"),
            "/loop": lambda out: self.redirect(out, "/loop"),
            "/away": lambda out: self.redirect(out, self.other),
            "/endless": self.endless,
            "/garbage": self.garbage,
        }

    async def answer(self, out: asyncio.StreamWriter, status: str, body: bytes, *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Set-Cookie: a=1", *headers, "", ""]
        out.write("\r\n".join(lines).encode() + body)

    async def redirect(self, out: asyncio.StreamWriter, where: str) -> None:
        await self.answer(out, "302 Found", b"", f"Location: {where}")

    async def endless(self, out: asyncio.StreamWriter) -> None:
        out.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            out.write(b"64\r\n" + b"x" * 100 + b"\r\n")
            await out.drain()

    async def garbage(self, out: asyncio.StreamWriter) -> None:
        out.write(b"\x00\x01 this is no HTTP\r\n\r\n")

    async def serve(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        self.serving.append(asyncio.ensure_future(out.wait_closed()))
        try:
            if (first := await reader.readexactly(1)) == b"\x16":  # TLS, which is not spoken here
                return
            lines = (first + await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            self.seen.append(lines)
            answer = self._answers.get(lines[0].split()[1].partition("?")[0])
            await (answer(out) if answer else reader.read())  # without an answer, waits until the other goes
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            out.close()

    @property
    def here(self) -> str:
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.port = listening.sockets[0].getsockname()[1]
    yield server
    listening.close()
    await asyncio.gather(*server.serving, return_exceptions=True)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


async def get(server: Server, path: str, **options: Any) -> dict[str, Any]:
    options = {"method": "GET", "headers": None, "hosts": [server.here], **SYSTEM, **options}
    return await web.fetch(address=f"http://{server.here}{path}", **options)


def resolver(*answers: list[str]) -> tuple[web.Resolve, list[str]]:
    """A resolver that gives these answers, the last again and again; and the names that it was asked for."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolve, asked


# What is allowed


async def test_an_answer_has_status_headers_and_text(server: Server) -> None:
    answer = await get(server, "/ok")
    assert (answer["status"], answer["text"], answer["headers"]["content-length"]) == (200, "grüß", "6")
    assert (await get(server, "/latin"))["text"] == "grüß"
    assert (await get(server, "/gone"))["status"] == 404
    assert (await get(server, "/once?a=b c".replace(" ", "%20")))["text"] == "grüß"
    assert (await get(server, "/ok", method="HEAD"))["status"] == 200
    assert server.seen[-1][0].startswith("HEAD /ok")


async def test_headers_are_sent_and_cookies_are_not_kept(server: Server) -> None:
    await get(server, "/ok", headers={"X-Mine": "1", "Authorization": "t"})
    assert "x-mine: 1" in server.seen[0]
    assert f"host: {server.here}" in server.seen[0]
    await get(server, "/once")
    assert not any(line.casefold().startswith("cookie") for lines in server.seen for line in lines)


async def test_proxies_of_the_environment_are_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await get(server, "/ok"))["status"] == 200


# Limits


@pytest.mark.parametrize("path", ["/large", "/endless", "/squeezed", "/loop"])
async def test_an_answer_beyond_the_limits_is_refused(server: Server, path: str) -> None:
    with pytest.raises(ValueError, match=r"larger|compressed|redirects"):
        await get(server, path)
    assert len(server.seen) <= 1 + web.MAX_REDIRECTS


async def test_an_answer_that_does_not_come_is_a_timeout(server: Server) -> None:
    with pytest.raises(TimeoutError):
        await get(server, "/silent", timeout_s=0.2)


async def test_a_handshake_that_does_not_end_is_a_timeout_too() -> None:
    ended = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        await reader.read()
        out.close()
        await out.wait_closed()
        ended.set()

    listening = await asyncio.start_server(mute, "127.0.0.1", 0)
    place = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    with pytest.raises(TimeoutError):
        await web.fetch("GET", f"https://{place}/", None, hosts=[place], **{**SYSTEM, "timeout_s": 0.3})
    async with asyncio.timeout(20):
        await ended.wait()  # the connection was closed, not forgotten
    listening.close()


async def test_a_server_that_fails_is_a_connection_error(server: Server) -> None:
    with pytest.raises(ConnectionError):
        await get(server, "/garbage")
    with pytest.raises(ConnectionError):  # no TLS there
        await web.fetch("GET", f"https://{server.here}/ok", None, hosts=[server.here], **SYSTEM)
    with pytest.raises(ConnectionError):
        await web.fetch("GET", "http://127.0.0.1:1/", None, hosts=["127.0.0.1:1"], **SYSTEM)
    resolve, _ = resolver([])
    with pytest.raises(ConnectionError):
        await web.fetch("GET", "http://a.test/", None, hosts=["a.test"], **LIMITS, resolve=resolve)


# The way around the list


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}@example.com/ok",
        "http://user@127.0.0.1:{port}/ok",
        "http://127.1:{port}/ok",
        "http://0x7f.1:{port}/ok",
        "http://2130706433:{port}/ok",
        "http://[::ffff:127.0.0.1]:{port}/ok",
        "http://localhost:{port}/ok",
        "http://localhost.:{port}/ok",
        "http://127.0.0.1/ok",
        "http://127.0.0.1:{port}\\@example.com/ok",
        "http://example.com#@127.0.0.1:{port}/ok",
        "http://127.0.0.1:{port}/o k",
        "http://127.0.0.1:{port}/ok\r\nX: y",
        "http:///ok",
        "http://127.0.0.1:99999/ok",
        "//127.0.0.1:{port}/ok",
        "file:///etc/passwd",
        "ftp://127.0.0.1:{port}/ok",
        "gopher://127.0.0.1:{port}/ok",
        "http://[fe80::1%25eth0]:{port}/ok",
        "",
    ],
)
async def test_an_address_that_is_not_the_one_listed_is_refused(server: Server, address: str) -> None:
    with pytest.raises((PermissionError, ValueError)):
        await web.fetch("GET", address.format(port=server.port), None, hosts=[server.here], **SYSTEM)
    assert server.seen == []


async def test_redirects_are_checked_like_first_addresses(server: Server) -> None:
    async with serving() as second:
        server.other = f"http://{second.here}/ok"
        with pytest.raises(PermissionError):
            await get(server, "/away")
        assert second.seen == []
        listed = [server.here, second.here]
        answer = await get(server, "/away", hosts=listed, headers={"Authorization": "secret"})
        assert answer["status"] == 200
        assert any("secret" in line for line in server.seen[-1])
        assert not any("secret" in line for line in second.seen[-1])
    for away in ("file:///etc/passwd", "http://user:x@127.0.0.1/", "http://10.0.0.1/", "//example.com/"):
        server.other = away
        with pytest.raises((PermissionError, ValueError)):
            await get(server, "/away")


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["fd00::1"],
    ],
)
async def test_a_name_that_leads_to_a_private_address_is_refused(server: Server, found: list[str]) -> None:
    place = f"inside.test:{server.port}"
    resolve, asked = resolver(found)
    with pytest.raises(PermissionError, match="no public address"):
        await web.fetch("GET", f"http://{place}/ok", None, hosts=[place], **LIMITS, resolve=resolve)
    assert (asked, server.seen) == (["inside.test"], [])


async def test_a_name_is_resolved_once_and_the_checked_address_is_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "is_public", lambda address: str(address) == "127.0.0.1")
    place = f"turning.test:{server.port}"
    resolve, asked = resolver(["127.0.0.1"], ["127.0.0.2"])
    answer = await web.fetch("GET", f"http://{place}/ok", None, hosts=[place], **LIMITS, resolve=resolve)
    assert (answer["status"], asked) == (200, ["turning.test"])
    assert f"host: {place}" in server.seen[0]
    with pytest.raises(PermissionError):
        await web.fetch("GET", f"http://{place}/ok", None, hosts=[place], **LIMITS, resolve=resolve)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_certificates_are_checked_for_the_name_and_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    files = ["-keyout", str(key), "-out", str(certificate), "-addext", "subjectAltName=DNS:inside.test"]
    process = await asyncio.create_subprocess_exec(
        "openssl", *made.split(), *files, stderr=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    monkeypatch.setattr(web, "is_public", lambda address: True)
    resolve, _ = resolver(["127.0.0.1"])

    async with serving(tls) as server:

        async def fetch(host: str) -> dict[str, Any]:
            place = f"{host}:{server.port}"
            return await web.fetch(
                "GET", f"https://{place}/ok", None, hosts=[place], **LIMITS, resolve=resolve
            )

        with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await fetch("inside.test")  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert (await fetch("inside.test"))["text"] == "grüß"
        with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await fetch("other.test")


async def test_localhost_by_name_is_this_machine_only(server: Server) -> None:
    place = f"localhost:{server.port}"
    for found, allowed in ((["127.0.0.1"], True), (["10.0.0.1"], False), (["93.184.216.34"], False)):
        resolve, _ = resolver(found)
        fetching = web.fetch("GET", f"http://{place}/ok", None, hosts=[place], **LIMITS, resolve=resolve)
        if allowed:
            assert (await fetching)["status"] == 200
        else:
            with pytest.raises(PermissionError):
                await fetching


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
    ],
)
def test_which_addresses_are_public(text: str, public: bool) -> None:
    assert web.is_public(ipaddress.ip_address(text)) is public


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "example.com"},
        {"host": "example.com"},
        {"Connection": "upgrade"},
        {"Content-Length": "5"},
        {"Transfer-Encoding": "chunked"},
        {"Proxy-Authorization": "x"},
        {"X": "a\r\nY: b"},
        {"X\r\n": "a"},
        {"": "a"},
        {"X": 1},
        {1: "X"},
        {"X": "ü"},
        {"X": "x" * 5000},
        {f"X{n}": "1" for n in range(100)},
    ],
)
async def test_headers_that_are_not_a_methods_to_set(server: Server, headers: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="header"):
        await get(server, "/ok", headers=headers)
    assert server.seen == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Example.COM.", "example.com"),
        ("bücher.de", "xn--bcher-kva.de"),
        ("EXAMPLE。com", "example.com"),
        ("[2606:2800:0220:0001::1]", "2606:2800:220:1::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("a_b.example.com", "a_b.example.com"),
    ],
)
def test_a_host_has_one_spelling(text: str, name: str) -> None:
    assert host_name(text) == name


@pytest.mark.parametrize(
    "text", ["", ".", "a b", "1.2.3", "0x7f000001", "a..b", "-a.b", "a/b", "a@b", "x" * 64, "::1%lo"]
)
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="no host name"):
        host_name(text)


# As a method uses it


async def test_a_method_gets_answers_and_ordinary_errors(server: Server, tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.start()
    try:
        hosts = HttpOptions(kind="http", hosts=[server.here], max_bytes=1000, timeout_s=5.0)
        await world.grant(hosts)
        answer = await world.once("http", "get", f"http://{server.here}/ok?token=s3cret", {"X-Key": "k3y"})
        assert (answer["status"], answer["text"]) == (200, "grüß")
        with pytest.raises(Refused, match=r"PermissionError: example\.com is not among the hosts granted"):
            await world.once("http", "get", "http://example.com/")
        with pytest.raises(Refused, match="ValueError"):
            await world.once("http", "get", "no address")
        told = [event for event in world.events if event["event"] == "capability"]
        assert told[0]["what"] == f"http://{server.here}/ok"
        assert not any(secret in str(world.events) for secret in ("s3cret", "k3y", "grüß"))
        [listed] = await world.granting.listed(HOLDER)
        assert listed["options"] == {"hosts": [server.here], "max_bytes": 1000, "timeout_s": 5.0}
    finally:
        await world.close()


async def test_name_servers_that_hang_hold_nobody_else_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        answer.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    world = World(tmp_path)
    await world.start()
    try:
        await world.grant(HttpOptions(kind="http", hosts=["a.test"], timeout_s=0.3))
        async with world.image.reading() as txn, asyncio.timeout(10):
            many = [world.call(txn).use("http", "get", "http://a.test/") for _ in range(MAX_THREADS + 8)]
            waiting = asyncio.gather(*many, return_exceptions=True)
            await asyncio.sleep(0)
            async with world.image.transaction("another") as other:
                other.find(HOLDER).count = 1
            assert not waiting.done()
            assert {str(refused) for refused in await waiting} == {
                "TimeoutError: http://a.test/ did not answer within 0.3 s"
            }
            assert not answer.is_set()
    finally:
        answer.set()
        await world.close()
