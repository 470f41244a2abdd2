"""One source at the client: carries out the effects of a client's session on behalf of a pull."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import anyio

from netloader.codecs.block_view import BlockView
from netloader.core.ledger import Ledger
from netloader.core.manifest import Manifest
from netloader.core.messages import Outcome, ServerMessage
from netloader.core.plan import Plan, to_ranges
from netloader.core.protocol import Session, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.report import Phases, SourceShare
from netloader.errors import DigestMismatch, LocalProtocolError, MemoryStillInUse, NetloaderError, TransportError
from netloader.session.block_queue import BlockQueue
from netloader.session.connection import ControlConnection
from netloader.session.driver import Move, SessionDriver, looked_up
from netloader.session.relay_progress import Supply
from netloader.transports.base import Channel, Transport

__all__ = ["ClientSession", "Destination"]

_WINDOW_BYTES = (32 << 20, 2 << 30)
"""Bytes asked for ahead, at first and at most: enough to keep a fast link busy while requests travel."""

_WINDOW_SECONDS = 0.5
"""What may be asked for ahead, in seconds at the rate seen: what others may have to wait for when a source is slow."""

_REQUEST_PART = 2
"""Part of a window that has to be free before more is asked for: how often a source is given more."""

_RECEIVE_BYTES = 512 << 20
"""Bytes after which no further block is added to a receive: what is granted beyond waits for the next."""

_LATE = 4
"""A block that takes this many times as long as blocks took until now is overdue."""

_LOOK_SECONDS = 0.02
"""Seconds between two looks at what landed while something is being received; at the first block it is looked at once.
While the loop accounts for blocks, and while it is woken, the threads that move bytes wait for the interpreter."""

_OPEN_GRANTS = 1 << 16
"""Grants that may wait for their blocks: a server answers a request with one, or a few."""


class Destination(Protocol):
    """What a pull fills."""

    @property
    def manifest(self) -> Manifest | None:
        """The tensors; None until :meth:`adopt`."""
        ...

    @property
    def device(self) -> str:
        """Where they live, as torch names it."""
        ...

    def adopt(self, manifest: Manifest) -> None:
        """Provide memory for a manifest that the server announced."""
        ...

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order."""
        ...


Digest = Callable[[BlockView, str], bytes]
"""Digest of what lies in a block's memory, by the algorithm named."""


