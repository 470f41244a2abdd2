"""The server side of one session: carries out the effects of its state machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial

import anyio

from netloader.core.addresses import Address, seen_from
from netloader.core.messages import ClientMessage
from netloader.core.plan import Ranges, expand, to_ranges
from netloader.core.protocol import FINAL, Session, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.transfer import TELLS_BLOCKS
from netloader.errors import (
    LocalProtocolError,
    RefusedError,
    TransportUnavailable,
)
from netloader.observe.base import Observers
from netloader.observe.events import BlocksSent
from netloader.server.admission import Admission
from netloader.server.bandwidth import Bandwidth
from netloader.server.budgets import Stage
from netloader.server.catalog import Holdings, announced_bytes
from netloader.server.offers import SentBlocks, tell_blocks, tell_sent
from netloader.server.redirects import Redirects
from netloader.server.relay_check import RelayCheck
from netloader.server.sending import Batch, Gone, Sending
from netloader.server.session_info import SessionInfo
from netloader.session.block_queue import BlockQueue, groups
from netloader.session.closing import close_pending
from netloader.session.connection import ControlConnection
from netloader.session.driver import ChannelCall, SessionDriver
from netloader.session.holding import Holding
from netloader.session.off_loop import few_spans, look_up
from netloader.session.relay_progress import Supply
from netloader.transports.base import Channel, Transport

__all__ = ["ServerSession"]

_QUEUE_UPDATE = 5.0
"""Seconds between two messages to a client that waits for its turn."""

_RETRY_RELAY = 0.2
"""Seconds after which a client may ask a relay again that has no source itself."""

_ORPHAN_WAIT = 5.0
"""Seconds that the clients of a relay wait after it lost its source, until it finds another one."""

_ORPHAN = "this relay has lost its own source"

_RETRY_GONE = 5.0
"""Seconds after which a client of retracted weights may ask again."""

_RETRY_BUSY = 5.0
"""Seconds after which a client that was redirected, or found the queue full, may ask again."""

_SHARES = 4
"""Clients that a server serves of those that pull from others already: more would only divide its link further."""

_RETRY_SHARE = 1.0
"""Seconds after which such a client may ask again."""

_RELAY_DECISION = 1.0
"""Most seconds that a new client waits until it is known whether a client that is being served is a relay."""
_RETRY_FULL = 1.0
"""Seconds after which a client may come again that was turned away because too many are connected."""

_RETURN_WAIT = 90.0
"""Seconds that a client waits for a channel that was slow to answer the announcement. It waits for the offer meanwhile,
and its deadline for that is 120 s from the announcement."""

_OPEN_REQUESTS = 4096
"""Most requests that one client may have open."""

_OTHER_SOURCE = "pull from another source"


class ServerSession(SessionDriver[ClientMessage]):
    """The session with one client.

    Args:
        session: A fresh server session.
        connection: The client's control connection.
        holdings: The catalog of the server.
        turns: Admission of pulls.
        bandwidth: Limit for what all sessions send.
        transports: Transports by name.
        number: Number of the session at this server.
        observers: Receive the events of the session.
        relays: Decides whether a client is redirected.
        check: Finds out whether the client is a relay.
        account: Called when the connection is for something else from now on.
    """

    def __init__(
        self,
        session: Session,
        connection: ControlConnection[ClientMessage],
        *,
        holdings: Holdings,
        turns: Admission,
        bandwidth: Bandwidth,
        transports: Mapping[str, Transport],
        number: int,
        observers: Observers,
        relays: Redirects,
        check: RelayCheck,
        account: Callable[[Stage], None],
    ) -> None:
        peer = f"{connection.peer_host}:{connection.peer_port}"
        label = f"session {number} with {peer}"
        super().__init__(session, connection, device="cpu", label=label, number=number, peer=peer, observers=observers)
        self._holdings = holdings
        self._turns = turns
        self._bandwidth = bandwidth
        self._transports = transports
        self._relays = relays
        self._check_relay = check
        self._relay_checked = False
        self._account = account
        self._host = connection.peer_host
        self._local_host = connection.local_host
        self._supply: Supply | None = None
        self._absent: set[int] = set()
        self._chain: tuple[str, ...] = ()
        self._partial = False
        self._own = SentBlocks()
        self._holding: Holding | None = None
        granted = BlockQueue(_OPEN_REQUESTS, f"the client has more than {_OPEN_REQUESTS} requests open")
        self._sending = Sending(self, holdings, turns, bandwidth, granted, self._note_absent)

    async def run(self) -> None:
        """Serve the client to the end of its session. Its turn is freed in any case."""
        try:
            await super().run()
        finally:
            self._sending.close()
            self._free_turn()

    def _free_turn(self) -> None:
        """Free the turn and the place among the relays. Idempotent."""
        self._relays.leave(self)
        self._turns.leave(self, time.monotonic())
        self._bandwidth.leave(self)

    def info(self) -> SessionInfo:
        """A snapshot of the session."""
        role = "" if self._holding is None else self._holding.announcement.identity.role
        blocks, nbytes = self._sending.so_far(all_arrived=self._ended_well())
        unfinished = 0 if self._ended_well() else self._sending.unfinished
        return SessionInfo(self.peer, self.session.state, role, self.session.transport, blocks, nbytes, unfinished)

    def _ended_well(self) -> bool:
        """Whether the client has all blocks, although the call that sent the last ones may not have returned."""
        return self.session.state in (State.FINALIZE, State.DONE)

    def tell_sent(self) -> None:
        """Emit an event for the blocks that were sent since the last one."""
        blocks, nbytes = self._sending.news(all_arrived=self._ended_well())
        if blocks:
            self._observe(BlocksSent(self.number, self.peer, self.session.transport, blocks, nbytes))

    @property
    def holding(self) -> Holding | None:
        """The holding that the client pulls; None before it asked."""
        return self._holding

    @property
    def sending(self) -> bool:
        """Whether a call of the channel is sending blocks."""
        return self._sending.calls > 0

    def retract(self, reason: str, sources: tuple[str, ...] = ()) -> None:
        """End the session because its holding is retracted. Does nothing if the session is ending already.

        Args:
            reason: Reason given to the client.
            sources: Other sources of the same weights, as this server reaches them.
        """
        if self.session.state in (State.VALIDATE, State.PLAN, State.TRANSFER):
            named = tuple(seen_from(source, self._host, self._local_host) for source in sources)
            self.feed(e.NotHeld("gone", reason, hint=_OTHER_SOURCE, retry_after=_RETRY_GONE, sources=named))

    def stop(self, reason: str) -> None:
        """End the session because the server stops."""
        self.retract(reason)
        self.feed(e.Cancelled(reason, "gone"))

    def turn_away(self, reason: str, *, quickly: bool) -> None:
        """End the session with "busy" and a time to come again. Does nothing if the session is ending already.

        Args:
            reason: Reason given to the client.
            quickly: Whether its connection is needed at once. Then the client gets very little time to read the reason.
        """
        self._account(Stage.ENDING)
        self.feed(e.NotHeld("busy", reason, hint="try again, or set WAIT on the client", retry_after=_RETRY_FULL))
        if quickly:
            self.abandon(reason, "busy")

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
                self._take_turn()
            case f.AcceptChannel(transport, peer_facts):
                self.spawn(lambda: self._accept(transport, peer_facts), lambda event: event)
            case f.CheckBlocks(ranges):
                self._check(ranges)
            case f.SendBlocks(ranges):
                self._sending.grant(ranges)
            case _:
                super().perform(effect)

    def cancellation(self) -> e.Cancelled:
        """The event that ends the session when the server is cancelled."""
        return e.Cancelled("the server is stopping", "gone")

    def state_changed(self, after: State) -> None:
        """Start the sending task when the channel is open. Free the turn at the end, however long closing takes."""
        if after is State.FINALIZE or after in FINAL:
            self._account(Stage.ENDING)
            self._free_turn()
        if after is State.TRANSFER:
            self.spawn(lambda: self.make_calls(self._next_send), lambda _: None)
            self.spawn(self._tell_blocks, lambda _: None)

    def _take_turn(self) -> None:
        if self.session.probing:  # it takes no turn: it is told what is held, and has to go before others
            self._account(Stage.PROBE)
            self.feed(self._turn())
            return
        identify = self.session.identify
        # A client that relays have failed already does not wait for another one.
        follows = identify is not None and identify.follow and not identify.avoid
        if follows and self._relays.undecided(self._serving(), self._moves):
            self._account(Stage.QUEUED)
            self.spawn(self._turn_when_decided, lambda _: None)
        else:
            self._enter()

    async def _turn_when_decided(self) -> None:
        await self._relays.decided(self._serving(), self._moves, _RELAY_DECISION)
        self._enter()

    def _enter(self) -> None:
        refusal = self._redirect()
        if refusal is not None:
            self.feed(refusal)
            return
        turns = self._turns
        if not turns.enter(self, time.monotonic(), self._host):
            reason = f"{turns.taken} clients are being served and {turns.waiting} wait"
            hint = "raise MAX_CLIENTS on the server, or give the client more sources"
            self.feed(e.NotHeld("busy", reason, hint=hint, retry_after=_RETRY_BUSY))
            return
        if turns.has(self):
            self.feed(self._turn())
        else:
            self._account(Stage.QUEUED)
            self.spawn(self._wait_for_turn, lambda event: event)

    def _redirect(self) -> e.NotHeld | None:
        """The refusal for a client that is redirected, or that asks a relay which has no source now; None otherwise."""
        holding, identify = self._serving(), self.session.identify
        if identify is None or identify.probe:
            return None
        if identify.others and self._relays.served(holding) >= _SHARES:
            return e.NotHeld("busy", f"{_SHARES} others are being served", retry_after=_RETRY_SHARE)
        supply = self._holdings.supply_of(holding)
        if supply is not None and not supply.live:
            return e.NotHeld("not-ready", "this relay is looking for a source itself", retry_after=_RETRY_RELAY)
        if identify.follow:
            relays = self._relays.relays_for(holding, identify.avoid, self._host, self._local_host, self._moves)
            if relays:
                return e.NotHeld("busy", "others pass it on", retry_after=_RETRY_BUSY, sources=relays)
        return None

    def _moves(self, session: Hashable) -> bool:
        return self._turns.moves(session, time.monotonic())

    def _turn(self) -> e.TurnTaken:
        """Begin to serve the client, which has a turn now."""
        holding, identify = self._serving(), self.session.identify
        if not self.session.probing:
            self._account(Stage.SERVED)
            self._turns.answer_takes(self, announced_bytes(holding))
        self._supply = supply = self._holdings.supply_of(holding)
        tells = self.session.protocol >= TELLS_BLOCKS
        self._partial = partial = tells and supply is not None and not supply.complete
        shared = tells and self._relays.shares(holding)
        if identify is not None and not identify.probe:
            self._relays.join(self, holding, self._host, identify.relay)
        if supply is None:
            return e.TurnTaken(shared=shared)
        self._chain = () if partial else supply.chain
        self.spawn(lambda: self._follow_upstream(supply), lambda event: event)
        return e.TurnTaken(supply.node, self._chain, partial, shared and not partial)

    async def _wait_for_turn(self) -> e.Event | None:
        turns = self._turns
        while turns.queued(self):
            self.feed(e.Queued(f"all {turns.total} turns are taken", turns.before(self)))
            with anyio.move_on_after(_QUEUE_UPDATE):
                await turns.wait(self)
        if not turns.has(self):  # the session has ended meanwhile
            return None
        if self._holding is None or not self._holdings.holds(self._holding):
            return e.NotHeld("gone", "it was retracted while the client waited", _OTHER_SOURCE, _RETRY_GONE)
        return self._turn()

    async def _follow_upstream(self, supply: Supply) -> None:
        """Report changes of the chain to the client, and grant the blocks it waits for when they are verified here."""
        while True:
            if supply.chain != self._chain and not self._partial:
                self._chain = supply.chain
                if self.session.state in (State.PLAN, State.TRANSFER):
                    self.feed(e.UpstreamChanged(self._chain))
            arrived = {number for number in self._absent if supply.has(number)}
            if arrived:
                self._absent -= arrived
                self._note_absent()
                self._grant(arrived)
            wait = None if supply.live or not self._absent else _ORPHAN_WAIT
            with anyio.move_on_after(wait) as scope:
                await supply.wait()
            if scope.cancelled_caught and not supply.live and self._absent:
                gone, self._absent = to_ranges(self._absent), set()
                self._note_absent()
                self.feed(e.BlocksGone(gone, _ORPHAN))

    async def _tell_blocks(self) -> None:
        """Tell the client which blocks there are, if this is a relay; else which were sent to others that relay."""
        if self._partial and self._supply is not None:
            if not await tell_blocks(self._supply, self.feed, lambda: self.session.asked, _ORPHAN_WAIT):
                self.retract(_ORPHAN)
        elif self._passes_on():
            await tell_sent(self._holdings.sent_of(self._serving()), self._own, self.feed)

    def _passes_on(self) -> bool:
        """Whether the client relays what it gets, and is told what others got."""
        identify = self.session.identify
        told = self.session.protocol >= TELLS_BLOCKS and not self._partial
        return told and identify is not None and identify.relay != 0

    async def _accept(self, transport: str, peer_facts: dict[str, str]) -> e.Event | None:
        async def make() -> Channel:
            carrier = self._transports[transport]
            why = carrier.missing(self._device)
            if why is not None:
                raise TransportUnavailable(f"transport {transport} cannot serve this: {why}")
            await self._take_channel()
            pending = await carrier.offer(self.setup(peer_facts))
            try:
                self.feed(e.ChannelOffered(pending.offer))
                return await pending.accept()
            finally:
                await close_pending(pending, self.label)

        try:
            return await self.open_channel(make)
        except RefusedError as error:  # the transport cannot be used now, but can be later
            return e.NotHeld("busy", error.message, hint=error.hint, retry_after=error.retry_after)

    async def _take_channel(self) -> None:
        """Take a channel; wait for one if this client was put aside and all are taken.

        Raises:
            RefusedError: None became free in time.
        """
        if not self._turns.take_channel(self, time.monotonic()):
            self._account(Stage.ASIDE)
            with anyio.move_on_after(_RETURN_WAIT):
                await self._turns.wait(self)
        if not self._turns.holds_channel(self):
            text = "others took this client's turn before it answered, and all channels are taken"
            raise RefusedError("busy", text, hint="try again, or set WAIT on the client", retry_after=_RETRY_FULL)
        self._account(Stage.SERVED)

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
            self._note_absent()
            numbers -= absent
            if absent:
                self._supply.notify()  # wakes _follow_upstream, which limits the wait for a relay without a source
        self._grant(numbers)

    def _note_absent(self) -> None:
        """Note whether the client waits for this server: for blocks that a relay does not have, or for bandwidth."""
        self._turns.excuse(self, time.monotonic(), excused=bool(self._absent) or self._sending.waiting)

    def _grant(self, numbers: set[int]) -> None:
        """Grant the blocks that can be served, and report the others as gone."""
        holding = self._serving()
        plan = holding.announcement.plan
        if few_spans(plan, numbers):
            self._answer(numbers, holding.memory.missing(plan, sorted(numbers)))
            return
        self.spawn(lambda: self._grant_in_parts(holding, numbers), lambda _: None)

    async def _grant_in_parts(self, holding: Holding, numbers: set[int]) -> None:
        """The same in a thread, for blocks of many spans. Each group is answered when it has been looked up."""
        plan, memory = holding.announcement.plan, holding.memory
        for part in groups(plan, sorted(numbers)):
            self._answer(set(part), await look_up(memory.missing, plan, part))

    def _answer(self, numbers: set[int], lost: dict[int, str]) -> None:
        ready = to_ranges(numbers - set(lost))
        if ready:
            self.feed(e.BlocksReady(ready))
            if self._passes_on():
                self._own.add(ready)
                self._holdings.sent_of(self._serving()).add(ready)
        if lost:
            self.feed(e.BlocksGone(to_ranges(lost), next(iter(lost.values()))))

    async def _next_send(self) -> ChannelCall | None:
        """Wait for granted blocks, and return the call that sends the next of them; None at the end of the session."""
        found = await self._sending.following(self._serving())
        if isinstance(found, Gone):
            return partial(self._report_gone, found)
        return None if found is None else partial(self._send, found)

    async def _report_gone(self, gone: Gone) -> Callable[[], None]:
        """A call that sends nothing and then ends the session. Sends in progress complete first."""
        return lambda: self.retract(gone.reason, gone.sources)

    async def _send(self, batch: Batch) -> Callable[[], None]:
        self._begin_relay_check()
        self._sending.began(batch)
        try:
            await self.channel().send(batch.views)
        finally:
            self._sending.returned()

        def account() -> None:
            self._sending.ended(batch)
            self.tell_sent()
            self.feed(e.BlocksSent(to_ranges(batch.numbers)))

        return account

    def _begin_relay_check(self) -> None:
        """The client gets its first blocks: if it says that it relays, find out whether it does."""
        identify = self.session.identify
        if self._relay_checked or identify is None or not identify.relay:
            return
        self._relay_checked = True
        address, known = Address(self._host, identify.relay), self._serving().announcement

        async def check() -> None:
            is_relay = await self._check_relay.is_relay(address, identify.node, known, self.label)
            (self._relays.confirm if is_relay else self._relays.deny)(self)

        self.spawn(check, lambda _: None)

    def _serving(self) -> Holding:
        if self._holding is None:
            raise LocalProtocolError("blocks were asked for before anything was found")
        return self._holding
