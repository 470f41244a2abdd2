"""The contract of a transport: what carries blocks between two sides that already talk over a control connection.

A third party implements :class:`Transport` and :class:`Channel`, names the transport in the entry-point group
``netloader.transports``, and runs :func:`netloader.transports.conformance.check_transport` against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from netloader.codecs.block_view import BlockView
from netloader.core.keys import derive

__all__ = ["BlockView", "Channel", "Landed", "Pending", "Setup", "Signals", "Transport", "depth_of"]


Landed = Callable[[BlockView], None]
"""Callback of ``recv``, called once for each block, as soon as all its bytes are in place.

It may be called in worker threads, in several at once, and for a later block first. It may take long, because blocks
are hashed in it. When it raises, ``recv`` ends the channel and raises the same error."""


class Signals(Protocol):
    """Small messages between the two ends of a transport, carried by the control connection.

    Only the peer can read or write them. A port, in contrast, can be reached by unauthenticated peers.
    """

    async def post(self, data: bytes) -> None:
        """Send up to 64 KiB to the other end; ordered and reliable.

        Raises:
            PeerLost: The control connection ended.
        """
        ...

    async def fetch(self) -> bytes:
        """Wait for the next message from the other end, and return it.

        Raises:
            PeerLost: The control connection ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class Setup:
    """The parameters with which a channel is set up.

    Attributes:
        device: Device of the blocks, as torch names it (``cpu``, ``npu:3``).
        local_host: Address of this side on the control connection (numeric, without port).
        peer_host: Address of the peer on the control connection: the only address that a transport may connect to.
        peer_facts: The facts that the peer's transport states.
        signals: Small messages to and from the other end.
        timeout: Seconds that setting up may take.
        stall: Seconds that a running operation may go without progress.
        data_key: A key that only the two ends of this session know; empty without a token. See :meth:`bound`.
    """

    device: str
    local_host: str
    peer_host: str
    peer_facts: Mapping[str, str]
    signals: Signals
    timeout: float
    stall: float
    data_key: bytes = field(default=b"", repr=False)

    def bound(self, secret: bytes, purpose: str) -> bytes:
        """What a data connection should send to authenticate, in place of `secret`, which came in the offer.

        With a token, it is derived from `secret` and a key that was never sent. So whoever can read the control
        connection still can't connect to a data port, or answer there. Without a token, it is `secret` itself.

        Args:
            secret: Random bytes of the offer, 16 to 8160.
            purpose: A name for what is authenticated, so that two connections need different bytes.
        """
        return derive(self.data_key, f"data {purpose}", secret, len(secret)) if self.data_key else secret


@runtime_checkable
class Pending(Protocol):
    """A server's half-open channel: made by :meth:`Transport.offer`, completed once by :meth:`accept`.

    Attributes:
        offer: What the client needs to connect. Only the transport interprets it.
    """

    offer: bytes

    async def accept(self) -> Channel:
        """Wait until the client connects, within the set-up's timeout.

        Called at most once. The offer can't be used again, even if this raises or is cancelled.

        Raises:
            TransferTimeout: The client did not connect in time.
            PeerLost: The client connected and disconnected, or the control connection ended.
        """
        ...

    async def aclose(self) -> None:
        """Withdraw the offer and free its resources. Idempotent. Does nothing after :meth:`accept` succeeded."""
        ...


@runtime_checkable
class Channel(Protocol):
    """One open data path between two peers.

    Order: blocks arrive in the order in which they were sent. Both ends name the same blocks in the same order, but
    their calls may group the blocks differently.

    Concurrency: up to :attr:`depth` calls of ``send``, and as many of ``recv``, may run at a time. One more in the same
    direction raises :class:`~netloader.errors.ChannelBusy`, and the running calls go on. Calls are carried out in the
    order in which they were made, without an idle gap between two calls.

    Failure: a failed, timed-out or cancelled operation ends the channel. Every later operation raises
    :class:`~netloader.errors.ChannelClosed`. An operation of the peer raises :class:`~netloader.errors.PeerLost` within
    its own deadline at the latest. There are no retries on a channel.

    Attributes:
        depth: How many calls of one direction may run at once, at least 1. It does not change during a channel's life.
        whole_blocks: Whether both ends have to name blocks of equal sizes, so that part of a block can't be sent.
    """

    depth: int = 1
    whole_blocks: bool = False

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """Send blocks, whole and in order.

        The channel may read the memory until this returns or raises. After that the memory may be reused, unless
        MemoryStillInUse was raised. A view may own the memory that it shows, because its bytes are computed when they
        are first asked for. So ask for them in a worker thread, and keep the views until then.

        Raises:
            MemoryStillInUse: The operation can't be stopped within a bounded time, and may still read the memory.
            PeerLost: The peer closed the channel, died, or was disconnected.
            TransferTimeout: Nothing moved for the stall time: the peer does not receive.
            ChannelBusy: :attr:`depth` sends are running already.
            ChannelClosed: The channel was closed here, or an earlier operation failed.
        """
        ...

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """Fill blocks in place, whole and in order. Fills all of them, or raises an error.

        The channel may write the memory until this returns, raises or is cancelled. After that no byte is written, even
        if the peer continues to send. Where this can't be ensured within a bounded time, MemoryStillInUse is raised,
        also instead of a cancellation, and the memory must not be used any more. A receive is posted only for blocks
        that the peer has granted.

        Args:
            blocks: Blocks to fill.
            landed: See :data:`Landed`.

        Raises:
            PeerLost, TransferTimeout, ChannelBusy, ChannelClosed: As for ``send``; whatever `landed` raises.
            MemoryStillInUse: The memory may still be written.
        """
        ...

    async def aclose(self) -> None:
        """Close the channel and free everything, including threads, ports and device memory.

        Idempotent. It ends within a bounded time, and a cancellation does not interrupt it. A running operation on this
        side ends with :class:`~netloader.errors.ChannelClosed`, one of the peer with
        :class:`~netloader.errors.PeerLost`. After this returns, no byte is written into any view.

        Raises:
            MemoryStillInUse: Memory that was passed to an operation is still in use. It is raised by each call for as
                long as this is so. No other error is raised.
        """
        ...


def depth_of(channel: Channel) -> int:
    """How many calls of one direction `channel` accepts at once. Deprecated since 0.1: use :attr:`Channel.depth`."""
    warnings.warn("depth_of(channel) is channel.depth now, and goes after 0.2", DeprecationWarning, stacklevel=2)
    depth: int = getattr(channel, "depth", 1)  # optional in the contract of 0.1
    return depth


@runtime_checkable
class Transport(Protocol):
    """A way to move blocks. Stateless; there is one object for each name.

    Attributes:
        name: The name in the configuration and in messages.
    """

    name: str

    def missing(self, device: str) -> str | None:
        """Why it can't run here for tensors on `device`, as text; None when it can. Cheap, without side effects."""
        ...

    def facts(self, device: str) -> Mapping[str, str]:
        """Facts that decide whether it can connect both sides: keys that both state must have equal values."""
        ...

    async def offer(self, setup: Setup) -> Pending:
        """Server: prepare a channel for one client, which is sent :attr:`Pending.offer`.

        Raises:
            TransportError: It can't be set up now.
        """
        ...

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """Client: connect to an offer, within the set-up's timeout.

        Raises:
            PeerLost: The server can't be reached.
            TransferTimeout: The server did not answer in time.
            TransportError: The offer is invalid.
        """
        ...
