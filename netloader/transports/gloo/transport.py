"""The gloo transport: blocks over torch's gloo, for tensors in the CPU's memory, in trusted networks.

Gloo runs in a process of its own for each session (`processes`, `spawner`, `session`), because a peer that violates its
protocol can end the process that it runs in, or keep a thread of it busy for ever. There it costs that session only.

There is no store on a port. Both sides exchange the addresses of their gloo over the control connection, and each
connects only to the address of its control connection. docs/transports.md says what gloo requires of the network.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import anyio
import msgspec
import torch

from netloader.errors import PeerLost, TransferTimeout, TransportError, shown
from netloader.transports.base import Channel, Pending, Setup
from netloader.transports.gloo import messages as m
from netloader.transports.gloo.addresses import Address, plain_host, source_for, zone_of
from netloader.transports.gloo.link import GlooLink
from netloader.transports.gloo.processes import Spawner
from netloader.transports.io.worker import Worker
from netloader.transports.process_group import LinkChannel

__all__ = ["GlooTransport"]

_CLIENT, _SERVER = 0, 1
"""Ranks: the side that receives is 0, as other collective libraries require it."""

_CONNECTING = 5.0
"""Most seconds for connecting once both addresses are known."""

_CLOSING = 10.0
"""Seconds that freeing a set-up may take before an error is logged. It takes milliseconds."""

_TELLING = 1.0
"""Seconds to send the peer the reason why setting up failed."""

_LONGEST_REASON = 500

_REAP_EVERY = 20.0
"""Seconds between two checks whether the process that forks has ended. It ends 30 s after its last session."""

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


class _GlooEnd:
    """One side of a channel during set-up.

    What both sides write here travels over the control connection, and is as authentic as that is. The blocks are not:
    gloo has no place for a key.

    Args:
        rank: Rank of this side.
        setup: Parameters of the channel.
        spawner: Starts the process in which gloo runs.
    """

    def __init__(self, rank: int, setup: Setup, spawner: Spawner) -> None:
        self.setup = setup
        self._rank = rank
        self._peer = plain_host(setup.peer_host)
        self._source = source_for(setup.peer_host, setup.local_host)
        self._link = GlooLink(spawner)
        self._worker = Worker(f"netloader-gloo-{next(_numbers)}", self._link.abort)
        self._handed_over = False

    async def address(self, expected: str) -> bytes:
        """Start gloo. Returns this side's address, encoded for the peer.

        Args:
            expected: Numeric address from which the peer connects, as far as is known.
        """
        command = m.Open(self._rank, self.setup.local_host, expected, min(self.setup.timeout, _CONNECTING))
        address = await self._worker.run(partial(self._link.open, command))
        source = "" if self._source == plain_host(address.host) else self._source
        return _encode(msgspec.structs.replace(address, dials_from=source))

    def checked(self, message: bytes) -> Address:
        """The peer's address, in canonical form.

        Raises:
            TransportError: It is invalid, or its host is not that of the control connection.
        """
        theirs = _expect(Address, message)
        host = plain_host(theirs.host)
        if host != self._peer:
            raise TransportError(
                f"the peer's gloo listens at {host}, but its control connection is with {self._peer}",
                hint="gloo needs a network without address translation; use another transport",
            )
        if not 0 < theirs.port < 1 << 16 or len(theirs.pairs) != 2:  # noqa: PLR2004 - a group of two
            raise TransportError(f"the peer's gloo address is invalid: {theirs}")
        return msgspec.structs.replace(theirs, host=host, dials_from=plain_host(theirs.dialler))

    async def channel(self, theirs: Address) -> Channel:
        """Connect to the peer, and compare ends."""
        zone = zone_of(self.setup.local_host)
        try:
            connected = await self._worker.run(partial(self._link.meet, m.Meet(theirs, zone)))
        except TransferTimeout as error:
            raise TransferTimeout(error.message, hint=self._why_not(theirs)) from error
        signals = self.setup.signals
        if connected.dialled is not None:
            await signals.post(_encode(_Dialled(*connected.dialled)))
            _expect(_Taken, await signals.fetch())
            await self._worker.run(self._link.settle)
        else:
            said = _expect(_Dialled, await signals.fetch())
            guests = [(plain_host(host), port) for host, port in connected.guests]
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
        if not await self._worker.aclose(_CLOSING):  # harmless: the thread has no memory of the caller
            _log.error("thread %s still runs after the set-up was given up", self._worker.name)

    def _why_not(self, theirs: Address) -> str:
        here = plain_host(self.setup.local_host)
        if self._source != here:
            return (
                f"this host connects to {theirs.host} from {self._source}, and a peer of netloader 0.1 expects {here}:"
                f" serve at {self._source}, or use another transport"
            )
        return "a firewall has to let each side connect to any port of the other; use tcp where that can't be"


class _GlooPending:
    """A server's half-open channel, whose address is in the offer."""

    def __init__(self, end: _GlooEnd, offer: bytes) -> None:
        self.offer = offer
        self._end = end

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        async with _setting_up(self._end):
            return await self._end.channel(self._end.checked(await self._end.setup.signals.fetch()))

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        await self._end.aclose()


class GlooTransport:
    """Moves blocks over torch's gloo, in a group of two made for each channel, in a process of its own.

    The processes are forked by one that stays as long as this object exists and sessions come. The first session starts
    it, which takes a second.
    """

    name = "gloo"

    def __init__(self) -> None:
        self._spawner = Spawner()
        self._reaping = weakref.WeakSet[asyncio.AbstractEventLoop]()  # those that have a timer

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        if device.partition(":")[0] != "cpu":
            return f"it moves tensors in the CPU's memory only, not on {device}"
        if sys.platform != "linux":
            return f"it needs Linux, this is {sys.platform}"
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            return f"torch {torch.__version__} was built without gloo"
        return None

    def facts(self, device: str) -> Mapping[str, str]:
        """The version of the messages with which both ends connect."""
        del device
        return {"rendezvous": "1"}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        self._reap_later()
        end = _GlooEnd(_SERVER, setup, self._spawner)
        async with _setting_up(end):
            return _GlooPending(end, await end.address(setup.peer_host))

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        self._reap_later()
        end = _GlooEnd(_CLIENT, setup, self._spawner)
        async with _setting_up(end):
            theirs = end.checked(offer)
            await setup.signals.post(await end.address(theirs.dialler))
            return await end.channel(theirs)

    def _reap_later(self) -> None:
        """Look from time to time whether the process that forks has ended, for as long as it and the event loop run.

        Several event loops may use this transport, and each one only knows its own timers.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._reaping:
            self._reaping.add(loop)
            loop.call_later(_REAP_EVERY, _reap, weakref.ref(self), loop)

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reaping.discard(loop)
        if not self._spawner.reap():
            self._reap_later()


def _reap(transport: weakref.ref[GlooTransport], loop: asyncio.AbstractEventLoop) -> None:
    found = transport()
    if found is not None:
        found._reap(loop)  # noqa: SLF001 - a function, so that the event loop does not keep the transport alive


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


def _expect(kind: type[N], message: bytes) -> N:
    try:
        found = _decode(message)
    except msgspec.DecodeError as error:
        raise TransportError(f"the peer's message about gloo can't be read: {error}") from error
    if isinstance(found, _Refused):
        raise PeerLost(f"the peer gave up: {shown(found.reason, _LONGEST_REASON)}")
    if not isinstance(found, kind):
        raise TransportError(f"the peer's message about gloo is {type(found).__name__}, not {kind.__name__}")
    return found
