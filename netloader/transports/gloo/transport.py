"""The gloo transport: blocks over torch's gloo, for tensors in the CPU's memory, in trusted networks.

A group is a bare ``ProcessGroupGloo`` object, without a world, group names or other process-wide state. There is no
store on a port either. Both sides exchange the addresses of their gloo over the control connection, and each connects
only to the address of its control connection. docs/transports.md says what gloo requires of the network.

A peer that violates gloo's protocol can end this process, or keep one of its threads busy for ever. This can't be
prevented here, so gloo is used only where it was configured by name, on both sides.
"""

from __future__ import annotations

import itertools
import logging
import re
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import anyio
import msgspec
import torch
from torch.distributed import ProcessGroupGloo

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.base import Channel, Pending, Setup
from netloader.transports.gloo import packet_filter as guard
from netloader.transports.gloo.rendezvous import Address, LocalStore, Rendezvous, plain_host
from netloader.transports.io.channel_state import LoopEvent
from netloader.transports.io.socket_options import tune
from netloader.transports.io.worker import Job, Worker
from netloader.transports.process_group import WINDOW, Link, LinkChannel

__all__ = ["GlooTransport"]

_CLIENT, _SERVER = 0, 1
"""Ranks: the side that receives is 0, as other collective libraries require it."""

_UNUSED_PAIRS = 2
"""Unused pairs that are made before the real one. They make sure that the number of the real pair, which an
unauthenticated peer could send (and repeat; see `packet_filter`), is never read as an operation that makes gloo end the
process."""

_DATA, _MARK, _RECEIPT = range(3)
_KINDS = 4
_LENGTHS = (1 << 29) - 3  # a tag has 31 bits

_CONNECTING = 5.0
"""Most seconds for connecting once both addresses are known: gloo can't be interrupted while it connects."""

_FOREVER = timedelta(days=1)
"""Gloo's own timeout of an operation. The stall detection ends an operation long before."""

_TELLING = 1.0
"""Seconds to send the peer the reason why setting up failed."""

_LONGEST_REASON = 500
_SOURCE_LINE = re.compile(r"^\[[^\]]*\]\s*")

N = TypeVar("N", bound="_GlooMessage")
_log = logging.getLogger(__name__)
_numbers = itertools.count()


