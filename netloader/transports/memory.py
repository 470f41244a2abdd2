"""The memory transport: blocks within one process, for tests and demonstrations without a network."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence

import anyio
import anyio.lowlevel

from netloader.errors import PeerLost, TransferTimeout
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup
from netloader.transports.io.channel_state import ChannelState, LoopEvent

__all__ = ["DEFAULT_CAPACITY", "MemoryHub", "MemoryTransport"]

DEFAULT_CAPACITY = 4 << 20
"""Bytes in flight in one direction before a sender has to wait."""


class _ByteBuffer:
    """One direction: a bounded byte stream between two event loops, or within one.

    With a capacity of 0 nothing is buffered: a write returns when a read has taken the bytes (lockstep).
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._lent: memoryview | None = None
        self._lost = False
        self._waiting: set[LoopEvent] = set()

    async def write(self, data: memoryview, stall: float) -> None:
        """Write all of `data`, which may be reused afterwards.

        Raises:
            PeerLost: The pipe is cut.
            TransferTimeout: Nothing moved for `stall` seconds.
        """
        while len(data):
            await self._until(self._has_room, stall, "the peer takes no bytes")
            with self._lock:
                self._check()
                if self._capacity == 0:
                    self._lent, taken = data, len(data)
                else:
                    taken = min(len(data), self._capacity - len(self._buffer))
                    self._buffer += data[:taken]
                self._changed()
            data = data[taken:]
        if self._capacity == 0:
            await self._until(self._has_room, stall, "the peer takes no bytes")
            with self._lock:
                if self._lent is not None:
                    self._check()

    async def read(self, into: memoryview, stall: float) -> None:
        """Fill all of `into`.

        Raises:
            PeerLost: The pipe is cut.
            TransferTimeout: Nothing moved for `stall` seconds.
        """
        while len(into):
            await self._until(self._has_bytes, stall, "the peer sends no bytes")
            with self._lock:
                self._check()
                taken = self._take(into)
                self._changed()
            into = into[taken:]

    def cut(self) -> None:
        """End the direction for both sides. Bytes in flight are discarded."""
        with self._lock:
            self._lost = True
            self._buffer.clear()
            self._changed()

    def _take(self, into: memoryview) -> int:
        if self._lent is not None:
            taken = min(len(into), len(self._lent))
            into[:taken] = self._lent[:taken]
            self._lent = self._lent[taken:] if taken < len(self._lent) else None
        else:
            taken = min(len(into), len(self._buffer))
            into[:taken] = self._buffer[:taken]
            del self._buffer[:taken]
        return taken

    def _has_room(self) -> bool:
        return self._lost or (self._lent is None if self._capacity == 0 else len(self._buffer) < self._capacity)

    def _has_bytes(self) -> bool:
        return self._lost or self._lent is not None or len(self._buffer) > 0

    def _check(self) -> None:
        if self._lost:
            raise PeerLost("the peer closed its memory channel")

    def _changed(self) -> None:
        for waiting in self._waiting:
            waiting.set()
        self._waiting.clear()

    async def _until(self, ready: Callable[[], bool], stall: float, what: str) -> None:
        changed = LoopEvent()
        with self._lock:
            if ready():
                return
            self._waiting.add(changed)
        try:
            while True:
                with anyio.move_on_after(stall) as scope:
                    await changed.wait()
                if scope.cancelled_caught:
                    raise TransferTimeout(f"{what} for {stall:g} s", hint="check that the peer is still running")
                changed = LoopEvent()
                with self._lock:
                    if ready():
                        return
                    self._waiting.add(changed)
        finally:
            with self._lock:
                self._waiting.discard(changed)


class _MemoryChannel:
    depth = 1
    whole_blocks = False

    def __init__(self, incoming: _ByteBuffer, outgoing: _ByteBuffer, stall: float) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._stall = stall
        self._state = ChannelState("memory channel")

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("send", self._cut):
            await anyio.lowlevel.checkpoint()
            for block in blocks:
                for buffer in block.buffers():
                    await self._outgoing.write(buffer, self._stall)

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("recv", self._cut):
            await anyio.lowlevel.checkpoint()
            for block in blocks:
                for buffer in block.buffers():
                    await self._incoming.read(buffer, self._stall)
                if landed is not None:
                    landed(block)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        self._state.end("it was closed", closed=True)
        self._cut()
        await self._state.idle()

    def _cut(self) -> None:
        self._incoming.cut()
        self._outgoing.cut()


class _MemoryPending:
    """An offer that is published in the hub under its key."""

    def __init__(self, hub: MemoryHub, setup: Setup) -> None:
        self.hub = hub
        self.setup = setup
        self.offer = secrets.token_bytes(16)
        self.taken = LoopEvent()
        self.channel: Channel | None = None

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        try:
            with anyio.move_on_after(self.setup.timeout) as scope:
                await self.taken.wait()
        except BaseException:
            await self.aclose()  # bounded and shielded where it waits
            raise
        self.hub.withdraw(self)
        channel, self.channel = self.channel, None
        if channel is None or scope.cancelled_caught:
            if channel is not None:
                await channel.aclose()
            raise TransferTimeout(f"the client did not connect within {self.setup.timeout:g} s")
        return channel

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        self.hub.withdraw(self)
        if self.channel is not None:
            await self.channel.aclose()


class MemoryHub:
    """Connects the two ends of memory channels. Give one hub to the transports of both sides.

    Args:
        capacity: Bytes in flight in one direction before a sender has to wait. With 0 a send returns only when the
            receiver has taken its bytes (lockstep).
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self.capacity = capacity
        self.name = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._offers: dict[bytes, _MemoryPending] = {}

    @property
    def open_offers(self) -> int:
        """Number of offers that were neither accepted nor withdrawn."""
        return len(self._offers)

    def publish(self, pending: _MemoryPending) -> None:
        """Publish this offer for clients."""
        with self._lock:
            self._offers[pending.offer] = pending

    def withdraw(self, pending: _MemoryPending) -> None:
        """Remove this offer, if it is still published."""
        with self._lock:
            self._offers.pop(pending.offer, None)

    def take(self, key: bytes, stall: float) -> Channel:
        """Make both ends of a channel. Returns the client's end; the server's end goes to the maker of the offer.

        Raises:
            TransportError: There is no such offer, or it is no longer published.
        """
        there, back = _ByteBuffer(self.capacity), _ByteBuffer(self.capacity)
        with self._lock:
            pending = self._offers.pop(key, None)
            if pending is None:
                raise PeerLost("there is no such offer in this process, or it was withdrawn")
            pending.channel = _MemoryChannel(back, there, pending.setup.stall)
        pending.taken.set()
        return _MemoryChannel(there, back, stall)


class MemoryTransport:
    """Moves blocks within one process, for tensors in the CPU's memory.

    Args:
        hub: The hub that connects both sides. By default a new hub; both sides then have to use this object.
    """

    name = "memory"

    def __init__(self, hub: MemoryHub | None = None) -> None:
        self._hub = MemoryHub() if hub is None else hub

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        return (
            None if device.partition(":")[0] == "cpu" else f"it moves bytes in the CPU's memory only, not on {device}"
        )

    def facts(self, device: str) -> Mapping[str, str]:
        """The hub's name, so that two processes, or two hubs, are never connected."""
        del device
        return {"hub": self._hub.name}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        pending = _MemoryPending(self._hub, setup)
        self._hub.publish(pending)
        return pending

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        await anyio.lowlevel.checkpoint()
        return self._hub.take(offer, setup.stall)
