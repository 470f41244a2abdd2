"""One source at the client: the I/O of one session. What it asks for, and when it ends, the pull decides."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import anyio

from netloader.codecs.block_view import BlockView
from netloader.core import pull_moves as p
from netloader.core.ledger import Ledger
from netloader.core.manifest import Manifest
from netloader.core.messages import ServerMessage
from netloader.core.plan import Plan, to_ranges
from netloader.core.protocol import Session, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.errors import DigestMismatch, LocalProtocolError, MemoryStillInUse, TransportError
from netloader.observe.base import Observers
from netloader.observe.events import PhaseEnded
from netloader.session.block_queue import BlockQueue
from netloader.session.connection import ControlConnection
from netloader.session.driver import Move, SessionDriver
from netloader.session.off_loop import looked_up
from netloader.session.relay_progress import Supply
from netloader.transports.base import Channel, Transport

__all__ = ["ClientSession", "Destination", "Digest", "SessionCommand"]

_RECEIVE_BYTES = 512 << 20
"""Bytes after which no further block is added to a receive: what is granted beyond waits for the next."""

_LOOK_SECONDS = 0.02
"""Seconds between two accounts of what landed while something is being received; the first block is told at once. While
the loop accounts for blocks, and while it is woken, the threads that move bytes wait for the interpreter."""

_OPEN_GRANTS = 1 << 16
"""Grants that may wait for their blocks: a server answers a request with one, or a few."""

SessionCommand = p.Accept | p.Refuse | p.Ask | p.Finish | p.Leave | p.Dismiss
"""What a pull wants of one session."""


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
    """Talks to one source.

    Args:
        session: A fresh client session.
        connection: The control connection to the source.
        number: The session's number in its pull.
        source: Its address, for messages.
        ledger: The pull's; only read here.
        tell: Takes what happened.
        destination: What is filled.
        digest: How to check a block.
        transports: By name.
        supply: Told where blocks come from.
        began: When connecting began.
        observers: Told what happens.

    Attributes:
        source: As given.
        transports: As given.
        blocks: Blocks that were verified, as the pull counts them.
        nbytes: Their bytes.
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
        destination: Destination,
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

    async def run(self) -> None:
        """Talk to the source to the end of the session."""
        try:
            await super().run()
        finally:
            self._granted.close()
            self._supply.ended(self)
            if self._verify_seconds:
                self._observe(PhaseEnded("client", self.number, self.peer, "verify", self._verify_seconds))

    # --- what the pull wants ----------------------------------------------------------------------------------------

    def carry_out(self, command: SessionCommand) -> None:
        """Do what the pull wants of this session; nothing happens when the session is past it."""
        match command:
            case p.Accept():
                self.feed(e.Pinned())
            case p.Refuse(_, error):
                self.feed(e.WorkFailed(error))
            case p.Ask(_, ranges):
                self.feed(e.BlocksWanted(ranges))
            case p.Finish(_, outcome, blocks, nbytes):
                self.feed(e.Finished(outcome, blocks, nbytes))
            case p.Leave(_, reason):
                self.feed(e.Cancelled(reason, "timeout"))
            case p.Dismiss():
                self.feed(self.gave_up())

    # --- what the session wants -------------------------------------------------------------------------------------

    def perform(self, effect: f.Effect) -> None:
        """Carry out an effect of the client's side."""
        match effect:
            case f.Pin(announcement):
                self._tell(p.Announced(self.number, announcement))
            case f.ConnectChannel(transport, offer, peer_facts):
                self.spawn(lambda: self._connect(transport, offer, peer_facts), lambda event: event)
            case f.AskForWork():
                self._tell(p.WantsWork(self.number))
            case f.ReceiveBlocks(ranges):
                self._granted.put(ranges)
            case f.ReturnBlocks(ranges, reason, sources):
                self._tell(p.Denied(self.number, ranges, reason, sources))
            case _:
                super().perform(effect)

    def queued(self) -> None:
        """The source lets us wait."""
        self._tell(p.Queued(self.number))

    def chain(self, node: str, relays: tuple[str, ...]) -> None:
        """The source told which relays its blocks come through."""
        self._supply.feeds(self, (node, *relays) if node else relays)

    def moved(self, after: State) -> None:
        """Start the tasks that receive and account for it, once there is a channel."""
        if after is State.TRANSFER:
            self._tell(p.Opened(self.number))
            self.spawn(self._account_meanwhile, lambda _: None)
            self.spawn(lambda: self.move_blocks(self._next_receive), lambda _: None)

    def gave_up(self) -> e.Cancelled:
        """What is told to the source when the pull is cancelled, or has every block."""
        return e.Cancelled("every block is there", "done") if self._ledger.complete else super().gave_up()

    async def _connect(self, transport: str, offer: bytes, peer_facts: dict[str, str]) -> e.Event | None:
        async def make() -> Channel:
            return await self.transports[transport].connect(offer, self.setup(peer_facts))

        return await self.open_channel(make)

    # --- blocks -----------------------------------------------------------------------------------------------------

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
        return partial(self._receive, announcement.algorithm, numbers, views)

    async def _receive(self, algorithm: str, numbers: Sequence[int], views: Sequence[BlockView]) -> Callable[[], None]:
        seconds: list[float] = []  # several threads may be told of blocks at once

        def landed(view: BlockView) -> None:
            began = time.perf_counter()
            digest = self._digest(view, algorithm)
            view.settle()
            seconds.append(time.perf_counter() - began)
            expected = self._ledger.expected_digest(view.number)
            if digest != expected:
                # Not accounted for: the block would be pending again, and asked for again, while it is still under way
                # here. It is given back with the rest when the session ends.
                names = self._plan().tensors_of(view.number)
                self._rejected = DigestMismatch(view.number, names, expected.hex(), digest.hex())
                raise self._rejected
            self._landed.append((view.number, digest))
            if len(numbers) > 1 and not self._some_landed.is_set():  # a single block: this receive is over anyway
                self._loop.call_soon_threadsafe(self._some_landed.set)

        try:
            await self.channel().recv(views, landed)
            result: e.Event = e.BlocksReceived(to_ranges(numbers))
        except DigestMismatch as error:
            result = e.WorkFailed(error)
        except MemoryStillInUse:
            raise  # whatever else is wrong
        except TransportError:
            # Wrong bytes cut the channel for all its calls, and an earlier one is heard first.
            if self._rejected is None:
                raise
            result = e.WorkFailed(self._rejected)
        finally:
            self._verify_seconds += sum(seconds)
            self._account()  # before the session hears that the receive is over; what is verified stays verified
        return lambda: self.feed(result)

    def _plan(self) -> Plan:
        if self._ledger.plan is None:
            raise LocalProtocolError("blocks landed before a plan was agreed")
        return self._ledger.plan

    async def _account_meanwhile(self) -> None:
        """Account for what landed while receives go on: for the first block at once, then every so many seconds."""
        while True:
            await self._some_landed.wait()
            self._some_landed.clear()
            self._account()
            await anyio.sleep(_LOOK_SECONDS)

    def _account(self) -> None:
        """Tell the pull what landed and was not told yet."""
        blocks = [self._landed.popleft() for _ in range(len(self._landed))]
        if blocks:
            self._tell(p.Landed(self.number, blocks))
