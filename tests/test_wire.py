"""The walls of the wire: who gets in, what a stranger is told, and how much a client may have under way.

A real bridge with a small handler behind it; where the whole process counts, a real kernel.
"""

import asyncio
import contextlib
import os
import socket as sockets
import stat
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
import zmq.auth

from evals.kernels import PROJECT, KernelProcess, free_endpoint
from tests.conftest import Start, scripted
from uvm import admission, codec, handshakes, keys, publisher
from uvm.admission import Admission, Share
from uvm.bridge import MOST_READ_REFUSED, Bridge
from uvm.client import Kernel
from uvm.errors import BatosError, HomeError, KernelRefused, KernelUnreachable, QueueFull
from uvm.keyfiles import read_pair, read_public
from uvm.listening import BATCH, reaches_beyond, received
from uvm.messages import Command, pack_request, unpack

WITHIN_S = 3.0  # a refused client must know by then
PATIENCE_S = 20.0  # for everything else: the machine may be busy
MAX_BYTES = 100_000


@dataclass
class House:
    """A bridge, and behind it a counter that `set_slot` advances and a room where `status` waits."""

    keys_dir: Path
    endpoint: str = field(default_factory=free_endpoint)
    events: str = field(default_factory=free_endpoint)
    counter: int = 0
    waiting: int = 0
    faults: list[BaseException] = field(default_factory=list)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    clients: list[Kernel] = field(default_factory=list)

    async def handle(self, command: Command) -> Any:
        if command.command == "set_slot":
            self.counter += 1
        elif command.command == "status":
            self.waiting += 1
            await self.leave.wait()
        return self.counter

    def client(self, keys_dir: Path | None = None) -> Kernel:
        self.clients.append(Kernel(self.endpoint, self.events, keys_dir or self.keys_dir, PATIENCE_S))
        return self.clients[-1]

    async def ping(self, keys_dir: Path | None = None) -> Any:
        async with self.client(keys_dir) as kernel:
            return await kernel.request("ping", timeout_s=PATIENCE_S)

    async def hear(self, keys_dir: Path | None = None) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            async with contextlib.aclosing(self.client(keys_dir).events()) as events:
                return await anext(events)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    made = House(tmp_path / "keys")
    async with serving(made):
        yield made


