"""One client at the server: carries out the effects of a server's session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import anyio

from netloader.codecs.block_view import BlockView
from netloader.core.addresses import seen_from
from netloader.core.messages import ClientMessage
from netloader.core.plan import Ranges, expand, to_ranges
from netloader.core.protocol import Session, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.errors import (
    LocalProtocolError,
    ManifestError,
    RefusedError,
    TransportUnavailable,
)
from netloader.observe.base import Observers
from netloader.server.admission import Admission
from netloader.server.catalog import Holdings
from netloader.server.redirects import Redirects
from netloader.session.block_queue import BlockQueue, groups
from netloader.session.closing import close_pending
from netloader.session.connection import ControlConnection
from netloader.session.driver import Move, SessionDriver
from netloader.session.holding import Holding
from netloader.session.off_loop import few_spans, looked_up
from netloader.session.relay_progress import Supply
from netloader.transports.base import Channel, Transport

__all__ = ["ServerSession", "SessionInfo"]

_QUEUE_NEWS = 5.0
"""Seconds between two signs of life to a client that waits for its turn."""

_RETRY_RELAY = 0.2
"""Seconds after which a relay that looks for a source itself may be asked again."""

_ORPHANED = 5.0
"""Seconds that clients of a relay which lost its source wait for it to find another one."""

_RETRY_GONE = 5.0
"""Seconds after which a client of retracted weights may ask again."""

_RETRY_BUSY = 5.0
"""Seconds after which a client that found no place in the queue may ask again."""

_OPEN_REQUESTS = 4096
"""Requests that one client may have under way."""

_ELSEWHERE = "pull from another source"

_SEND_BYTES = 256 << 20
"""Bytes handed to the channel at once, at most. What a client asks for ahead is half a second's worth at the rate it
sees, so a call takes no longer, and retraction is noticed between two of them."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A glance at one session.

    Attributes:
        peer: Address of the client.
        state: Where the session is.
        role: What the client asked about; empty before it said.
        transport: Name of the transport; empty before one was chosen.
        blocks: Blocks sent.
        nbytes: Their bytes.
    """

    peer: str
    state: State
    role: str
    transport: str
    blocks: int
    nbytes: int


class ServerSession(SessionDriver[ClientMessage]):
    """Serves one client.

    Args:
        session: A fresh server session.
        connection: The client's control connection.
        holdings: What can be served.
        turns: Limits how many clients are served at once; first come, first served.
        looks: The same for clients that only look.
        transports: By name.
        number: Its number at this server.
        observers: Told what happens.
        relays: Whom else a client may be sent to.
        placed: Called once the client has a turn, or a place in the queue.
    """

    def __init__(
        self,
        session: Session,
        connection: ControlConnection[ClientMessage],
        *,
        holdings: Holdings,
        turns: Admission,
        looks: Admission,
        transports: Mapping[str, Transport],
        number: int,
        observers: Observers,
        relays: Redirects,
        placed: Callable[[], None],
    ) -> None:
        peer = f"{connection.peer_host}:{connection.peer_port}"
        label = f"session {number} with {peer}"
        super().__init__(session, connection, device="cpu", label=label, number=number, peer=peer, observers=observers)
        self._holdings = holdings
        self._turns = turns
        self._looks = looks
        self._transports = transports
        self._relays = relays
        self._placed = placed
        self._host = connection.peer_host
        self._local_host = connection.local_host
        self._supply: Supply | None = None
        self._absent: set[int] = set()
        self._chain: tuple[str, ...] = ()
        self._holding: Holding | None = None
        self._asked = BlockQueue(_OPEN_REQUESTS, f"the client has more than {_OPEN_REQUESTS} requests open")
        self._sending = 0
        self._blocks = 0
        self._nbytes = 0

    async def run(self) -> None:
        """Serve the client to the end of its session; frees its turn whatever happens."""
        try:
            await super().run()
        finally:
            self._sending = 0
            self._asked.close()
            self._relays.leave(self)
            self._turns.leave(self)
            self._looks.leave(self)

    def info(self) -> SessionInfo:
        """A glance at the session."""
        role = "" if self._holding is None else self._holding.announcement.identity.role
        return SessionInfo(self.peer, self.session.state, role, self.session.transport, self._blocks, self._nbytes)

    @property
    def holding(self) -> Holding | None:
        """What the client is being served; None before that is known."""
        return self._holding

    @property
    def sending(self) -> bool:
        """Whether blocks are on their way right now."""
        return self._sending > 0

    def retract(self, reason: str, sources: tuple[str, ...] = ()) -> None:
        """End the session, since what it serves is to change; nothing happens when it is ending anyway.

        Args:
            reason: Told to the client.
            sources: Where it may find the same, as this server reaches it.
        """
        if self.session.state in (State.VALIDATE, State.PLAN, State.TRANSFER):
            named = tuple(seen_from(source, self._host, self._local_host) for source in sources)
            self.feed(e.NotHeld("gone", reason, hint=_ELSEWHERE, retry_after=_RETRY_GONE, sources=named))

    def stop(self, reason: str) -> None:
        """End the session, since the server stops."""
        self.retract(reason)
        self.feed(e.Cancelled(reason, "gone"))

    def perform(self, effect: f.Effect) -> None:
        """Carry out an effect of the server's side."""
        match effect:
            case f.LookUp(role, layouts):
                reply, self._holding = self._holdings.find(role, layouts)
                if self._holding is not None:
                    self._device = self._holding.device
                if isinstance(reply, e.NotHeld):
                    named = tuple(seen_from(source, self._host, self._local_host) for source in reply.sources)
                    reply = replace(reply, sources=named)
                self.feed(reply)
            case f.TakeTurn():
                self._take_turn(self._looks if self.session.probing else self._turns)
            case f.AcceptChannel(transport, peer_facts):
                self.spawn(lambda: self._accept(transport, peer_facts), lambda event: event)
            case f.CheckBlocks(ranges):
                self._check(ranges)
            case f.SendBlocks(ranges):
                self._asked.put(ranges)
            case _:
                super().perform(effect)

    def gave_up(self) -> e.Cancelled:
        """What is told to the client when the server is cancelled."""
        return e.Cancelled("the server is stopping", "gone")

    def moved(self, after: State) -> None:
        """Start the task that sends, once there is a channel."""
        if after is State.TRANSFER:
            self.spawn(lambda: self.move_blocks(self._next_send), lambda _: None)

    def _take_turn(self, turns: Admission) -> None:
        elsewhere = self._elsewhere()
        if elsewhere is not None:
            self.feed(elsewhere)
            return
        if not turns.enter(self):
            reason = f"{turns.taken} clients are being served and {turns.waiting} wait"
            hint = "raise MAX_CLIENTS on the server, or give the client more sources"
            self.feed(e.NotHeld("busy", reason, hint=hint, retry_after=_RETRY_BUSY))
            return
        self._placed()
        if turns.has(self):
            self.feed(self._turn())
        else:
            self.spawn(lambda: self._wait_for_turn(turns), lambda event: event)

    def _elsewhere(self) -> e.NotHeld | None:
        """Why the client is not served here: others pass on what it wants, or this relay has no source itself now."""
        holding, identify = self._serving(), self.session.identify
        if identify is None or identify.probe:
            return None
        supply = self._holdings.supply_of(holding)
        if supply is not None and not supply.live:
            return e.NotHeld("not-ready", "this relay is looking for a source itself", retry_after=_RETRY_RELAY)
        if identify.follow:
            relays = self._relays.instead(holding, identify.avoid, self._host, self._local_host)
            if relays:
                return e.NotHeld("busy", "others pass it on", retry_after=_RETRY_BUSY, sources=relays)
        return None

    def _turn(self) -> e.TurnTaken:
        """Serve the client from here on."""
        holding, identify = self._serving(), self.session.identify
        self._supply = supply = self._holdings.supply_of(holding)
        if identify is not None and not identify.probe:
            self._relays.join(self, holding, self._host, identify.relay)
        if supply is None:
            return e.TurnTaken()
        self._chain = supply.chain
        self.spawn(lambda: self._follow(supply), lambda event: event)
        return e.TurnTaken(supply.node, self._chain)

    async def _wait_for_turn(self, turns: Admission) -> e.Event:
        while not turns.has(self):
            self.feed(e.Queued(f"all {turns.total} turns are taken", turns.before(self)))
            with anyio.move_on_after(_QUEUE_NEWS):
                await turns.wait(self)
        if self._holding is None or not self._holdings.holds(self._holding):
            return e.NotHeld("gone", "it was retracted while the client waited", _ELSEWHERE, _RETRY_GONE)
        return self._turn()

    async def _follow(self, supply: Supply) -> None:
        """Tell the client what changes upstream, and grant what it waits for as it comes in."""
        while True:
            if supply.chain != self._chain:
                self._chain = supply.chain
                if self.session.state in (State.PLAN, State.TRANSFER):
                    self.feed(e.UpstreamChanged(self._chain))
            came = {number for number in self._absent if supply.has(number)}
            if came:
                self._absent -= came
                self._offer(came)
            patience = None if supply.live or not self._absent else _ORPHANED
            with anyio.move_on_after(patience) as scope:
                await supply.wait()
            if scope.cancelled_caught and not supply.live and self._absent:
                gone, self._absent = to_ranges(self._absent), set()
                self.feed(e.BlocksGone(gone, "this relay has lost its own source"))

    async def _accept(self, transport: str, peer_facts: dict[str, str]) -> e.Event | None:
        async def make() -> Channel:
            carrier = self._transports[transport]
            why = carrier.missing(self._device)
            if why is not None:
                raise TransportUnavailable(f"transport {transport} cannot serve this: {why}")
            pending = await carrier.offer(self.setup(peer_facts))
            try:
                self.feed(e.ChannelOffered(pending.offer))
                return await pending.accept()
            finally:
                await close_pending(pending, self.label)

        try:
            return await self.open_channel(make)
        except RefusedError as error:  # a transport that can't be used now, but later
            return e.NotHeld("busy", error.message, hint=error.hint, retry_after=error.retry_after)

    def _check(self, ranges: Ranges) -> None:
        if not self._holdings.holds(self._serving()):
            reason, sources = self._holdings.why_gone(self._serving())
            named = tuple(seen_from(source, self._host, self._local_host) for source in sources)
            self.feed(e.BlocksGone(ranges, reason, named))
            return
        numbers = set(expand(ranges))
        if self._supply is not None:
            absent = {number for number in numbers if not self._supply.has(number)}
            self._absent |= absent
            numbers -= absent
            if absent:
                self._supply.notify()  # so that the patience with an orphaned relay begins
        self._offer(numbers)

    def _offer(self, numbers: set[int]) -> None:
        """Grant blocks that are there, and say which ones are not any more."""
        holding = self._serving()
        plan = holding.announcement.plan
        if few_spans(plan, numbers):
            self._answer(numbers, holding.memory.missing(plan, sorted(numbers)))
            return
        self.spawn(lambda: self._offer_in_parts(holding, numbers), lambda _: None)

    async def _offer_in_parts(self, holding: Holding, numbers: set[int]) -> None:
        """The same beside the event loop, for blocks of many pieces; the first ones are granted while others wait."""
        plan, memory = holding.announcement.plan, holding.memory
        for part in groups(plan, sorted(numbers)):
            self._answer(set(part), await looked_up(memory.missing, plan, part))

    def _answer(self, numbers: set[int], lost: dict[int, str]) -> None:
        ready = to_ranges(numbers - set(lost))
        if ready:
            self.feed(e.BlocksReady(ready))
        if lost:
            self.feed(e.BlocksGone(to_ranges(lost), next(iter(lost.values()))))

    async def _next_send(self) -> Move | None:
        """The next call that sends, of what was granted to the client; waits for it."""
        holding = self._serving()
        if not await self._asked.wait():
            return None
        if not self._holdings.holds(holding):
            self._asked.drop()
            return partial(self._say_gone, *self._holdings.why_gone(holding))
        batch = self._asked.take(holding.announcement.plan, _SEND_BYTES)
        self._sending += 1
        try:
            views = await looked_up(holding.memory.views, holding.announcement.plan, batch)
        except ManifestError as error:  # granted, and dropped by their owner since
            self._sending -= 1
            self._asked.drop()
            return partial(self._say_gone, error.message)
        except BaseException:
            self._sending -= 1
            raise
        return partial(self._send, batch, views)

    async def _say_gone(self, reason: str, sources: tuple[str, ...] = ()) -> Callable[[], None]:
        """Nothing to send any more. What is on its way arrives."""
        return lambda: self.retract(reason, sources)

    async def _send(self, batch: list[int], views: Sequence[BlockView]) -> Callable[[], None]:
        try:
            await self.channel().send(views)
        finally:
            self._sending -= 1
        nbytes = sum(view.nbytes for view in views)

        def account() -> None:
            self._blocks += len(batch)
            self._nbytes += nbytes
            self.feed(e.BlocksSent(to_ranges(batch)))

        return account

    def _serving(self) -> Holding:
        if self._holding is None:
            raise LocalProtocolError("blocks were asked for before anything was found")
        return self._holding
