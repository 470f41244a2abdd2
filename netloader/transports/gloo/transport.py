"""Blocks over torch's gloo: for tensors in the CPU's memory, in trusted networks.

The group is the ``ProcessGroupGloo`` object itself: no world, no group names, nothing that is process-wide. There is no
store to connect to either; both sides tell each other over the control connection where their gloo listens, and each
dials only the address that its control connection leads to. docs/transports.md says what gloo asks of the network.

A peer that breaks gloo's rules ends this process or keeps one of its threads busy for good, and nothing here prevents
that: so gloo is used only where it was named, on each side.
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
"""Ranks: the side that receives is 0, as other collective libraries want it."""

_SPENT = 2
"""Pairs made in vain before the real one, so that the number which a stranger could say (and repeat, no more: see
`packet_filter`) never reads as an operation that gloo would end the process over."""

_DATA, _MARK, _RECEIPT = range(3)
_KINDS = 4
_LENGTHS = (1 << 29) - 3  # a tag has 31 bits

_CONNECTING = 5.0
"""Seconds at most for connecting once both addresses are known: gloo cannot be interrupted while it dials."""

_FOREVER = timedelta(days=1)
"""Gloo's own limit for one operation; ours is the watch on progress, which ends it long before."""

_TELLING = 1.0
"""Seconds to tell the peer why a set-up failed."""

_LONGEST_REASON = 500
_SOURCE_LINE = re.compile(r"^\[[^\]]*\]\s*")

N = TypeVar("N", bound="_Note")
_log = logging.getLogger(__name__)
_numbers = itertools.count()


