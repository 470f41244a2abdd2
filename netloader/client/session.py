"""The client side of one session: its I/O. The pull decides what it asks for and when it ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import anyio

from netloader.codecs.block_view import BlockView
from netloader.core import pull_events as p
from netloader.core.ledger import Ledger
from netloader.core.manifest import Manifest
from netloader.core.messages import ServerMessage
from netloader.core.plan import Plan, to_ranges
from netloader.core.protocol import Session, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.texts import one_line
from netloader.errors import DigestMismatch, LocalProtocolError, MemoryStillInUse, RemoteProtocolError, TransportError
from netloader.observe.base import Observers
from netloader.observe.events import PhaseEnded
from netloader.session.block_queue import BlockQueue
from netloader.session.connection import ControlConnection
from netloader.session.driver import ChannelCall, SessionDriver
from netloader.session.off_loop import look_up
from netloader.session.relay_progress import Supply
from netloader.transports.base import Channel, Transport

__all__ = ["ClientSession", "Digest", "PullDestination", "SessionCommand"]

_RECEIVE_BYTES = 512 << 20
"""Bytes after which no further block is added to one receive. The other granted blocks wait for the next one."""

_ACCOUNT_SECONDS = 0.02
"""Seconds between two reports of landed blocks during a receive; the first block is reported at once. More frequent
reports would cost throughput, because the threads that move bytes wait for the interpreter meanwhile."""

_OPEN_GRANTS = 1 << 16
"""Most grants that may wait for their blocks. A server answers a request with one grant or a few."""

_WAITING_AT_ONCE, _WAITING_RATE = 1000, 10.0
"""How often a source may send Waiting: in all, and in addition for each second."""

SessionCommand = p.Accept | p.Reject | p.RequestBlocks | p.Finish | p.LeaveSource | p.CancelSession
"""A command of the pull to one session."""


class PullDestination(Protocol):
    """The memory that a pull fills."""

    @property
    def manifest(self) -> Manifest | None:
        """The tensors; None until :meth:`adopt`."""
        ...

    @property
    def device(self) -> str:
        """Device of the tensors, as torch names it."""
        ...

    def adopt(self, manifest: Manifest, metadata: Mapping[str, str] | None) -> None:
        """Allocate memory for a manifest that the server announced, with the metadata of its weight files."""
        ...

    def free(self) -> None:
        """Free the memory that :meth:`adopt` allocated."""
        ...

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order."""
        ...


Digest = Callable[[BlockView, str], bytes]
"""Computes the digest of a block in memory by the named algorithm."""