@contextlib.asynccontextmanager
async def serving(house: House) -> AsyncIterator[Bridge]:
    keys.ensure_keys(house.keys_dir)
    bridge = Bridge(
        endpoint=house.endpoint,
        events_endpoint=house.events,
        keys_dir=house.keys_dir,
        max_message_bytes=MAX_BYTES,
        handler=house.handle,
        report=house.faults.append,
    )
    await bridge.start()
    house.bridge = bridge  # type: ignore[attr-defined]
    try:
        yield bridge
    finally:
        house.leave.set()
        for client in house.clients:
            await client.close()
        await bridge.close(1.0)


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    """Waits until `condition()` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what it waits for happens in a thread of libzmq)
            await asyncio.sleep(0.01)


def stranger(house: House, folder: Path, *, kernel: bool = True) -> Path:
    """Makes keys that nobody admitted; without `kernel`, those of another kernel altogether."""
    keys.ensure_keys(folder)
    if kernel:
        (folder / "kernel.key").write_bytes((house.keys_dir / "kernel.key").read_bytes())
    return folder


# Who is refused, and how it learns


async def test_an_admitted_client_is_answered(house: House) -> None:
    assert await house.ping() == 0


@pytest.mark.parametrize("knock", ["ping", "hear"])
@pytest.mark.parametrize(
    ("kernel", "reason", "remedy"),
    [(True, "not_listed", "key add NAME"), (False, "wrong_server", "BATOS_HOME")],
)
async def test_a_stranger_is_told_why(
    house: House, tmp_path: Path, kernel: bool, reason: str, remedy: str, knock: str
) -> None:
    folder = stranger(house, tmp_path / "stranger", kernel=kernel)
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(KernelRefused, match=remedy) as refusal:
            await getattr(house, knock)(folder)
    assert refusal.value.details["reason"] == reason
    assert await house.ping() == 0  # the others are served


async def test_without_keys_it_says_where_they_come_from(house: House, tmp_path: Path) -> None:
    with pytest.raises(KernelUnreachable, match=r"no keys in .*puter\.sh"):
        await house.ping(tmp_path / "nothing")


async def test_a_torn_key_is_named(house: House, tmp_path: Path) -> None:
    folder = stranger(house, tmp_path / "torn")
    (folder / "client.key_secret").write_bytes((folder / "client.key_secret").read_bytes()[:-30])
    with pytest.raises(HomeError, match=r"client\.key_secret"):
        await house.ping(folder)


@pytest.mark.skipif(os.name == "nt", reason="no modes")
async def test_a_secret_that_others_can_read_is_not_used(house: House) -> None:
    secret = house.keys_dir / "client.key_secret"
    secret.chmod(0o640)
    with pytest.raises(HomeError, match="chmod 600"):
        await house.ping()


STRANGER = (KernelRefused, "not the kernel of the keys")
SILENT = (KernelUnreachable, "something listens at .* a busy kernel, or none of ours")


@pytest.mark.parametrize(
    ("greeting", "patience_s", "told"),
    [
        (b"", 1.0, SILENT),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", PATIENCE_S, STRANGER),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", PATIENCE_S, STRANGER),
    ],
)
async def test_what_is_no_kernel_is_told_from_none(
    tmp_path: Path, greeting: bytes, patience_s: float, told: tuple[type[BatosError], str]
) -> None:
    house = House(tmp_path / "keys")
    keys.ensure_keys(house.keys_dir)
    callers: list[asyncio.StreamWriter] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer)
        writer.write(greeting)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        callers.remove(writer)

    with pytest.raises(KernelUnreachable, match=r"no answer.*puter\.sh"):
        async with Kernel(house.endpoint, house.events, house.keys_dir, 1.0):
            pass
    port = int(house.endpoint.rpartition(":")[2])
    async with await asyncio.start_server(greet, "127.0.0.1", port):
        with pytest.raises(told[0], match=told[1]):
            async with Kernel(house.endpoint, house.events, house.keys_dir, patience_s):
                pass
        await until(lambda: not callers)


async def test_a_handshake_that_ran_out_of_time_is_no_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path / "keys")
    keys.ensure_keys(house.keys_dir)

    async def cut_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    monkeypatch.setattr(handshakes, "SLOW_S", 0.0)
    port = int(house.endpoint.rpartition(":")[2])
    async with await asyncio.start_server(cut_off, "127.0.0.1", port):
        with pytest.raises(KernelUnreachable, match="a busy kernel, or none of ours"):
            async with Kernel(house.endpoint, house.events, house.keys_dir, 1.0):
                pass


async def test_a_kernel_without_curve_is_no_kernel(tmp_path: Path) -> None:
    house = House(tmp_path / "keys")
    keys.ensure_keys(house.keys_dir)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as plain:
        plain.linger = 0
        plain.bind(house.endpoint)
        with pytest.raises(KernelRefused):
            await house.ping()


async def test_a_client_without_curve_is_cut_off(house: House) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        monitor = plain.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        plain.connect(house.endpoint)
        await plain.send(pack_request("1", "set_slot", {"target_oid": "x", "slot": "y", "value": 1}))
        async with asyncio.timeout(PATIENCE_S):
            await monitor.recv_multipart()
        plain.disable_monitor()  # first: an event that nobody reads would block the I/O thread
        monitor.close()
    assert await house.ping() == 0


@pytest.mark.parametrize("waits", [True, False])
async def test_events_end_with_the_connection(house: House, waits: bool) -> None:
    kernel = house.client()
    events = kernel.events("news")
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    first = asyncio.ensure_future(anext(events))

    def told() -> bool:
        bridge.publish("news", {"n": 1})
        return first.done()

    await until(told)
    if waits:
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await kernel.close()
    else:
        await kernel.close()
        following = asyncio.ensure_future(anext(events))
    with pytest.raises(KernelUnreachable, match="the connection was closed"):
        await following
    with pytest.raises(KernelUnreachable, match="the connection was closed"):
        await anext(kernel.events())
    with pytest.raises(KernelUnreachable, match="the connection was closed"):
        await kernel.request("ping")


async def test_who_has_caught_up_misses_nothing_from_then_on(house: House) -> None:
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    everything = house.client().events()
    others = asyncio.ensure_future(anext(everything))
    for number in range(20):
        client = house.client()
        events = client.events("news", "token")
        heard = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)  # it subscribes
        async with asyncio.timeout(PATIENCE_S):
            await client.caught_up()
            bridge.publish("news", {"n": number})
            assert (await heard)["n"] == number
        await events.aclose()
    async with asyncio.timeout(PATIENCE_S):
        assert (await others)["event"] == "news"  # answers to others are not taken for events
    await everything.aclose()


async def test_who_has_caught_up_has_heard_all_before(house: House) -> None:
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    client = house.client()
    heard: list[int] = []

    async def listen() -> None:
        async for event in client.events("news"):
            heard.append(event["n"])

    listener = asyncio.create_task(listen())
    await asyncio.sleep(0)  # it subscribes
    async with asyncio.timeout(PATIENCE_S):
        await client.caught_up()
        for number in range(200):
            bridge.publish("news", {"n": number})
        await client.caught_up()
    assert heard == list(range(200))
    waiting = asyncio.ensure_future(client.caught_up())
    await asyncio.sleep(0)
    listener.cancel()
    await asyncio.wait_for(waiting, PATIENCE_S)  # nobody listens: nothing is missing


CHURN = """
import asyncio, sys
from pathlib import Path
from uvm.client import Kernel

