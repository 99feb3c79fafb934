"""Sockets that listen: with the kernel's key, for admitted clients, within limits. Used by the bridge."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from uvm.errors import HomeError
from uvm.keyfiles import read_pair

HANDSHAKE_MS = 5000  # who has not said who he is by then is cut off
LINGER_MS = 200
BATCH = 16  # messages read in a row


async def received(socket: zmq.asyncio.Socket) -> AsyncIterator[list[zmq.Frame]]:
    """Yields messages for ever, and lets others run in between: where one waits, `recv` itself does not."""
    while True:
        for _ in range(BATCH):
            yield await socket.recv_multipart(copy=False)
        await asyncio.sleep(0)


@dataclass(frozen=True)
class Limits:
    """What one connection may keep in memory below Python: messages in each direction, bytes of a message."""

    incoming: int
    outgoing: int
    message_bytes: int


def listen(
    context: zmq.asyncio.Context, kind: int, endpoint: str, keys_dir: Path, limits: Limits
) -> zmq.asyncio.Socket:
    """Returns a socket of this kind that listens at `endpoint` with CURVE.

    Raises:
        HomeError: the address is taken or not one of this machine's, or the kernel's key can't be read.
    """
    public, secret = read_pair(keys_dir / "kernel.key_secret")
    socket = context.socket(kind)
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_server = True
    for option, value in {
        zmq.MAXMSGSIZE: limits.message_bytes,
        zmq.RCVHWM: limits.incoming,
        zmq.SNDHWM: limits.outgoing,
        zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
        zmq.TCP_KEEPALIVE: 1,
        zmq.LINGER: LINGER_MS,
    }.items():
        socket.setsockopt(option, value)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that has no room is an error, not lost
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise HomeError(
            f"can't listen at {endpoint} ({error}); is another kernel running? "
            f"Set BATOS_ZMQ_ENDPOINT and BATOS_ZMQ_EVENTS_ENDPOINT to free addresses",
            endpoint=endpoint,
        ) from None
    return socket


def reaches_beyond(endpoint: str) -> bool:
    """Returns whether other machines can reach this address of ours."""
    scheme, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0].partition(";")[0].strip("[]")
    if scheme == "ipc" or host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # the name of an interface or of a host, or * for all
        return host != "lo"


def reachable(endpoint: str) -> str:
    """Returns how a client on this machine connects to an address that we listen at, all of ours included."""
    return endpoint.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")
