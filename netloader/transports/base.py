"""The contract of a transport: what carries blocks between two sides that already talk over a control connection.

A third party implements :class:`Transport` and :class:`Channel`, names the transport in the entry-point group
``netloader.transports``, and runs :func:`netloader.transports.conformance.check_transport` against it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from netloader.codecs.block_view import BlockView

__all__ = ["BlockView", "Channel", "Landed", "Pending", "Setup", "Signals", "Transport", "depth_of"]


Landed = Callable[[BlockView], None]
"""Called by ``recv`` once for each block, as soon as all its bytes are in place; may be called in worker threads, in
several at once, and for a later block first. It may take a while (blocks are hashed there). When it raises, ``recv``
ends the channel and raises that."""


class Signals(Protocol):
    """Small messages between the two ends of a transport, carried by the control connection.

    Whoever can read or write them is the peer itself: no stranger reaches this path, unlike a port.
    """

    async def post(self, data: bytes) -> None:
        """Send up to 64 KiB to the other end; ordered and reliable.

        Raises:
            PeerLost: The control connection ended.
        """
        ...

    async def fetch(self) -> bytes:
        """The next message from the other end; waits for it.

        Raises:
            PeerLost: The control connection ended.
        """
        ...


@dataclass(frozen=True, slots=True)
class Setup:
    """What a transport is told when a channel is set up.

    Attributes:
        device: Where the blocks live, as torch names it (``cpu``, ``npu:3``).
        local_host: Our address on the control connection (numeric, without port).
        peer_host: The peer's address on the control connection: the only one a transport may connect to.
        peer_facts: What the peer's transport stated about itself.
        signals: Small messages to and from the other end.
        timeout: Seconds that setting up may take.
        stall: Seconds that a running operation may go without any progress.
    """

    device: str
    local_host: str
    peer_host: str
    peer_facts: Mapping[str, str]
    signals: Signals
    timeout: float
    stall: float


@runtime_checkable
class Pending(Protocol):
    """A server's half-open channel: made by :meth:`Transport.offer`, used up by :meth:`accept`.

    Attributes:
        offer: What the client needs to connect; opaque to everyone but the transport.
    """

    offer: bytes

    async def accept(self) -> Channel:
        """Wait for the client, within the set-up's timeout.

        Called once at most. The offer is used up, also when this raises or is cancelled.

        Raises:
            TransferTimeout: The client did not come in time.
            PeerLost: It came and went, or the control connection ended.
        """
        ...

    async def aclose(self) -> None:
        """Give up the offer and free what it holds. Idempotent; does nothing once accepted."""
        ...


@runtime_checkable
class Channel(Protocol):
    """One open data path between two peers.

    Order: blocks arrive in the order in which they were sent, whatever the grouping into calls: the receiver's calls
    name the same blocks in the same order, but may cut the sequence elsewhere.

    Concurrency: as many calls of ``send``, and as many of ``recv``, at a time as :attr:`depth` says; one more in the
    same direction raises :class:`~netloader.errors.ChannelBusy` and harms nothing. They are carried out in the order in
    which they were made, so that nothing stands still between two of them.

    Failure: one failed, timed-out or cancelled operation ends the channel; every later one raises
    :class:`~netloader.errors.ChannelClosed`, and the peer's raises :class:`~netloader.errors.PeerLost` within its own
    deadline at the latest. There is no retry on a channel.

    Attributes:
        depth: How many calls of one direction may be open at once, from 1 on; the same as long as the channel lives.
        whole_blocks: Whether both ends have to name blocks of equal sizes, so that a part of a block can't be sent.
    """

    depth: int = 1
    whole_blocks: bool = False

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """Send blocks, whole and in order.

        The memory belongs to the channel until this returns or raises; it may be reused then, unless what is raised is
        MemoryStillInUse.

        Raises:
            MemoryStillInUse: It can't be had back within a bound: something may still read it.
            PeerLost: The peer closed, died, or was cut off.
            TransferTimeout: Nothing moved for the stall time: the peer does not receive.
            ChannelBusy: As many sends as the channel takes are running.
            ChannelClosed: The channel was closed here, or an earlier operation failed.
        """
        ...

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """Fill blocks in place, whole and in order; all of them, or an error.

        The memory belongs to the channel until this returns or raises, cancelled included; after that no byte lands in
        it any more, even if the peer goes on sending. Where that can't be promised within a bound, MemoryStillInUse is
        raised, in the place of a cancellation too, and nobody uses the memory any more. A receive is posted only for
        what the peer has granted.

        Args:
            blocks: What to fill.
            landed: See :data:`Landed`.

        Raises:
            PeerLost, TransferTimeout, ChannelBusy, ChannelClosed: As for ``send``; whatever `landed` raises.
            MemoryStillInUse: Bytes may still land.
        """
        ...

    async def aclose(self) -> None:
        """Close and free everything, threads, ports and device memory included. Idempotent, bounded, never cancelled.

        An operation that is running on this side ends with :class:`~netloader.errors.ChannelClosed`; the peer's with
        :class:`~netloader.errors.PeerLost`. When this has returned, no byte lands in any view any more.

        Raises:
            MemoryStillInUse: The one thing that it may raise, each time that it is called as long as it is so: memory
                that was lent to an operation is still in use.
        """
        ...


def depth_of(channel: Channel) -> int:
    """How many calls of one direction `channel` takes at once: of release 0.1, :attr:`Channel.depth` says it now."""
    warnings.warn("depth_of(channel) is channel.depth now, and goes after 0.2", DeprecationWarning, stacklevel=2)
    depth: int = getattr(channel, "depth", 1)  # channels of 0.1 need not have it
    return depth


@runtime_checkable
class Transport(Protocol):
    """A way to move blocks; stateless, one object per name.

    Attributes:
        name: The name in configuration and on the wire.
    """

    name: str

    def missing(self, device: str) -> str | None:
        """Why it cannot run here for tensors on `device`, in words; None when it can. Cheap, no side effects."""
        ...

    def facts(self, device: str) -> Mapping[str, str]:
        """What the peer has to know to judge whether both could meet; equal keys have to have equal values."""
        ...

    async def offer(self, setup: Setup) -> Pending:
        """Server: get ready for one client, which gets :attr:`Pending.offer`.

        Raises:
            TransportError: It can't be set up here now.
        """
        ...

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """Client: connect to an offer, within the set-up's timeout.

        Raises:
            PeerLost: The server is not there.
            TransferTimeout: It did not answer in time.
            TransportError: The offer makes no sense.
        """
        ...