async def churn(endpoint, events, keys_dir):
    for _ in range(100):
        kernel = Kernel(endpoint, events, Path(keys_dir))
        listeners = [asyncio.create_task(anext(kernel.events())) for _ in range(10)]
        await asyncio.sleep(0)
        for listener in listeners[::2]:
            listener.cancel()
        await asyncio.wait(listeners[::2])
        await kernel.close()
        await asyncio.gather(*listeners, return_exceptions=True)
    print("closed")

asyncio.run(churn(*sys.argv[1:]))
"""


async def test_a_client_that_leaves_during_its_handshakes_does_not_hang(house: House) -> None:
    """In a process of its own: what hung was ZeroMQ's thread, and with it every end of the process."""
    arguments = ["-c", CHURN, house.endpoint, house.events, str(house.keys_dir)]
    child = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=PROJECT, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(3 * PATIENCE_S):
            told, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert (told, child.returncode) == (b"closed\n", 0)


# Keys that come and go while the kernel runs


async def test_an_added_client_gets_in_at_once(house: House) -> None:
    folder = keys.add_client(house.keys_dir, "ada")
    assert await house.ping(folder) == 0


async def test_a_revoked_client_is_out_at_once(house: House) -> None:
    folder = keys.add_client(house.keys_dir, "ada")
    carried = folder.rename(house.keys_dir.parent / "carried")
    async with house.client(carried) as ada, house.client() as local:
        keys.revoke_client(house.keys_dir, "ada")
        with pytest.raises(KernelRefused, match="revoked"):
            await ada.request("set_slot", target_oid="x", slot="y", value=1, timeout_s=PATIENCE_S)
        assert await local.request("ping", timeout_s=PATIENCE_S) == 0
        with pytest.raises(KernelRefused, match="key add"):
            await house.ping(carried)
        keys.add_client(house.keys_dir, "bob")  # the folder has changed again: still out
        with pytest.raises(KernelRefused):
            await ada.request("ping", timeout_s=PATIENCE_S)


