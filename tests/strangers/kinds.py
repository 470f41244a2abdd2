"""What a stranger may do at a server without any secret: each kind of connection, in any number.

They speak through scripted control connections, so that they can stop anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio

from netloader.codecs.frames import server_messages
from netloader.core import messages as m
from netloader.core.plan import make_plan
from netloader.transports.base import Setup
from netloader.transports.tcp import TcpTransport
from tests.drivers import kit

__all__ = ["KINDS", "Kind", "strangers"]

TCP = TcpTransport(lanes=1)
IDENTIFY = m.Identify(layouts=("raw", "processed", "checkpoint"))
_AT_ONCE = 32
"""Connections that are opened at a time."""


class Kind:
    """One kind of stranger.

    Args:
        count: How many of them come.
        script: What each one does with its connection, until it stays silent.
        secret: Whether it needs to know the token of a server that has one.
    """

    def __init__(self, count: int, script: Callable[[kit.Wire[Any]], Awaitable[None]], *, secret: bool) -> None:
        self.count = count
        self.script = script
        self.secret = secret


async def connect(wire: kit.Wire[Any]) -> None:
    """Nothing."""


async def greet(wire: kit.Wire[Any]) -> None:
    """A Hello and then nothing."""
    await wire.say(kit.hello(TCP))
    await wire.hear_until(m.Welcome)


async def identify(wire: kit.Wire[Any]) -> None:
    """It identifies itself and waits; when it is its turn, it does not answer."""
    await wire.say(kit.hello(TCP), IDENTIFY)
    await wire.hear_until(m.Waiting | m.Announce)


async def relay(wire: kit.Wire[Any]) -> None:
    """It says that it relays at a port where nobody answers, and does nothing."""
    await wire.say(kit.hello(TCP), m.Identify(layouts=IDENTIFY.layouts, relay=9, node="ab" * 8))
    await wire.hear_until(m.Waiting | m.Announce)


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
    peer, own = wire.stream.extra(anyio.abc.SocketAttribute.raw_socket), None
    host, own = peer.getpeername()[0], peer.getsockname()[0]
    return replace(kit.setup(), peer_host=host, local_host=own, signals=_Signals())


async def read_slowly(wire: kit.Wire[Any]) -> None:
    """It asks for all blocks and takes 8 kB/s."""
    await wire.say(kit.hello(TCP), m.Identify(layouts=IDENTIFY.layouts, follow=False))
    known: m.Announce = await wire.hear_until(m.Announce)
    await wire.say(m.Agree(plan=known.plan, transport="tcp"))
    offer: m.ChannelOffer = await wire.hear_until(m.ChannelOffer)
    channel: Any = await TCP.connect(offer.offer, _setup(wire))
    wire.channel = channel  # type: ignore[attr-defined]  # closed with the connection
    assert known.manifest is not None
    blocks = len(make_plan(known.manifest, known.block_bytes).blocks)
    await wire.say(m.Want(ranges=((0, blocks),)))
    await wire.hear_until(m.Grant)


KINDS = {
    "128 silent Hellos": Kind(128, greet, secret=False),
    "520 connections": Kind(520, connect, secret=False),
    "264 identified silent clients": Kind(264, identify, secret=True),
    "136 silent probers": Kind(136, probe, secret=True),
    "a relay that drips": Kind(1, relay, secret=True),
    "8 slow readers": Kind(8, read_slowly, secret=True),
}
"""The kinds, by what a table of results calls them."""


@asynccontextmanager
async def strangers(kinds: list[Kind], host: str, port: int) -> AsyncIterator[None]:
    """All strangers of these kinds, connected and silent by now. One that is turned away stays away."""
    wires: list[kit.Wire[Any]] = []
    limit = anyio.Semaphore(_AT_ONCE)

    async def one(kind: Kind) -> None:
        async with limit:
            with contextlib.suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError):
                wire = kit.Wire(await anyio.connect_tcp(host, port), server_messages())
                wires.append(wire)
                await kind.script(wire)

    try:
        for kind in kinds:
            async with anyio.create_task_group() as tasks:
                for _ in range(kind.count):
                    tasks.start_soon(one, kind)
        yield
    finally:
        with anyio.CancelScope(shield=True):
            for wire in wires:
                channel = getattr(wire, "channel", None)
                if channel is not None:
                    await channel.aclose()
                await anyio.aclose_forcefully(wire.stream)
