"""One end of a pair whose gloo runs in this process, for attackers: they use it as no channel does."""

from __future__ import annotations

import socket
from functools import partial

import anyio
import anyio.abc
import anyio.from_thread
import anyio.to_thread

from netloader.transports.base import Signals
from netloader.transports.gloo import GlooTransport
from netloader.transports.gloo import transport as gloo
from netloader.transports.gloo.addresses import Address
from netloader.transports.gloo.group import Group

HOST = "127.0.0.1"
CLIENT, SERVER = 0, 1


class BareGloo:
    """One end, on the loopback address.

    Attributes:
        group: The group.
        wire: Its connection, once there is one.
        sent: Gloo's handle of what an attacker sent.
    """

    def __init__(self, rank: int, signals: Signals) -> None:
        self.group = Group(rank, HOST, HOST, 5.0)
        self.wire: socket.socket | None = None
        self.sent: object = None  # gloo drops a message whose handle nobody holds
        self._signals = signals
        self._published = anyio.Event()
        self._ours: Address | None = None
        self._theirs: Address | None = None

    async def connect(self, offer: bytes) -> None:
        """Be a client: connect to a server's offer."""
        self._theirs = address_of(offer)
        await anyio.to_thread.run_sync(self._open, True)
        await self._compare_ends()

    async def offer(self, tasks: anyio.abc.TaskGroup) -> bytes:
        """Be a server: the offer for a client. :meth:`accept` waits for it."""
        self._opened = anyio.Event()

        async def open_it() -> None:
            await anyio.to_thread.run_sync(self._open, False)
            self._opened.set()

        tasks.start_soon(open_it)
        await self._published.wait()
        return gloo._encode(self._ours)

    async def accept(self) -> None:
        await self._opened.wait()
        await self._compare_ends()

    async def aclose(self) -> None:
        if self.wire is not None:
            self.wire.close()
        await anyio.to_thread.run_sync(partial(setattr, self.group, "_group", None))  # waits for gloo's own thread

    def _open(self, tells: bool) -> None:
        def published(address: Address) -> None:
            self._ours = address
            anyio.from_thread.run_sync(self._published.set)
            if tells:
                anyio.from_thread.run(self._signals.post, gloo._encode(address))

        def met() -> tuple[Address, int]:
            if self._theirs is None:
                self._theirs = address_of(anyio.from_thread.run(self._signals.fetch))
            return self._theirs, 0

        self.group.open(published, met)

    async def _compare_ends(self) -> None:
        assert self._theirs is not None
        dialled, _, self.wire = await anyio.to_thread.run_sync(self.group.ends, self._theirs)
        if dialled is not None:
            await self._signals.post(gloo._encode(gloo._Dialled(*dialled)))
            await self._signals.fetch()
            self.group.settle(self.wire)
        else:
            await self._signals.fetch()
            self.group.settle(self.wire)
            await self._signals.post(gloo._encode(gloo._Taken()))


def address_of(message: bytes) -> Address:
    """The address that one side writes to the other."""
    note = gloo._decode(message)
    assert isinstance(note, Address)
    return note


def started() -> GlooTransport:
    """A transport whose helper process runs, so that a test sees only what its own sessions start."""
    transport = GlooTransport()
    process = transport._spawner.start()
    process.kill()
    assert process.gone(60.0)
    process.close()
    return transport