async def test_a_revoked_client_is_not_told_what_it_had_asked(house: House) -> None:
    folder = keys.add_client(house.keys_dir, "ada")
    carried = folder.rename(house.keys_dir.parent / "carried")
    async with house.client(carried) as ada:
        asked = asyncio.create_task(ada.request("status"))
        await until(lambda: house.waiting)
        keys.revoke_client(house.keys_dir, "ada")
        house.leave.set()
        with pytest.raises(KernelRefused, match="revoked"):
            await asked


async def test_a_revoked_subscriber_hears_nothing_more(house: House) -> None:
    folder = keys.add_client(house.keys_dir, "ada")
    carried = folder.rename(house.keys_dir.parent / "carried")
    heard: dict[str, list[int]] = {"ada": [], "local": []}
    refused: list[BaseException] = []

    async def listen(name: str, keys_dir: Path) -> None:
        try:
            async for event in house.client(keys_dir).events("news"):
                heard[name].append(event["n"])
        except KernelRefused as error:
            refused.append(error)

    listeners = [
        asyncio.create_task(listen("ada", carried)),
        asyncio.create_task(listen("local", house.keys_dir)),
    ]
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    number = 0

    def told(name: str) -> bool:
        nonlocal number
        number += 1
        bridge.publish("news", {"n": number})
        return bool(heard[name]) and heard[name][-1] > last

    last = 0
    await until(lambda: told("ada"))
    await until(lambda: told("local"))
    keys.revoke_client(house.keys_dir, "ada")
    last = number
    await until(lambda: told("local"))
    await until(lambda: refused)
    assert max(heard["ada"]) <= last
    for listener in listeners:
        listener.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)


async def test_an_address_that_stays_taken_is_told_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    listens = bridge._publisher._listen
    tries = 0

    def fail() -> zmq.asyncio.Socket:
        nonlocal tries
        tries += 1
        raise HomeError("taken")

    monkeypatch.setattr(publisher, "RETRY_S", 0.0)
    monkeypatch.setattr(bridge._publisher, "_listen", fail)
    bridge._publisher._start_afresh()
    await until(lambda: tries > 2 * publisher.EXPECTED_TRIES)
    assert [str(fault) for fault in house.faults] == ["taken"]
    monkeypatch.setattr(bridge._publisher, "_listen", listens)
    await until(lambda: bridge._publisher._socket is not None)


async def test_a_torn_key_lets_nobody_in_and_stops_nobody(house: House) -> None:
    (house.keys_dir / "clients" / "torn.key").write_text('curve\n    public-key = "abc"\n')
    for _ in range(3):
        assert await house.ping() == 0
    assert [type(fault) for fault in house.faults] == [HomeError]  # told once
    assert "torn.key" in str(house.faults[0])


async def test_to_refuse_a_large_message_costs_nothing(house: House) -> None:
    folder = keys.add_client(house.keys_dir, "ada")
    carried = folder.rename(house.keys_dir.parent / "carried")
    socket = house.client(carried)._keyed(zmq.DEALER)
    socket.connect(house.endpoint)
    await socket.send(pack_request("0", "ping", {}))
    await socket.recv()
    keys.revoke_client(house.keys_dir, "ada")
    large = {"text": "x" * MOST_READ_REFUSED}
    otherwise = codec.encode({**large, "v": 1, "id": "4", "command": "ping"})
    for request, request_id in (
        (pack_request("1", "ping", {}), "1"),
        (pack_request("22", "ping", large), "22"),  # as the Python client begins them
        (pack_request("x" * 40, "ping", large), None),
        (otherwise, None),
    ):
        await socket.send(request)
        async with asyncio.timeout(PATIENCE_S):
            answer = unpack(await socket.recv())
        assert answer["id"] == request_id
        assert answer["error"]["details"]["reason"] == "revoked"
    socket.close(linger=0)


