"""A forwarder of control connections that passes on, or does what somebody in the middle can do."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import anyio
from anyio.abc import SocketAttribute, SocketStream

from netloader.core.addresses import Address

__all__ = ["Direction", "Tamper", "between", "frames_of"]

Direction = Literal["client", "server"]
"""Who sent a frame."""

Tamper = Callable[[Direction, int, bytes], Sequence[bytes]]
"""Of a frame, who sent it, its number in its direction: what is sent on instead, in this direction."""


def unchanged(said_by: Direction, number: int, frame: bytes) -> Sequence[bytes]:
    return [frame]


def frames_of(pending: bytearray) -> list[bytes]:
    """Take the complete frames off the front of `pending`."""
    found = []
    while len(pending) >= 4 and len(pending) >= (size := 4 + int.from_bytes(pending[:4], "big")):
        found.append(bytes(pending[:size]))
        del pending[:size]
    return found


@dataclass
class Between:
    """The forwarder.

    Attributes:
        address: Where clients connect.
        connections: How many did.
        seen: Every frame that was passed on, in order.
    """

    address: Address
    connections: int = 0
    seen: list[tuple[Direction, bytes]] = field(default_factory=list)


@asynccontextmanager
async def between(server: Address, tamper: Tamper = unchanged) -> AsyncIterator[Between]:
    """A forwarder to `server` on a port of its own."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    forwarder = Between(Address("127.0.0.1", listener.extra(SocketAttribute.local_port)))

    async def pump(said_by: Direction, source: SocketStream, sink: SocketStream) -> None:
        pending, number = bytearray(), 0
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                pending += await source.receive()
                for frame in frames_of(pending):
                    forwarder.seen.append((said_by, frame))
                    for one in tamper(said_by, number, frame):
                        await sink.send(one)
                    number += 1
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            await sink.send_eof()

    async def handle(near: SocketStream) -> None:
        forwarder.connections += 1
        async with near, await anyio.connect_tcp(server.host, server.port) as far, anyio.create_task_group() as tasks:
            tasks.start_soon(pump, "client", near, far)
            tasks.start_soon(pump, "server", far, near)

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield forwarder
        tasks.cancel_scope.cancel()
