"""A relay that passes the check of its server, and then passes on 8 kB/s.

It is a real one: it pulls, and its server has the blocks that it verified. It pulls just fast enough to keep its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

import netloader
from netloader.codecs.block_view import BlockView
from netloader.errors import NetloaderError
from netloader.transports.base import Landed, Setup
from netloader.transports.tcp import TcpTransport

__all__ = ["dripping_relay"]

_PASSED_ON = 8000
_TAKEN = 400 << 10
"""Bytes a second."""

_SO_MAX_PACING_RATE = 47


class _Dripping(TcpTransport):
    """tcp that receives slowly, and sends more slowly."""

    async def connect(self, offer: bytes, setup: Setup) -> Any:
        channel: Any = await super().connect(offer, setup)
        receive = channel.recv

        async def recv(blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
            for block in blocks:
                await receive([block], landed)
                await anyio.sleep(block.nbytes / _TAKEN)

        channel.recv, channel.depth = recv, 1
        return channel

    async def offer(self, setup: Setup) -> Any:
        pending: Any = await super().offer(setup)
        take = pending.accept

        async def accept() -> Any:
            channel = await take()
            for lane in channel._lanes:
                lane._sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _PASSED_ON)
            return channel

        pending.accept = accept
        return pending


@asynccontextmanager
async def dripping_relay(address: str, host: str) -> AsyncIterator[None]:
    """Such a relay of the server at `address`, on `host`. It has blocks when the body begins."""
    into, report = await netloader.pull_new(sources=[address], transport="tcp", wait=20.0)
    transport, begun = _Dripping(lanes=1), anyio.Event()

    async def relay() -> None:
        async with netloader.Server(host=host, transport=transport) as server:
            with contextlib.suppress(NetloaderError):
                await netloader.pull(
                    into,
                    report.identity,
                    sources=[address],
                    transport=transport,
                    follow=False,
                    relay=server,
                    progress=lambda _: begun.set(),
                )

    task = asyncio.create_task(relay())  # a task of its own: strangers come and go in other ones
    try:
        with anyio.fail_after(30.0):
            await begun.wait()
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