async def test_after_each_refused_message_others_run(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, turns_at_refusals = 0, []

    async def flood(_: object) -> AsyncIterator[list[zmq.Frame]]:
        for _ in range(5):
            yield [zmq.Frame(b"who"), zmq.Frame(pack_request("1", "ping", {}))]
        await asyncio.Event().wait()

    def send(_envelope: list[bytes], _reply: bytes) -> bool:
        turns_at_refusals.append(turns)
        return True

    monkeypatch.setattr("uvm.bridge.received", flood)
    monkeypatch.setattr(house.bridge, "_send", send)  # type: ignore[attr-defined]
    reading = asyncio.create_task(house.bridge._read_requests())  # type: ignore[attr-defined]
    while len(turns_at_refusals) < 5:
        await asyncio.sleep(0)
        turns += 1
    reading.cancel()
    assert len(set(turns_at_refusals)) == 5


# What is recorded can't be played again


async def test_a_replayed_session_has_no_effect(house: House) -> None:
    recorded: list[bytes] = []
    port = int(house.endpoint.rpartition(":")[2])

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_kernel = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
            while data := await source.read(65536):
                if keep:
                    recorded.append(data)
                sink.write(data)
                await sink.drain()
            sink.close()

        with contextlib.suppress(ConnectionError):
            await asyncio.gather(pump(reader, to_kernel[1], True), pump(to_kernel[0], writer, False))

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as proxy:
        through = f"tcp://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with Kernel(through, house.events, house.keys_dir) as kernel:
            await kernel.request("set_slot", target_oid="x", slot="y", value="a secret")
    assert house.counter == 1
    assert len(b"".join(recorded)) > 500
    assert b"a secret" not in b"".join(recorded)
    for chunks in (recorded, [b"".join(recorded)], recorded + recorded[-1:] * 5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
            async with asyncio.timeout(PATIENCE_S):
                while await reader.read(65536):  # until the kernel cuts it off
                    pass
        writer.close()
    assert await house.ping() == 1
    assert house.counter == 1


# Bounds


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.SUB])
async def test_a_message_that_is_too_large_ends_its_connection(house: House, kind: int) -> None:
    client = house.client()
    socket = client._keyed(kind)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.connect(house.endpoint if kind == zmq.DEALER else house.events)
    if kind == zmq.DEALER:
        await socket.send(bytes(MAX_BYTES + 1))
    else:
        socket.subscribe(b"x" * (MAX_BYTES + 1))
    async with asyncio.timeout(PATIENCE_S):
        await monitor.recv_multipart()
    monitor.close()
    socket.close(linger=0)
    assert await house.ping() == 0


async def test_topics_beyond_count_are_not_kept(house: House) -> None:
    client = house.client()
    socket = client._keyed(zmq.SUB)
    socket.sndhwm = 0  # or libzmq drops subscriptions on this side
    socket.connect(house.events)
    for n in range(20 * publisher.MAX_TOPICS):
        socket.subscribe(f"topic-{n}")
    socket.subscribe("x" * (publisher.MAX_TOPIC_BYTES + 1))
    socket.subscribe("last")
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    heard = asyncio.ensure_future(socket.recv_multipart())

    def told() -> bool:
        bridge.publish("last", {"n": 1})
        return heard.done()

    await until(told)
    assert (await heard)[0] == b"last"  # those beyond the bound are served all the same
    assert len(bridge._publisher._topics) == publisher.MAX_TOPICS
    socket.close(linger=0)


async def test_one_connection_can_not_take_all_the_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    bridge._admission = Admission(Share(5, 1 << 20), Share(100, 1 << 20), Share(100, 1 << 20))
    async with house.client() as greedy, house.client() as modest:
        asked = [asyncio.create_task(greedy.request("status")) for _ in range(8)]
        await until(lambda: sum(task.done() for task in asked) == 3)
        for task in asked:
            if task.done():
                with pytest.raises(QueueFull, match="this connection"):
                    await task
        assert await modest.request("ping", timeout_s=PATIENCE_S) == 0
        house.leave.set()
        await until(lambda: all(task.done() for task in asked))
        assert sum(task.exception() is None for task in asked) == 5
        assert await greedy.request("ping", timeout_s=PATIENCE_S) == 0


