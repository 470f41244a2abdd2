"""What a stranger may do at a server without any secret: each kind of connection, in any number.

They speak through scripted control connections, so that they can stop anywhere.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
from anyio.abc import SocketAttribute, SocketStream

from netloader.codecs.frames import server_messages
from netloader.core import messages as m
from netloader.core.plan import make_plan
from netloader.errors import NetloaderError
from netloader.transports.base import Setup
from netloader.transports.tcp import TcpTransport
from tests.drivers import kit
from tests.strangers.dripping import dripping_relay

__all__ = ["KINDS", "Kind", "strangers"]

TCP = TcpTransport(lanes=1)
IDENTIFY = m.Identify(layouts=("raw", "processed", "checkpoint"))
_BYTES_A_SECOND = 8000
_AT_ONCE = 32
"""Connections that are opened at a time."""


class _Stranger(kit.Wire[Any]):
    """The connection of a stranger, and what is closed with it.

    Attributes:
        stack: Closed with the connection.
        lanes: Data connections, of which 8 kB/s are read.
    """

    def __init__(self, stream: SocketStream) -> None:
        super().__init__(stream, server_messages())
        self.stack = AsyncExitStack()
        self.stack.push_async_callback(anyio.aclose_forcefully, stream)
        self.lanes: list[socket.socket] = []

    async def read(self) -> None:
        for sock in self.lanes:
            with contextlib.suppress(OSError):
                await anyio.to_thread.run_sync(sock.recv, _BYTES_A_SECOND, socket.MSG_DONTWAIT)


class Kind:
    """One kind of stranger.

    Args:
        count: How many of them come.
        script: What each one does with its connection, until it stays silent.
        secret: Whether it needs to know the token of a server that has one.
    """

    def __init__(self, count: int, script: Callable[[_Stranger], Awaitable[None]], *, secret: bool) -> None:
        self.count = count
        self.script = script
        self.secret = secret


async def _told(wire: kit.Wire[Any]) -> None:
    """Until the server says that this client waits, or what it holds."""
    while not isinstance(await wire.hear(), m.Waiting | m.Announce):
        pass


async def connect(wire: kit.Wire[Any]) -> None:
    """Nothing."""


async def greet(wire: kit.Wire[Any]) -> None:
    """A Hello that promises to prove a token, without which a server that has one refuses at once, and then nothing."""
    await wire.say(kit.hello(TCP, b"of another server"))
    await wire.hear_until(m.Welcome)


async def identify(wire: kit.Wire[Any]) -> None:
    """It identifies itself and waits; when it is its turn, it does not answer."""
    await wire.say(kit.hello(TCP), IDENTIFY)
    await _told(wire)


async def relay(wire: _Stranger) -> None:
    """It relays, passes the check of the server, and then passes on 8 kB/s; it stays in a session of its own."""
    raw = wire.stream.extra(SocketAttribute.raw_socket)
    (host, port, *_), own = raw.getpeername(), raw.getsockname()[0]
    await wire.stack.enter_async_context(dripping_relay(f"{host}:{port}", own))
    while not await _is_redirected(host, port):
        pass


async def _is_redirected(host: str, port: int) -> bool:
    """Whether the server sends a client that comes now to a relay."""
    async with await anyio.connect_tcp(host, port) as stream:
        wire = kit.Wire[Any](stream, server_messages())
        await wire.say(kit.hello(TCP), m.Identify(layouts=IDENTIFY.layouts, follow=True))
        while not isinstance(answer := await wire.hear(), m.Waiting | m.Announce | m.Refusal):
            pass
        return isinstance(answer, m.Refusal) and bool(answer.sources)


async def name_nobody(wire: kit.Wire[Any]) -> None:
    """It says that it relays at a port where nobody answers, and does nothing."""
    await wire.say(kit.hello(TCP), m.Identify(layouts=IDENTIFY.layouts, relay=9, node="ab" * 8))
    await _told(wire)


async def probe(wire: kit.Wire[Any]) -> None:
    """It asks what is held, and does not end its session."""
    await wire.say(kit.hello(TCP), m.Identify(layouts=IDENTIFY.layouts, probe=True))
    await wire.hear_until(m.Announce)


class _Signals:
    async def post(self, data: bytes) -> None:
        del data

    async def fetch(self) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")


def _setup(wire: kit.Wire[Any]) -> Setup:
    raw = wire.stream.extra(SocketAttribute.raw_socket)
    return replace(kit.setup(), peer_host=raw.getpeername()[0], local_host=raw.getsockname()[0], signals=_Signals())


async def read_slowly(wire: _Stranger) -> None:
    """It asks for all blocks and takes 8 kB/s."""
    await wire.say(kit.hello(TCP), m.Identify(layouts=IDENTIFY.layouts, follow=False))
    known: m.Announce = await wire.hear_until(m.Announce)
    await wire.say(m.Agree(plan=known.plan, transport="tcp"))
    offer: m.ChannelOffer = await wire.hear_until(m.ChannelOffer)
    channel: Any = await TCP.connect(offer.offer, _setup(wire))
    wire.stack.push_async_callback(channel.aclose)
    assert known.manifest is not None
    blocks = len(make_plan(known.manifest, known.block_bytes).blocks)
    await wire.say(m.Want(ranges=((0, blocks),)))
    await wire.hear_until(m.Grant)
    wire.lanes = [lane._sock for lane in channel._lanes]


KINDS = {
    "8 slow readers": Kind(8, read_slowly, secret=True),
    "a relay that drips": Kind(1, relay, secret=True),
    "a relay that is none": Kind(1, name_nobody, secret=True),
    "264 identified silent clients": Kind(264, identify, secret=True),
    "136 silent probers": Kind(136, probe, secret=True),
    "128 silent Hellos": Kind(128, greet, secret=False),
    "520 connections": Kind(520, connect, secret=False),
}
"""The kinds, by what a table of results calls them; in this order when all come."""


@asynccontextmanager
async def strangers(kinds: list[Kind], host: str, port: int) -> AsyncIterator[None]:
    """All strangers of these kinds, connected and silent by now. One that is turned away stays away."""
    wires: list[_Stranger] = []
    limit = anyio.Semaphore(_AT_ONCE)

    async def one(kind: Kind) -> None:
        async with limit:
            with contextlib.suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError, NetloaderError):
                wire = _Stranger(await anyio.connect_tcp(host, port))
                wires.append(wire)
                await kind.script(wire)

    async def read_on() -> None:
        while True:
            await anyio.sleep(1.0)
            for wire in wires:
                await wire.read()

    try:
        for kind in kinds:
            async with anyio.create_task_group() as tasks:
                for _ in range(kind.count):
                    tasks.start_soon(one, kind)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read_on)
            yield
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            for wire in wires:
                await wire.stack.aclose()