class ClientSession(SessionDriver[ServerMessage]):
    """Pulls from one source.

    Args:
        session: A fresh client session.
        connection: The control connection to the source.
        source: Its address, for messages.
        ledger: The pull's ledger; this object is the session's name in it.
        destination: What is filled.
        digest: How to check a block.
        transports: By name.
        setup_timeout: Seconds that opening a channel may take.
        stall: Seconds that a transfer may go without progress.
        supply: Told where blocks come from.
        pinning: Held while a source is accepted: one session of a pull at a time.
        pinned: Called when the source was accepted.
        progressed: Called after blocks were verified.
        share: Where to count what this source gave.

    Attributes:
        parked: It has nothing to do until blocks of other sessions become pending again.
        dismissed: It was ended because every block is there, before it had anything to give.
        denied: Why the source could not give some blocks; empty when it gave all that it was asked for.
        elsewhere: Where it said that those may be had.
    """

    def __init__(
        self,
        session: Session,
        connection: ControlConnection[ServerMessage],
        *,
        source: str,
        ledger: Ledger,
        destination: Destination,
        digest: Digest,
        transports: Mapping[str, Transport],
        setup_timeout: float,
        stall: float,
        supply: Supply,
        pinning: anyio.Lock,
        pinned: Callable[[e.Announcement], None],
        progressed: Callable[[], None],
        share: SourceShare,
    ) -> None:
        super().__init__(session, connection, device=destination.device, label=f"source {source}")
        self._source = source
        self._ledger = ledger
        self._destination = destination
        self._digest = digest
        self._transports = transports
        self._setup_timeout = setup_timeout
        self._stall = stall
        self._supply = supply
        self._pinning = pinning
        self._pinned = pinned
        self._progressed = progressed
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[int, bytes]] = deque()
        self._landed = False
        self._rejected: DigestMismatch | None = None
        self._receiving = 0
        self._over = False
        self._next_look: asyncio.TimerHandle | None = None
        self._began = self._moved = time.monotonic()
        self._window = _WINDOW_BYTES[0]
        self._received_bytes = 0
        self._seconds_per_byte = 0.0
        self.parked = False
        self.dismissed = False
        self._granted = BlockQueue(_OPEN_GRANTS, f"the source sent more than {_OPEN_GRANTS} grants ahead")
        self._verify_seconds = 0.0
        self.share = share
        self.denied = ""
        self.elsewhere: tuple[str, ...] = ()

    async def run(self) -> None:
        """Pull what the ledger gives this session; what it did not finish goes back to the ledger."""
        try:
            await super().run()
        finally:
            self._granted.close()
            self._commit()
            self._over = True
            self._ledger.lose(self)
            self._supply.ended(self)
            self.share.transport = self.session.transport or self.share.transport

    def add_phases(self, phases: Phases) -> None:
        """Add this session's seconds to `phases`."""
        seconds = self.clock.seconds()
        phases.connect += seconds.get(State.LISTEN, 0.0)
        phases.validate += seconds.get(State.VALIDATE, 0.0)
        phases.plan += seconds.get(State.PLAN, 0.0)
        phases.transfer += seconds.get(State.TRANSFER, 0.0)
        phases.verify += self._verify_seconds
        phases.finalize += seconds.get(State.FINALIZE, 0.0)

    def perform(self, effect: f.Effect) -> None:
        """Carry out an effect of the client's side."""
        match effect:
            case f.Pin(announcement):
                self.spawn(lambda: self._pin(announcement), lambda event: event)
            case f.ConnectChannel(transport, offer, peer_facts):
                self.spawn(lambda: self._connect(transport, offer, peer_facts), lambda event: event)
            case f.AskForWork():
                self._ask_for_work()
            case f.ReceiveBlocks(ranges):
                self._granted.put(ranges)
            case f.ReturnBlocks(ranges, reason, sources):
                self.denied = reason or "it did not say why"
                self.elsewhere = sources
                self._ledger.give_back(self, ranges)
            case _:
                super().perform(effect)

    def chain(self, node: str, relays: tuple[str, ...]) -> None:
        """The source told which relays its blocks come through."""
        self._supply.feeds(self, (node, *relays) if node else relays)

    def moved(self, after: State) -> None:
        """Start the task that receives, once there is a channel."""
        if after is State.TRANSFER:
            self._began = self._moved = time.monotonic()
            self.spawn(lambda: self.move_blocks(self._next_receive), lambda _: None)

    async def _pin(self, announcement: e.Announcement) -> e.Event:
        try:
            async with self._pinning:  # the first session decides the root, and provides the memory, for all
                if self._ledger.plan is None and self._destination.manifest is None:
                    await anyio.to_thread.run_sync(self._destination.adopt, announcement.manifest)
                self._ledger.pin(announcement.root, announcement.plan, announcement.digests, self._source)
        except NetloaderError as error:
            return e.PinRefused(error)
        self._pinned(announcement)
        return e.Pinned()

    async def _connect(self, transport: str, offer: bytes, peer_facts: dict[str, str]) -> e.Event | None:
        async def make() -> Channel:
            setup = self.setup(peer_facts, self._setup_timeout, self._stall)
            return await self._transports[transport].connect(offer, setup)

        return await self.open_channel(make)

    def wake(self) -> None:
        """Look whether there is something to do again."""
        if self.parked:
            self._ask_for_work()

    def dismiss(self, deadline: float) -> None:
        """End the session, since every block is there; one that has a channel says how it went until `deadline`.

        Args:
            deadline: Time of the event loop.
        """
        self.hurry(deadline)
        if self.session.state in (State.LISTEN, State.VALIDATE, State.PLAN):
            self.dismissed = True
            self.feed(e.Cancelled("every block is there", "done"))

    def gave_up(self) -> e.Cancelled:
        """What is told to the source when the pull is cancelled, or did not wait for its goodbye."""
        return e.Cancelled("every block is there", "done") if self._ledger.complete else super().gave_up()

    def overdue(self, least: float) -> bool:
        """Whether blocks are in flight and none came for much longer than one takes at the rate seen.

        Args:
            least: Seconds that are never too long.
        """
        plan = self._ledger.plan
        if plan is None or not self._ledger.in_flight_bytes(self):
            return False
        # A source that brought nothing yet is given more time: it may be at the far end of a slow line.
        usual = plan.block_bytes * self._seconds_per_byte if self._received_bytes else least
        return time.monotonic() - self._moved > max(least, _LATE * usual)

    def _ask_for_work(self) -> None:
        plan, ahead = self._ledger.plan, self._ledger.in_flight_bytes(self)
        if plan is None or self.session.state is not State.TRANSFER:
            return
        if not ahead:
            self._moved = time.monotonic()
        asked = self._fill_window(plan, ahead)
        self.parked = False
        if asked or ahead:
            return
        if self._ledger.complete or self.denied or not self._others_may_fail():
            outcome: Outcome = "complete" if self._ledger.complete else "partial"
            self.feed(e.Finished(outcome, self.share.blocks, self.share.nbytes))
            return
        self.parked = True

    def _fill_window(self, plan: Plan, ahead: int) -> bool:
        """Ask for as many blocks as may be under way, `ahead` bytes being it; whether there were any to ask for."""
        window = self._window
        sharers = self._ledger.sharers
        if sharers > (1 if ahead else 0):
            # Towards the end, what one session has asked for others could have fetched.
            fair = self._ledger.pending_bytes // (sharers + (0 if ahead else 1))
            window = min(window, max(fair, 2 * plan.block_bytes))
        # No trickle: a request is worth its messages only when it is a fair part of the window.
        if ahead > window - window // _REQUEST_PART:
            return False
        ranges = self._ledger.assign(self, window - ahead)
        if ranges:
            self.feed(e.BlocksWanted(ranges))
        return bool(ranges)

    def _others_may_fail(self) -> bool:
        """Whether blocks that other sessions are fetching may come back to us."""
        return not self._ledger.idle

    async def _next_receive(self) -> Move | None:
        """The next call that receives, of what the source has granted; waits for it."""
        if not await self._granted.wait():
            return None
        announcement = self.session.announcement
        if announcement is None:
            raise LocalProtocolError("blocks were granted before anything was announced")
        plan = announcement.plan
        numbers = self._granted.take(plan, _RECEIVE_BYTES)
        views = await looked_up(self._destination.views, plan, numbers)
        return partial(self._receive, plan, announcement.algorithm, numbers, views)

    async def _receive(
        self, plan: Plan, algorithm: str, numbers: Sequence[int], views: Sequence[BlockView]
    ) -> Callable[[], None]:
        seconds: list[float] = []  # several threads may be told of blocks at once

        def landed(view: BlockView) -> None:
            began = time.perf_counter()
            digest = self._digest(view, algorithm)
            settle: Callable[[], None] | None = getattr(view, "settle", None)
            if settle is not None:  # its bytes were filled elsewhere than where they belong
                settle()
            seconds.append(time.perf_counter() - began)
            expected = self._ledger.expected_digest(view.number)
            if digest != expected:
                # Not accounted for: the block would be pending again, and asked for again, while it is still under way
                # here. It is given back with the rest when the session ends.
                names = plan.tensors_of(view.number)
                self._rejected = DigestMismatch(view.number, names, expected.hex(), digest.hex())
                raise self._rejected
            self._arrived.append((view.number, digest))
            if not self._landed and len(numbers) > 1:  # a fast source is asked for more before it has nothing to do
                self._landed = True
                self._loop.call_soon_threadsafe(self._look)

        self._receiving += 1
        if self._next_look is None:
            self._next_look = self._loop.call_later(_LOOK_SECONDS, self._look)
        try:
            await self.channel().recv(views, landed)
            result: e.Event = e.BlocksReceived(to_ranges(numbers))
        except DigestMismatch as error:
            result = e.BlocksRejected(error)
        except MemoryStillInUse:
            raise  # whatever else is wrong
        except TransportError:
            # Wrong bytes cut the channel for all its calls, and an earlier one is heard first.
            if self._rejected is None:
                raise
            result = e.BlocksRejected(self._rejected)
        finally:
            self._receiving -= 1
            self._verify_seconds += sum(seconds)
            self._commit()
        return lambda: self.feed(result)

    def _look(self) -> None:
        """In the middle of a receive: account for what landed, and keep the source busy."""
        if self._next_look is not None:
            self._next_look.cancel()
        if self._over:  # said by a thread that could not be brought back: nobody counts on it any more
            return
        self._next_look = self._loop.call_later(_LOOK_SECONDS, self._look) if self._receiving else None
        self._commit()
        plan = self._ledger.plan
        if plan is not None and self.session.state is State.TRANSFER and not self.parked:
            ahead = self._ledger.in_flight_bytes(self)
            if ahead:
                self._fill_window(plan, ahead)

    def _commit(self) -> None:
        """Account for what landed; also when the rest of a request was lost, since what is verified stays verified."""
        plan = self._ledger.plan
        if plan is None or not self._arrived:
            return
        while self._arrived:
            number, digest = self._arrived.popleft()
            self._ledger.received(self, number)
            try:
                self._ledger.verify(self, number, digest)
            except DigestMismatch:
                continue  # pending again; `landed` compares before this, so that nothing of the kind gets here
            self.share.blocks += 1
            self.share.nbytes += plan.blocks[number].nbytes
            self._received_bytes += plan.blocks[number].nbytes
        self._moved = time.monotonic()
        rate = self._received_bytes / max(self._moved - self._began, 1e-3)
        self._seconds_per_byte = 1 / rate if rate else 0.0
        self._window = int(min(max(rate * _WINDOW_SECONDS, 2 * plan.block_bytes), _WINDOW_BYTES[1]))
        self._progressed()