async def test_many_connections_of_one_key_can_not_take_all_the_room(house: House) -> None:
    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    bridge._admission = Admission(Share(5, 1 << 20), Share(8, 1 << 20), Share(10, 1 << 20))
    ada = keys.add_client(house.keys_dir, "ada")
    async with house.client(ada) as one, house.client(ada) as two, house.client() as modest:
        asked = [asyncio.create_task(kernel.request("status")) for kernel in (one, two) for _ in range(5)]
        await until(lambda: sum(task.done() for task in asked) == 2)
        for task in asked:
            if task.done():
                with pytest.raises(QueueFull, match="of this key"):
                    await task
        assert await modest.request("ping", timeout_s=PATIENCE_S) == 0
        house.leave.set()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_a_flood_lets_others_run_in_between() -> None:
    order: list[str] = []

    async def other() -> None:
        order.append("other")

    with zmq.asyncio.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        pull.bind("inproc://flood")
        push.connect("inproc://flood")
        for _ in range(200):
            await push.send(b"x")
        waiting = asyncio.create_task(other())
        async for _ in received(pull):
            order.append("message")
            if len(order) > 200:
                break
        await waiting
    assert order.index("other") <= BATCH


def test_what_is_under_way_is_counted_in_requests_and_bytes() -> None:
    room = Admission(connection=Share(2, 100), client=Share(2, 100), all=Share(3, 150))
    room.enter("a", b"1", 1000)  # one of any size always fits
    with pytest.raises(QueueFull):
        room.enter("b", b"2", 1)
    room.leave("a", b"1", 1000)
    room.enter("a", b"1", 60)
    with pytest.raises(QueueFull, match="this connection"):
        room.enter("a", b"1", 60)
    with pytest.raises(QueueFull, match="of this key"):
        room.enter("a", b"another", 60)
    room.enter("b", b"1", 60)
    room.enter("c", b"1", 10)
    with pytest.raises(QueueFull, match="all connections"):
        room.enter("d", b"1", 10)
    for key, size in (("a", 60), ("b", 60), ("c", 10)):
        room.leave(key, b"1", size)
    assert room == Admission(connection=Share(2, 100), client=Share(2, 100), all=Share(3, 150))
    assert admission.CONNECTION.requests < admission.CLIENT.requests < admission.ALL.requests
    assert admission.CONNECTION.size < admission.CLIENT.size < admission.ALL.size


# Where the kernel listens


@pytest.mark.parametrize(
    ("endpoint", "beyond"),
    [
        ("tcp://127.0.0.1:5555", False),
        ("tcp://127.9.9.9:5555", False),
        ("tcp://[::1]:5555", False),
        ("tcp://localhost:5555", False),
        ("tcp://lo:5555", False),
        ("ipc:///run/batos.sock", False),
        ("tcp://*:5555", True),
        ("tcp://0.0.0.0:5555", True),
        ("tcp://[::]:5555", True),
        ("tcp://eth0:5555", True),
        ("tcp://192.0.2.7:5555", True),
        ("tcp://example.org:5555", True),
    ],
)
def test_what_other_machines_can_reach(endpoint: str, beyond: bool) -> None:
    assert reaches_beyond(endpoint) is beyond