class _Dialled(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The side that connected: this is my end of the connection."""

    host: str
    port: int


class _Taken(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The side that listened: that is my only connection; go ahead."""


class _Refused(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """Either side: it will not work, and why."""

    reason: str


_Note = Address | _Dialled | _Taken | _Refused
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Note).decode


@dataclass(slots=True)
class _Operation:
    """A block under way.

    Attributes:
        waits: Gloo's handle that is waited for; that of an operation without bytes.
        holds: Gloo's other handles, to be kept until then.
        confirms: For a block received: its bytes, to be confirmed.
        over: Whether it was waited for.
    """

    waits: Any
    holds: tuple[Any, ...]
    confirms: int | None = None
    over: bool = False


class _GlooLink(Link):
    """One end of a group of two; see :class:`~netloader.transports.process_group.Link`.

    When a connection is lost, gloo wakes those who wait for operations that have not begun, but not who waits for one
    of which some bytes have moved: that thread would never come back. So each block is followed by a mark without
    bytes, and confirmed by a receipt without bytes, and only for these do we wait; they cannot be half done. Bytes
    arrive in order, so whoever has the mark has the block, and whoever has the receipt may use its memory again.

    Args:
        rank: Ours.
        setup: What the transport was told.
        published: Set once our address is known, or it is known that it never will be.
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
        self._expected = 0  # the number that the peer says to our listener
        self._group: Any = None  # torch's stubs lack most of a ProcessGroupGloo
        self._lock = threading.Lock()  # abort() may come from any thread
        self._listener: socket.socket | None = None
        self._wire: socket.socket | None = None
        self._taken: guard.End | None = None  # the far end, when the connection was made to our listener
        self._nothing = torch.empty(0, dtype=torch.uint8)
        self._receipts: deque[Any] = deque(maxlen=2 * WINDOW)  # under way at most as many as blocks

    def open(self) -> None:
        """Make the group: publishes our address, waits for :meth:`meet`, connects."""
        try:
            with _translated(TransportError):
                # The only way to choose the address, and not in torch's stubs.
                options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
                options._timeout = timedelta(seconds=self._connecting)  # noqa: SLF001
                options._threads = 1  # noqa: SLF001
                options._devices = [ProcessGroupGloo.create_device(hostname=self._bind)]  # noqa: SLF001
                for _ in range(_SPENT):
                    ProcessGroupGloo(LocalStore(), 0, 1, options)
            with _translated(PeerLost):
                self._group = ProcessGroupGloo(self._store, self._rank, 2, options)
        finally:
            self._published.set()

    def meet(self, address: Address) -> None:
        """Allow gloo to connect to the peer.

        Raises:
            TransportError: The address is not one that the control connection leads to.
        """
        if plain_host(address.host) != self._peer:
            raise TransportError(
                f"the peer's gloo listens at {address.host}, but its control connection is with {self._peer}",
                hint="gloo needs a network without address translation; use another transport",
            )
        if not 0 < address.port < 1 << 16 or len(address.pairs) != 2:  # noqa: PLR2004 - a group of two
            raise TransportError(f"the peer's gloo address makes no sense: {address}")
        zone = self._bind.partition("%")[2]
        self._store.meet(address, socket.if_nametoindex(zone) if zone else 0)

    def ends(self, theirs: Address) -> tuple[_Dialled | None, list[guard.End]]:
        """After connecting: our end, if it was us who connected; and the far ends of all connections to us."""
        dialled = guard.ends(remote=(plain_host(theirs.host), theirs.port))
        taken = guard.ends(local=self._here())
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
        """Both sides know that they are connected to each other: take nobody else, and let bytes through."""
        with self._lock:
            if self._wire is not None:
                guard.lift(self._wire)
                with suppress(OSError):  # it is slower then, no more
                    tune(self._wire, self._bind, self._peer)
            if self._listener is not None:
                with suppress(OSError):  # said when the listener was guarded
                    guard.close_listener(self._listener, self._taken)
                self._listener.close()
                self._listener = None

    def send(self, tensor: torch.Tensor) -> _Operation:
        """Start sending; see :class:`~netloader.transports.process_group.Link`."""
        group, peer, nbytes = self._open(), 1 - self._rank, tensor.numel()
        with _translated(PeerLost):
            receipt = group.recv([self._nothing], peer, _tag(_RECEIPT, nbytes))
            data = group.send([tensor], peer, _tag(_DATA, nbytes))
            mark = group.send([self._nothing], peer, _tag(_MARK, nbytes))
        return _Operation(receipt, (data, mark))

    def recv(self, tensor: torch.Tensor) -> _Operation:
        """Start receiving; see :class:`~netloader.transports.process_group.Link`."""
        group, peer, nbytes = self._open(), 1 - self._rank, tensor.numel()
        with _translated(PeerLost):
            data = group.recv([tensor], peer, _tag(_DATA, nbytes))
            mark = group.recv([self._nothing], peer, _tag(_MARK, nbytes))
        return _Operation(mark, (data,), confirms=nbytes)

    def finish(self, work: _Operation) -> None:
        """Wait for an operation; see :class:`~netloader.transports.process_group.Link`."""
        if work.over:
            return
        work.over = True  # also when it fails: gloo forgets the outcome once it was told
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
        """Cut the connection: of all there is in gloo to end a blocked call, only that works."""
        self._store.abort()
        with self._lock, suppress(OSError):  # cut already
            if self._wire is not None:
                self._wire.shutdown(socket.SHUT_RDWR)
            elif self._listener is not None:
                # Gloo may be waiting for the peer: it gets a connection, from us, that ends at once.
                guard.visit(self._listener, self._expected)

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
        """In gloo's thread, when it listens and nobody knows where yet."""
        self.address = address
        self._expected = address.pairs[1 - self._rank]
        listening = guard.listener(*self._here())
        if listening is None:
            raise TransportError(f"gloo does not listen at {address.host}:{address.port} as it says")
        with self._lock:
            self._listener = listening
        try:
            guard.guard_listener(listening, self._peer, self._expected)
        except OSError as error:
            _log.warning("the kernel keeps no strangers from gloo's port %d for us: %s", address.port, error)
        visitors = guard.ends(local=self._here())
        for sock, _, _ in visitors:  # a set-up that was given up meanwhile visits its own listener, too
            sock.close()
        if visitors:
            raise TransportError(f"somebody connected to gloo's port {address.port} before anybody could know it")
        self._published.set()

    def _here(self) -> guard.End:
        if self.address is None:
            raise TransportError("gloo has not said where it listens")
        return self.address.host, self.address.port

    def _open(self) -> Any:
        if self._group is None:
            raise PeerLost("the group is closed")
        return self._group


class _End:
    """One side while it is being set up."""

    def __init__(self, rank: int, setup: Setup) -> None:
        self.setup = setup
        self._published = LoopEvent()
        self._link = _GlooLink(rank, setup, self._published)
        self._worker = Worker(f"netloader-gloo-{next(_numbers)}", self._link.abort)
        self._opening: Job[None] = self._worker.start(self._link.open)
        self._handed_over = False

    async def address(self) -> bytes:
        """What the peer has to know."""
        await self._published.wait()
        if self._link.address is None or self._opening.over.is_set():
            await self._worker.finish(self._opening)
        if self._link.address is None:
            raise TransportError("gloo has not said where it listens")
        return _encode(self._link.address)

    async def channel(self, note: bytes) -> Channel:
        """Connect, once the peer's address has come, and compare ends."""
        theirs = _expect(Address, note)
        self._link.meet(theirs)
        await self._worker.finish(self._opening)
        mine, guests = await self._worker.run(partial(self._link.ends, theirs))
        signals = self.setup.signals
        if mine is not None:
            await signals.post(_encode(mine))
            _expect(_Taken, await signals.fetch())
            await self._worker.run(self._link.settle)
        else:
            said = _expect(_Dialled, await signals.fetch())
            # Gloo takes the first that says the right number, and keeps later ones waiting without telling.
            if guests != [(plain_host(said.host), said.port)]:
                raise TransportError(
                    f"the peer's gloo connected from {said.host}:{said.port}, but connected here: {guests or 'nobody'}",
                    hint="somebody else connects to gloo's port: use it in trusted networks only",
                )
            await self._worker.run(self._link.settle)
            await signals.post(_encode(_Taken()))
        self._handed_over = True
        return LinkChannel(self._link, self._worker, self.setup.stall)

    async def refuse(self, error: TransportError) -> None:
        """Tell the peer why it will not work; not more than a try."""
        with anyio.move_on_after(_TELLING, shield=True), suppress(PeerLost):
            await self.setup.signals.post(_encode(_Refused(error.message)))

    async def aclose(self) -> None:
        """Free everything, unless a channel has it now. Idempotent."""
        if self._handed_over:
            return
        self._link.abort()
        if not self._worker.closing:
            self._worker.start(self._link.close)
        if not await self._worker.aclose(2 * _CONNECTING):  # no memory but gloo's own is concerned
            _log.error("thread %s still runs after the set-up was given up", self._worker.name)


class _GlooPending:
    """A server's end that has told where it listens."""

    def __init__(self, end: _End, offer: bytes) -> None:
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
        """The form of the messages by which both ends find each other."""
        del device
        return {"rendezvous": "1"}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        end = _End(_SERVER, setup)
        async with _setting_up(end):
            return _GlooPending(end, await end.address())

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        end = _End(_CLIENT, setup)
        async with _setting_up(end):
            await setup.signals.post(await end.address())
            return await end.channel(offer)


@asynccontextmanager
async def _setting_up(end: _End) -> AsyncIterator[None]:
    """Within the deadline, or everything is freed again and the peer told."""
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

    Gloo pairs a send with a receive of the same tag, so with the length in it the two always fit: more bytes than
    were asked for would end the receiver's process.
    """
    return nbytes % _LENGTHS * _KINDS + kind


def _expect(kind: type[N], note: bytes) -> N:
    try:
        found = _decode(note)
    except msgspec.DecodeError as error:
        raise TransportError(f"the peer's note about gloo can't be read: {error}") from error
    if isinstance(found, _Refused):
        raise PeerLost(f"the peer gave up: {found.reason[:_LONGEST_REASON]}")
    if not isinstance(found, kind):
        raise TransportError(f"the peer's note about gloo is {type(found).__name__}, not {kind.__name__}")
    return found


@contextmanager
def _translated(kind: type[TransportError]) -> Iterator[None]:
    """Gloo's errors, all of one type, into ours."""
    try:
        yield
    except RuntimeError as error:
        text = _SOURCE_LINE.sub("", str(error)).partition(". This is typically")[0].splitlines()[0]
        raise (TransferTimeout if "imed out" in text else kind)(f"gloo: {text}") from error