class _Dialled(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """Sent by the side that connected: the local endpoint of its connection."""

    host: str
    port: int


class _Taken(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """Sent by the side that listened: this is its only connection, so both may proceed."""


class _Refused(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """Sent by either side: setting up failed, and why."""

    reason: str


_GlooMessage = Address | _Dialled | _Taken | _Refused
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_GlooMessage).decode


@dataclass(slots=True)
class _BlockWork:
    """A block in flight.

    Attributes:
        waits: Gloo's handle to wait for: an operation without bytes.
        holds: Gloo's other handles, which are kept until then.
        confirms: For a received block: the number of bytes to confirm.
        over: Whether it was waited for.
    """

    waits: Any
    holds: tuple[Any, ...]
    confirms: int | None = None
    over: bool = False


class _GlooLink(Link):
    """One end of a group of two; see :class:`~netloader.transports.process_group.Link`.

    When a connection is lost, gloo wakes threads that wait for operations that have not begun. It does not wake one
    that waits for a partly transferred operation: such a thread would hang for ever. So the sender follows each block
    with an empty operation (the mark), and the receiver confirms it with another (the receipt). Threads wait for these
    two only, because an empty operation can't be partly transferred. Bytes arrive in order, so the block is complete
    when the mark arrives, and its memory may be reused when the receipt arrives.

    Args:
        rank: Rank of this side.
        setup: Parameters of the channel.
        published: Set once this side's address is known, or can't become known any more.
    """

    device = "cpu"

    def __init__(self, rank: int, setup: Setup, published: LoopEvent) -> None:
        self.address: Address | None = None
        self._rank = rank
        self._peer = plain_host(setup.peer_host)
        self._bind = setup.local_host
        self._published = published
        self._store = Rendezvous(rank, setup.timeout, self._publish)
        self._connecting = min(setup.timeout, _CONNECTING)
        self._expected = 0  # the number that the peer has to send to this side's listener
        self._group: Any = None  # torch's stubs lack most of a ProcessGroupGloo
        self._lock = threading.Lock()  # abort() may come from any thread
        self._listener: socket.socket | None = None
        self._wire: socket.socket | None = None
        self._taken: guard.Endpoint | None = None  # remote endpoint, when the peer connected to this side's listener
        self._nothing = torch.empty(0, dtype=torch.uint8)
        self._receipts: deque[Any] = deque(maxlen=2 * WINDOW)  # never more in flight than blocks

    def open(self) -> None:
        """Make the group: publish this side's address, wait for :meth:`set_peer`, and connect."""
        try:
            with _translated(TransportError):
                # The only way to choose the address; torch's stubs lack it.
                options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
                options._timeout = timedelta(seconds=self._connecting)  # noqa: SLF001
                options._threads = 1  # noqa: SLF001
                options._devices = [ProcessGroupGloo.create_device(hostname=self._bind)]  # noqa: SLF001
                for _ in range(_UNUSED_PAIRS):
                    ProcessGroupGloo(LocalStore(), 0, 1, options)
            with _translated(PeerLost):
                self._group = ProcessGroupGloo(self._store, self._rank, 2, options)
        finally:
            self._published.set()

    def set_peer(self, address: Address) -> None:
        """Allow gloo to connect to the peer.

        Raises:
            TransportError: The host is not that of the control connection.
        """
        if plain_host(address.host) != self._peer:
            raise TransportError(
                f"the peer's gloo listens at {address.host}, but its control connection is with {self._peer}",
                hint="gloo needs a network without address translation; use another transport",
            )
        if not 0 < address.port < 1 << 16 or len(address.pairs) != 2:  # noqa: PLR2004 - a group of two
            raise TransportError(f"the peer's gloo address is invalid: {address}")
        zone = self._bind.partition("%")[2]
        self._store.set_peer(address, socket.if_nametoindex(zone) if zone else 0)

    def ends(self, theirs: Address) -> tuple[_Dialled | None, list[guard.Endpoint]]:
        """After connecting: this side's endpoint, if it connected; and the remote endpoints of accepted connections."""
        dialled = guard.connections(remote=(plain_host(theirs.host), theirs.port))
        taken = guard.connections(local=self._here())
        with self._lock:
            for sock, _, _ in (*dialled, *taken):
                if self._wire is None:
                    self._wire = sock
                else:
                    sock.close()
        if taken and not dialled:
            host, port = taken[0][2]
            self._taken = plain_host(host), port
        return _Dialled(*dialled[0][1]) if dialled else None, [far for _, _, far in taken]

    def settle(self) -> None:
        """Both sides confirmed their connection: accept no other connection, and let data through."""
        with self._lock:
            if self._wire is not None:
                guard.remove_filter(self._wire)
                with suppress(OSError):  # the filter then stays, which only makes the transfer slower
                    tune(self._wire, self._bind, self._peer)
            if self._listener is not None:
                with suppress(OSError):  # logged already when the listener was guarded
                    guard.close_listener(self._listener, self._taken)
                self._listener.close()
                self._listener = None

    def send(self, tensor: torch.Tensor) -> _BlockWork:
        """Start sending; see :class:`~netloader.transports.process_group.Link`."""
        group, peer, nbytes = self._open(), 1 - self._rank, tensor.numel()
        with _translated(PeerLost):
            receipt = group.recv([self._nothing], peer, _tag(_RECEIPT, nbytes))
            data = group.send([tensor], peer, _tag(_DATA, nbytes))
            mark = group.send([self._nothing], peer, _tag(_MARK, nbytes))
        return _BlockWork(receipt, (data, mark))

    def recv(self, tensor: torch.Tensor) -> _BlockWork:
        """Start receiving; see :class:`~netloader.transports.process_group.Link`."""
        group, peer, nbytes = self._open(), 1 - self._rank, tensor.numel()
        with _translated(PeerLost):
            data = group.recv([tensor], peer, _tag(_DATA, nbytes))
            mark = group.recv([self._nothing], peer, _tag(_MARK, nbytes))
        return _BlockWork(mark, (data,), confirms=nbytes)

    def finish(self, work: _BlockWork) -> None:
        """Wait for an operation; see :class:`~netloader.transports.process_group.Link`."""
        if work.over:
            return
        work.over = True  # also when it fails: gloo reports a result only once
        with _translated(PeerLost):
            work.waits.wait(_FOREVER)
            if work.confirms is not None:
                receipt = self._open().send([self._nothing], 1 - self._rank, _tag(_RECEIPT, work.confirms))
                self._receipts.append(receipt)

    def progress(self) -> int:
        """Bytes that moved; see :class:`~netloader.transports.process_group.Link`."""
        with self._lock:
            return 0 if self._wire is None else guard.progress(self._wire)

    def abort(self) -> None:
        """Shut the connection down, which is the only way to end a blocked call in gloo."""
        self._store.abort()
        with self._lock, suppress(OSError):  # cut already
            if self._wire is not None:
                self._wire.shutdown(socket.SHUT_RDWR)
            elif self._listener is not None:
                # Gloo may be waiting for the peer to connect. Connect to it from here, and disconnect at once.
                guard.connect_to_self(self._listener, self._expected)

    def close(self) -> None:
        """Free everything; see :class:`~netloader.transports.process_group.Link`."""
        self.abort()
        self._receipts.clear()
        self._group = None
        with self._lock:
            for sock in (self._listener, self._wire):
                if sock is not None:
                    sock.close()
            self._listener = self._wire = None

    def _publish(self, address: Address) -> None:
        """Called in gloo's thread once it listens, before any other process knows the address."""
        self.address = address
        self._expected = address.pairs[1 - self._rank]
        listening = guard.find_listener(*self._here())
        if listening is None:
            raise TransportError(f"gloo does not listen at {address.host}:{address.port} as it says")
        with self._lock:
            self._listener = listening
        try:
            guard.guard_listener(listening, self._peer, self._expected)
        except OSError as error:
            _log.warning("the kernel can't filter connections to gloo's port %d: %s", address.port, error)
        connections = guard.connections(local=self._here())
        for sock, _, _ in connections:  # a cancelled set-up connects to its own listener too
            sock.close()
        if connections:
            raise TransportError(f"an unknown process connected to gloo's port {address.port} before it was published")
        self._published.set()

    def _here(self) -> guard.Endpoint:
        if self.address is None:
            raise TransportError("gloo has not published its address")
        return self.address.host, self.address.port

    def _open(self) -> Any:
        if self._group is None:
            raise PeerLost("the group is closed")
        return self._group


class _GlooEnd:
    """One side of a channel during set-up."""

    def __init__(self, rank: int, setup: Setup) -> None:
        self.setup = setup
        self._published = LoopEvent()
        self._link = _GlooLink(rank, setup, self._published)
        self._worker = Worker(f"netloader-gloo-{next(_numbers)}", self._link.abort)
        self._opening: Job[None] = self._worker.start(self._link.open)
        self._handed_over = False

    async def address(self) -> bytes:
        """This side's address, encoded for the peer."""
        await self._published.wait()
        if self._link.address is None or self._opening.over.is_set():
            await self._worker.finish(self._opening)
        if self._link.address is None:
            raise TransportError("gloo has not published its address")
        return _encode(self._link.address)

    async def channel(self, message: bytes) -> Channel:
        """Connect, once the peer's address has come, and compare ends."""
        theirs = _expect(Address, message)
        self._link.set_peer(theirs)
        await self._worker.finish(self._opening)
        mine, guests = await self._worker.run(partial(self._link.ends, theirs))
        signals = self.setup.signals
        if mine is not None:
            await signals.post(_encode(mine))
            _expect(_Taken, await signals.fetch())
            await self._worker.run(self._link.settle)
        else:
            said = _expect(_Dialled, await signals.fetch())
            # Gloo accepts the first connection that sends the right number, and silently leaves later ones waiting.
            if guests != [(plain_host(said.host), said.port)]:
                raise TransportError(
                    f"the peer's gloo connected from {said.host}:{said.port}, but connected here: {guests or 'nobody'}",
                    hint="another process connects to gloo's port: use gloo in trusted networks only",
                )
            await self._worker.run(self._link.settle)
            await signals.post(_encode(_Taken()))
        self._handed_over = True
        return LinkChannel(self._link, self._worker, self.setup.stall)

    async def refuse(self, error: TransportError) -> None:
        """Send the peer the reason why setting up failed, if that is possible."""
        with anyio.move_on_after(_TELLING, shield=True), suppress(PeerLost):
            await self.setup.signals.post(_encode(_Refused(error.message)))

    async def aclose(self) -> None:
        """Free everything, unless a channel owns it now. Idempotent."""
        if self._handed_over:
            return
        self._link.abort()
        if not self._worker.closing:
            self._worker.start(self._link.close)
        if not await self._worker.aclose(2 * _CONNECTING):  # harmless: the thread uses gloo's own memory only
            _log.error("thread %s still runs after the set-up was given up", self._worker.name)


class _GlooPending:
    """A server's half-open channel, whose address is in the offer."""

    def __init__(self, end: _GlooEnd, offer: bytes) -> None:
        self.offer = offer
        self._end = end

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        async with _setting_up(self._end):
            return await self._end.channel(await self._end.setup.signals.fetch())

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        await self._end.aclose()


class GlooTransport:
    """Moves blocks over torch's gloo, in a group of two made for each channel."""

    name = "gloo"

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        if device.partition(":")[0] != "cpu":
            return f"it moves tensors in the CPU's memory only, not on {device}"
        return None if sys.platform == "linux" else f"it needs Linux, this is {sys.platform}"

    def facts(self, device: str) -> Mapping[str, str]:
        """The version of the messages with which both ends connect."""
        del device
        return {"rendezvous": "1"}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        end = _GlooEnd(_SERVER, setup)
        async with _setting_up(end):
            return _GlooPending(end, await end.address())

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        end = _GlooEnd(_CLIENT, setup)
        async with _setting_up(end):
            await setup.signals.post(await end.address())
            return await end.channel(offer)


@asynccontextmanager
async def _setting_up(end: _GlooEnd) -> AsyncIterator[None]:
    """Run the body within the deadline. If it fails, free everything and tell the peer."""
    try:
        with anyio.move_on_after(end.setup.timeout) as scope:
            yield
        if scope.cancelled_caught:
            raise TransferTimeout(f"the peer did not open its end of the channel within {end.setup.timeout:g} s")
    except BaseException as error:
        if isinstance(error, TransportError):
            await end.refuse(error)
        await end.aclose()
        raise


def _tag(kind: int, nbytes: int) -> int:
    """The tag of an operation for a block of this length.

    Gloo matches a send with a receive of the same tag. With the length in the tag, both lengths are always equal. A
    longer send would end the receiver's process.
    """
    return nbytes % _LENGTHS * _KINDS + kind


def _expect(kind: type[N], message: bytes) -> N:
    try:
        found = _decode(message)
    except msgspec.DecodeError as error:
        raise TransportError(f"the peer's message about gloo can't be read: {error}") from error
    if isinstance(found, _Refused):
        raise PeerLost(f"the peer gave up: {found.reason[:_LONGEST_REASON]}")
    if not isinstance(found, kind):
        raise TransportError(f"the peer's message about gloo is {type(found).__name__}, not {kind.__name__}")
    return found


@contextmanager
def _translated(kind: type[TransportError]) -> Iterator[None]:
    """Translate gloo's errors, which all have one type, into this library's errors."""
    try:
        yield
    except RuntimeError as error:
        text = _SOURCE_LINE.sub("", str(error)).partition(". This is typically")[0].splitlines()[0]
        raise (TransferTimeout if "imed out" in text else kind)(f"gloo: {text}") from error