def listening_addresses(pid: int) -> set[str]:
    """Returns the addresses, in hex as the system tells them, where a process listens over TCP."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = descriptor.stat()
            if stat.S_ISSOCK(found.st_mode):
                inodes.add(str(found.st_ino))
    found_at = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: LISTEN
                found_at.add(fields[1].split(":")[0])
    return found_at


LOOPBACK = "0100007F"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_only_loopback_unless_it_is_set_otherwise(start_kernel: Start, tmp_path: Path) -> None:
    near = start_kernel(scripted(tmp_path, []), home="near")
    assert listening_addresses(near.pid) == {LOOPBACK}
    assert "beyond this machine" not in near.log
    port = free_endpoint().rpartition(":")[2]
    far = start_kernel(scripted(tmp_path, [], ZMQ_ENDPOINT=f"tcp://0.0.0.0:{port}"), home="far")
    assert listening_addresses(far.pid) == {LOOPBACK, "00000000"}
    (warning,) = [line for line in far.log.splitlines() if "beyond this machine" in line]
    assert f"[UVM] Listening beyond this machine at tcp://0.0.0.0:{port}" in warning


def resident_mib(kernel: KernelProcess) -> int:
    status = Path(f"/proc/{kernel.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) >> 10


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
async def test_a_client_that_never_reads_fills_nobodys_memory(start_kernel: Start, tmp_path: Path) -> None:
    process = start_kernel(scripted(tmp_path, []))
    async with process.client() as kernel:
        before = resident_mib(process)
        with zmq.Context() as context, context.socket(zmq.DEALER) as flood:
            folder = process.home / "keys"
            flood.curve_serverkey = read_public(folder / "kernel.key")
            flood.curve_publickey, flood.curve_secretkey = read_pair(folder / "client.key_secret")
            flood.linger, flood.sndhwm, flood.rcvhwm = 0, 0, 1
            flood.connect(process.environment["BATOS_ZMQ_ENDPOINT"])
            payload = pack_request("flood", "remember", {"text": "x" * 1000})
            for _ in range(100_000):
                flood.send(payload)
            highest = 0
            for _ in range(30):
                assert (await kernel.request("ping", timeout_s=20))["pid"] == process.pid
                highest = max(highest, resident_mib(process))
                await asyncio.sleep(0.1)
        assert highest - before < 150
        assert (await kernel.request("ping"))["pid"] == process.pid


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
async def test_a_kernel_without_descriptors_keeps_its_clients(start_kernel: Start, tmp_path: Path) -> None:
    import resource

    process = start_kernel(scripted(tmp_path, []))
    port = int(process.environment["BATOS_ZMQ_ENDPOINT"].rpartition(":")[2])
    async with process.client() as kernel:
        held = len(os.listdir(f"/proc/{process.pid}/fd"))
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (held + 20, before[1]))
        idle = []
        with contextlib.suppress(OSError):
            for _ in range(60):
                idle.append(sockets.create_connection(("127.0.0.1", port), timeout=0.5))
        (process.home / "keys" / "clients").touch()  # as if a key had come or gone
        assert (await kernel.request("ping", timeout_s=20))["pid"] == process.pid
        for connection in idle:
            connection.close()
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
    async with process.client() as kernel:
        await kernel.request("create_object", name="later_obj")


async def test_a_message_of_many_frames_is_answered_once(house: House) -> None:
    client = house.client()
    socket = client._keyed(zmq.DEALER)
    socket.connect(house.endpoint)
    request = pack_request("1", "set_slot", {"target_oid": "x", "slot": "y", "value": 1})
    for frames in ([b"", b"", request], [b"x", request], [request] * 10_000):
        await socket.send_multipart(frames)
        async with asyncio.timeout(PATIENCE_S):
            (answer,) = await socket.recv_multipart()
        assert unpack(answer)["error"]["type"] == "MalformedMessage"
    assert house.counter == 0
    socket.close(linger=0)


async def test_connections_that_say_nothing_keep_nobody_out(house: House) -> None:
    port = int(house.endpoint.rpartition(":")[2])
    idle = [sockets.create_connection(("127.0.0.1", port)) for _ in range(200)]
    try:
        assert await house.ping() == 0
    finally:
        for connection in idle:
            connection.close()


async def test_a_handler_that_fails_in_an_unforeseen_way_is_reported(house: House) -> None:
    async def fails(_: Command) -> Any:
        raise ZeroDivisionError("unforeseen")

    bridge: Bridge = house.bridge  # type: ignore[attr-defined]
    async with house.client() as kernel:
        bridge._handler = fails
        with pytest.raises(BatosError, match="unforeseen"):
            await kernel.request("ping", timeout_s=PATIENCE_S)
        bridge._handler = house.handle
        assert await kernel.request("ping", timeout_s=PATIENCE_S) == 0
    assert [type(fault) for fault in house.faults] == [ZeroDivisionError]