class ClientSession(SessionDriver[ServerMessage]):
    """The session with one source.

    Args:
        session: A fresh client session.
        connection: The control connection to the source.
        number: The session's number in its pull.
        source: Its address, for messages.
        ledger: The ledger of the pull; only read here.
        tell: Takes the events for the pull.
        destination: The memory to fill.
        digest: Computes the digest of a block.
        transports: Transports by name.
        supply: Is given the chain of the source.
        began: When connecting began, by the monotonic clock.
        observers: Receive the events of the session.

    Attributes:
        source: As given.
        transports: As given.
        blocks: Blocks that were verified, as the pull counts them.
        nbytes: Their bytes.
        place: Where this client is in the queue of the source, and why; empty if it was not queued.
    """

    def __init__(
        self,
        session: Session,
        connection: ControlConnection[ServerMessage],
        *,
        number: int,
        source: str,
        ledger: Ledger,
        tell: Callable[[p.Event], None],
        destination: PullDestination,
        digest: Digest,
        transports: Mapping[str, Transport],
        supply: Supply,
        began: float,
        observers: Observers,
    ) -> None:
        super().__init__(
            session,
            connection,
            device=destination.device,
            label=f"source {source}",
            number=number,
            peer=source,
            began=began,
            observers=observers,
        )
        self.source = source
        self.blocks = 0
        self.nbytes = 0
        self.place = ""
        self._ledger = ledger
        self._tell = tell
        self._destination = destination
        self._digest = digest
        self.transports = transports
        self._supply = supply
        self._loop = asyncio.get_running_loop()
        self._landed: deque[tuple[int, bytes]] = deque()
        self._some_landed = asyncio.Event()
        self._rejected: DigestMismatch | None = None
        self._granted = BlockQueue(_OPEN_GRANTS, f"the source sent more than {_OPEN_GRANTS} grants ahead")
        self._verify_seconds = 0.0
        self._began = time.monotonic()
        self._queued = 0

    async def run(self) -> None:
        """Run the session to its end."""
        try:
            await super().run()
        finally:
            self._granted.close()
            self._supply.ended(self)
            if self._verify_seconds:
                self._observe(PhaseEnded("client", self.number, self.peer, "verify", self._verify_seconds))

    # --- commands of the pull -----------------------------------------------------------------------------------------

    def carry_out(self, command: SessionCommand) -> None:
        """Carry out a command of the pull. Does nothing when the state of the session does not allow it any more."""
        match command:
            case p.Accept():
                self.feed(e.Pinned())
            case p.Reject(_, error):
                self.feed(e.WorkFailed(error))
            case p.RequestBlocks(_, ranges):
                self.feed(e.BlocksWanted(ranges))
            case p.Finish(_, outcome, blocks, nbytes):
                self.feed(e.Finished(outcome, blocks, nbytes))
            case p.LeaveSource(_, reason):
                self.feed(e.Cancelled(reason, "timeout"))
            case p.CancelSession():
                self.feed(self.cancellation())

    # --- effects of the session ---------------------------------------------------------------------------------------

    def perform(self, effect: f.Effect) -> None:
        """Carry out an effect of the client's side."""
        match effect:
            case f.Pin(announcement, partial, shared):
                self._tell(p.HoldingAnnounced(self.number, announcement, partial, shared))
            case f.NoteBlocks(has, sent):
                self._tell(p.BlocksOffered(self.number, has, sent))
            case f.ConnectChannel(transport, offer, peer_facts):
                self.spawn(lambda: self._connect(transport, offer, peer_facts), lambda event: event)
            case f.AskForWork():
                self._tell(p.SessionIdle(self.number))
            case f.ReceiveBlocks(ranges):
                self._granted.put(ranges)
            case f.ReturnBlocks(ranges, reason, sources):
                self._tell(p.BlocksDenied(self.number, ranges, reason, sources))
            case _:
                super().perform(effect)

    def queued(self, position: int, reason: str) -> None:
        """The source queued this session. One that says so without end is left, because it only costs time."""
        self._queued += 1
        if self._queued > _WAITING_AT_ONCE + _WAITING_RATE * (time.monotonic() - self._began):
            flood = f"the source sent Waiting {self._queued} times"
            self.feed(e.Failed(RemoteProtocolError(flood, hint="a server sends it every few seconds")))
            return
        self.place = one_line(f"number {position + 1} in its queue: {reason}")
        self._tell(p.SessionQueued(self.number))

    def chain(self, node: str, relays: tuple[str, ...]) -> None:
        """The source named the relays that its blocks come through."""
        self._supply.feeds(self, (node, *relays) if node else relays)

    def state_changed(self, after: State) -> None:
        """Start the tasks that receive and account for blocks when the channel is open."""
        if after is State.TRANSFER:
            self._tell(p.SessionReady(self.number))
            self.spawn(self._account_meanwhile, lambda _: None)
            self.spawn(lambda: self.make_calls(self._next_receive), lambda _: None)

    def cancellation(self) -> e.Cancelled:
        """The event that ends the session when the pull is cancelled or has every block."""
        return e.Cancelled("every block is there", "done") if self._ledger.complete else super().cancellation()

    async def _connect(self, transport: str, offer: bytes, peer_facts: dict[str, str]) -> e.Event | None:
        async def make() -> Channel:
            return await self.transports[transport].connect(offer, self.setup(peer_facts))

        return await self.open_channel(make)

    # --- blocks -----------------------------------------------------------------------------------------------------

    async def _next_receive(self) -> ChannelCall | None:
        """Wait for granted blocks, and return the call that receives the next ones; None at the end of the session."""
        if not await self._granted.wait():
            return None
        announcement = self.session.announcement
        if announcement is None:
            raise LocalProtocolError("blocks were granted before anything was announced")
        plan = announcement.plan
        numbers = self._granted.take(plan, _RECEIVE_BYTES)
        views = await look_up(self._destination.views, plan, numbers)
        return partial(self._receive, announcement.algorithm, numbers, views)

    async def _receive(self, algorithm: str, numbers: Sequence[int], views: Sequence[BlockView]) -> Callable[[], None]:
        seconds: list[float] = []  # `landed` may run in several threads at once

        def landed(view: BlockView) -> None:
            began = time.perf_counter()
            digest = self._digest(view, algorithm)
            view.settle()
            seconds.append(time.perf_counter() - began)
            expected = self._ledger.expected_digest(view.number)
            if digest != expected:
                # Not reported: the block would become pending and be requested again while this receive still writes
                # it. The pull takes it back with the other open blocks when the session ends.
                names = self._plan().tensors_of(view.number)
                self._rejected = DigestMismatch(view.number, names, expected.hex(), digest.hex())
                raise self._rejected
            self._landed.append((view.number, digest))
            if len(numbers) > 1 and not self._some_landed.is_set():  # a receive's end reports a single block
                self._loop.call_soon_threadsafe(self._some_landed.set)

        try:
            await self.channel().recv(views, landed)
            result: e.Event = e.BlocksReceived(to_ranges(numbers))
        except DigestMismatch as error:
            result = e.WorkFailed(error)
        except MemoryStillInUse:
            raise  # takes precedence over a wrong digest
        except TransportError:
            # A wrong digest closes the channel, so the other calls fail too. The digest is the cause to report.
            if self._rejected is None:
                raise
            result = e.WorkFailed(self._rejected)
        finally:
            self._verify_seconds += sum(seconds)
            self._account()  # before the session ends the receive, so that verified blocks count
        return lambda: self.feed(result)

    def _plan(self) -> Plan:
        if self._ledger.plan is None:
            raise LocalProtocolError("blocks landed before a plan was agreed")
        return self._ledger.plan

    async def _account_meanwhile(self) -> None:
        """During receives, report landed blocks: the first at once, then once per :data:`_ACCOUNT_SECONDS`."""
        while True:
            await self._some_landed.wait()
            self._some_landed.clear()
            self._account()
            await anyio.sleep(_ACCOUNT_SECONDS)

    def _account(self) -> None:
        """Report the landed blocks to the pull that were not reported yet."""
        blocks = [self._landed.popleft() for _ in range(len(self._landed))]
        if blocks:
            self._tell(p.BlocksArrived(self.number, blocks))
