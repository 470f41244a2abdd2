"""A TCP proxy that a test lets stall, refuse or cut connections: a network partition on one machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc

__all__ = ["FaultProxy", "a_proxy"]

HOST = "127.0.0.1"


class FaultProxy:
    """Passes bytes between clients and one target, as long as nothing is wrong.

    Args:
        target: The port of the target.

    Attributes:
        port: Where clients connect.
        connected: How often a client connected.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.connected = 0
        self._target = target
        self._refusing = False
        self._passing = anyio.Event()
        self._passing.set()
        self._open: set[anyio.abc.SocketStream] = set()

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def stall(self) -> None:
        """Connections stay open and are accepted, and no byte passes."""
        self._passing = anyio.Event()

    async def cut(self) -> None:
        """Reset all connections, and each new one, as a host does on which nothing listens."""
        self._refusing = True
        self._passing.set()
        for stream in list(self._open):
            await anyio.aclose_forcefully(stream)

    def heal(self) -> None:
        """Bytes pass again, also those that were stalled."""
        self._refusing = False
        self._passing.set()

    async def serve(self, client: anyio.abc.SocketStream) -> None:
        self.connected += 1
        if self._refusing:
            await anyio.aclose_forcefully(client)
            return
        try:
            async with (
                client,
                await anyio.connect_tcp(HOST, self._target) as server,
                anyio.create_task_group() as tasks,
            ):
                self._open |= {client, server}
                try:
                    tasks.start_soon(self._pass_on, client, server, tasks.cancel_scope)
                    tasks.start_soon(self._pass_on, server, client, tasks.cancel_scope)
                    await anyio.sleep_forever()
                finally:
                    self._open -= {client, server}
        except* OSError:
            pass  # the target is down

    async def _pass_on(
        self, source: anyio.abc.SocketStream, to: anyio.abc.SocketStream, either_ends: anyio.CancelScope
    ) -> None:
        try:
            while True:
                data = await source.receive()
                await self._passing.wait()
                await to.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            either_ends.cancel()


@asynccontextmanager
async def a_proxy(target: int) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(target)
    listener = await anyio.create_tcp_listener(local_host=HOST)
    proxy.port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, proxy.serve)
        try:
            yield proxy
        finally:
            tasks.cancel_scope.cancel()
