"""The decisions of a pull, as a state machine without I/O.

It decides which source to try next, which blocks to request from which source, when to wait, when to end the session
with a slow source, and when to give up. :meth:`Pull.handle` takes an event and the time, and returns commands, which
:mod:`netloader.client.pull` carries out. The machine opens no socket and reads no clock: the time and the random
generator are arguments.

All sessions share one ledger. Striping, taking over from a slow source, and continuing after a source failed are the
same operation: blocks move between pending and in flight. Once every block is verified, the pull waits for no source.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from netloader.core import pull_events as p
from netloader.core.addresses import Address, valid_addresses
from netloader.core.block_order import BlockOrder
from netloader.core.ledger import Ledger
from netloader.core.messages import MAX_SOURCES
from netloader.core.options import PullOptions
from netloader.core.pull_pinning import Pinning
from netloader.core.pull_requests import Requests
from netloader.core.pull_state import Failures, SessionState
from netloader.core.redirect_budget import RedirectBudget
from netloader.core.report import SourceShare
from netloader.core.sources import MAX_KNOWN, Source, Sources
from netloader.errors import (
    AttemptFailed,
    DigestMismatch,
    DiscoveryError,
    LocalProtocolError,
    MemoryStillInUse,
    NetloaderError,
    NoSourceLeft,
    PeerLost,
    RefusedError,
    TransferTimeout,
    TransportUnavailable,
    next_step,
)

__all__ = ["Pull"]

_POLITE_SECONDS = 3.0
"""Seconds for which a pull that finds many sources goes on to the next one where enough others are served already."""

_TOO_SLOW = "this relay delivers too little, and its server can serve instead"


class Pull:
    """One pull.

    Args:
        sources: Where to pull from, in the order to try; more may be found.
        options: How the pull behaves.
        rng: Randomises pauses, so that clients that wait for one source don't all retry at once.
        began: When the pull began.
        adopts: Whether memory is allocated for what the first source announces.
        listing: Seconds that finding the first sources may take; None when none will be found.

    Attributes:
        ledger: The state of every block.
        shares: What each source gave, by address, in the order of first use.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        options: PullOptions,
        rng: random.Random,
        *,
        began: float = 0.0,
        adopts: bool = False,
        listing: float | None = None,
    ) -> None:
        self.ledger = Ledger(options.expect_root, "EXPECT_ROOT" if options.expect_root else "")
        self.shares: dict[str, SourceShare] = {}
        self._options = options
        self._began = began
        until, hops, here = began + options.wait, options.max_hops, options.here
        self._sources = Sources(sources, tries=options.tries, until=until, rng=rng, max_hops=hops, here=here)
        self._budget = RedirectBudget()
        self._pinning = Pinning(self.ledger, adopts=adopts)
        searching = -math.inf if listing is None else max(options.wait, listing)
        self._search_until = began + searching  # until then having no source left is no end
        self._left_out = False
        self._sessions: dict[int, SessionState] = {}
        self._order = BlockOrder(rng)
        self._requests = Requests(self.ledger, self._order, self._sessions, self.shares, self._budget)
        self._session_count = 0
        self._unfit: dict[Address, set[str]] = {}
        self._failures = Failures()
        self._over = False
        self._total: int | None = None  # bytes of what was announced last
        self._last_source = ""

    # --- queries ----------------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether Succeed or Fail was returned."""
        return self._over

    @property
    def retries(self) -> int:
        """Number of failed attempts."""
        return self._failures.retries

    @property
    def attempts(self) -> tuple[AttemptFailed, ...]:
        """The failed attempts, one entry for each source and kind of failure."""
        return tuple(self._failures.by_kind.values())

    def wake_at(self, now: float) -> float | None:
        """When TimerFired is due, unless another event comes first; None when no timer is needed."""
        if self._over:
            return None
        due = [] if self._waits_for_first() or self._full() else [self._next_source(now)]
        plan = self.ledger.plan
        if not self._sessions and due == [None]:
            due = [self._search_until]
        if plan is not None:
            due += self._requests.overdue_times(plan)
        starved = self._requests.starved_until()
        if starved is not None and self._full() and (spare := self._next_source(now)) is not None:
            due.append(max(starved, spare))
        due.append(self._budget.ends_at)
        times = [at for at in due if at is not None]
        return min(times) if times else None

    # --- events -----------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[p.Command]:
        """The first commands."""
        return list(self._advance(now))

    def handle(self, event: p.Event, now: float) -> list[p.Command]:
        """Take one event.

        Args:
            event: What happened.
            now: Time of the event, on a monotonic clock.

        Returns:
            The commands, in order.
        """
        commands = [*self._apply(event, now)]
        if not self._over:
            commands += self._advance(now)
        return commands

    def _apply(self, event: p.Event, now: float) -> Iterator[p.Command]:
        match event:
            case p.SourcesFound() | p.SourceLost() | p.Listed() | p.SearchEnded():
                yield from self._of_search(event)
            case p.DeadlinePassed(seconds):
                yield from self._deadline_passed(seconds)
            case p.TimerFired():
                yield from self._requests.leave_slow_ones(now)
            case p.SessionEnded():
                session = self._sessions.pop(event.session, None)
                if session is not None:
                    session.ended = True
                    yield from self._ended(session, event, now)
            case p.MemoryAllocated(_, error):
                yield from self._pinning.allocated(error)
            case _:
                session = self._sessions.get(event.session)
                if session is not None:
                    yield from self._session_event(session, event, now)

    def _of_search(self, event: p.SourcesFound | p.SourceLost | p.Listed | p.SearchEnded) -> Iterator[p.Command]:
        match event:
            case p.SourcesFound(sources):
                if self._sources.add(sources) and not self._left_out:
                    self._left_out = True
                    yield p.Log("warning", f"{MAX_KNOWN} sources are known: more are left out until some are gone")
            case p.SourceLost(source):
                self._sources.lose(source)
            case p.Listed():
                self._search_until = min(self._search_until, self._began + self._options.wait)
            case p.SearchEnded(error):
                self._search_until = -math.inf
                if error is not None:
                    yield self._search_failed(error)

    def _session_event(
        self,
        session: SessionState,
        event: p.SessionStarted
        | p.SessionQueued
        | p.HoldingAnnounced
        | p.SessionReady
        | p.SessionIdle
        | p.BlocksDenied
        | p.BlocksOffered
        | p.BlocksArrived,
        now: float,
    ) -> Iterator[p.Command]:
        match event:
            case p.SessionStarted():
                session.reached = True
                self.shares.setdefault(str(session.source), SourceShare())
                if session.abandoned:  # while it was being connected
                    yield p.LeaveSource(session.number, _TOO_SLOW)
            case p.SessionQueued():
                session.queued = True
            case p.HoldingAnnounced(_, announcement, partial, shared):
                session.queued = False
                self._order.begin(session.number, partial=partial, shared=shared)
                yield from self._pinning.announced(session, announcement)
            case p.SessionReady():
                session.open = True
                session.began = session.moved = now
            case p.SessionIdle():
                yield from self._requests.give_work(session, now)
            case p.BlocksDenied(_, ranges, reason, sources):
                session.denied, session.elsewhere = reason or "it did not say why", sources
                self.ledger.give_back(session.number, ranges)
            case p.BlocksOffered(_, has, sent):
                self._order.has(session.number, has)
                self._order.sent(session.number, sent)
                if session.open and self.ledger.in_flight_bytes(session.number):
                    yield from self._requests.request(session)
            case p.BlocksArrived(_, blocks):
                yield from self._landed(session, blocks, now)
                # Request more blocks before the session runs out of them.
                if self.ledger.in_flight_bytes(session.number):
                    yield from self._requests.request(session)

    def _advance(self, now: float) -> Iterator[p.Command]:
        """Act on the current state: finish, give work to parked sessions, connect to more sources, or give up."""
        if self.ledger.complete:
            yield from self._complete()
            return
        yield from self._spend(now)
        yield from self._feed_parked(now)
        while not (self._full() or self._waits_for_first()):
            source = self._sources.take(now, work=self._work)
            if source is None:
                break
            yield self._connect(source, now)
        starved = self._requests.starved_until()
        if starved is not None and starved <= now and self._full() and self._next_source(now) == now:
            yield from self._requests.leave_starved(now)
        yield from self._spend(now)
        if not self._sessions and now >= self._search_until and self._next_source(now) is None:
            if not self._session_count and self._search_until > -math.inf:
                none = f"no source appeared within {now - self._began:.3g} s"
                yield self._search_failed(DiscoveryError(none))
            yield from self._fail(self._failures.advice(self._options.wait))

    def _feed_parked(self, now: float) -> Iterator[p.Command]:
        """Give blocks that are pending again to parked sessions."""
        for session in [s for s in self._sessions.values() if s.parked]:
            yield from self._requests.give_work(session, now)

    @property
    def _work(self) -> bool:
        """Whether another source would have something to do."""
        return self.ledger.plan is None or self.ledger.idle

    def _next_source(self, now: float) -> float | None:
        """When there is a source to try."""
        return self._sources.next_due(now, work=self._work)

    def _full(self) -> bool:
        return sum(not s.abandoned for s in self._sessions.values()) >= max(1, self._options.stripe)

    def _waits_for_first(self) -> bool:
        """Whether a second source has to wait.

        The first accepted source decides the root, so until then sources are tried one at a time. A source that only
        keeps this client in its queue does not hold up the next one.
        """
        return self.ledger.plan is None and any(not (s.queued or s.abandoned) for s in self._sessions.values())

    def _connect(self, source: Address, now: float) -> p.Connect:
        self._session_count += 1
        self._last_source = str(source)
        labels, named_by = self._sources.told_of(source)
        self._sessions[self._session_count] = session = SessionState(
            self._session_count, source, relay=named_by is not None
        )
        self._pinning.constrain(session)
        finds = self._search_until > -math.inf and self._sources.several
        polite = self._order.differs or (finds and now < self._began + _POLITE_SECONDS)
        return p.Connect(
            self._session_count,
            source,
            root=self.ledger.root,
            pinned_by=self.ledger.pinned_by,
            avoid=tuple(str(address) for address in self._sources.avoid[-MAX_SOURCES:]),
            unfit=frozenset(self._unfit.get(source, ())),
            labels=labels,
            named_by=named_by,
            follow=self._options.follow and self._sources.follow and not (finds or self._order.differs),
            others=polite,
        )

    # --- relays -----------------------------------------------------------------------------------------------------

    def _spend(self, now: float) -> Iterator[p.Command]:
        """Account for the time that relays take, and leave all of them once it is used up."""
        relays = [s for s in self._sessions.values() if s.relay and not s.abandoned]
        idle = bool(relays) and all(s.parked for s in relays) and not self._requests.starved()
        running = not (idle or self._pinning.allocating) and self._sources.could_serve_instead
        self._budget.run(running=running, now=now)
        if not self._budget.used_up(now):
            return
        self._sources.leave_relays()
        yield p.Log("warning", "the relays delivered too little: from now on the servers that named them are asked")
        for session in relays:
            session.leaving = session.abandoned = True
            yield p.LeaveSource(session.number, _TOO_SLOW)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _landed(self, session: SessionState, blocks: Sequence[tuple[int, bytes]], now: float) -> Iterator[p.Command]:
        plan = self.ledger.plan
        if plan is None:
            raise LocalProtocolError("blocks landed before a plan was agreed")
        share = self.shares.setdefault(str(session.source), SourceShare())
        for number, digest in blocks:
            self.ledger.received(session.number, number)
            try:
                self.ledger.verify(session.number, number, digest)
            except DigestMismatch as error:  # the block is pending again, for other sessions
                session.leaving = True
                yield p.Reject(session.number, error)
                continue
            nbytes = plan.blocks[number].nbytes
            session.blocks += 1
            session.nbytes += nbytes
            share.blocks += 1
            share.nbytes += nbytes
            if session.relay:
                self._budget.earn(nbytes, plan.block_bytes)
            if self.ledger.verified_blocks == 1:
                self._budget.begun()
                self._sources.drop_held()
                yield from self._pinning.proven()
        session.moved = now

    # --- ends -------------------------------------------------------------------------------------------------------

    def _complete(self) -> Iterator[p.Command]:
        self._over = True
        for session in self._sessions.values():
            if session.open and not session.finished and not session.leaving:
                yield self._requests.finish(session)
            elif not session.open:
                session.dismissed = True
                yield p.CancelSession(session.number)
        yield p.Succeed()

    def _fail(self, advice: str = "") -> Iterator[p.Command]:
        self._over = True
        verified, total = self.ledger.verified_bytes, self.ledger.total_bytes or self._total
        yield p.Fail(NoSourceLeft(self.attempts, verified=verified, total=total, advice=advice))

    def _deadline_passed(self, seconds: float) -> Iterator[p.Command]:
        late = TransferTimeout(f"the pull did not end within {seconds:g} s", hint="raise TIMEOUT")
        yield self._failed(self._last_source or "all sources", late)
        yield from self._fail()

    def _ended(self, session: SessionState, event: p.SessionEnded, now: float) -> Iterator[p.Command]:
        """A session ended: decide what to do with its source."""
        source, error = session.source, event.error
        self.ledger.lose(session.number)
        self._order.end(session.number)
        self._total = self.ledger.total_bytes or self._total
        if isinstance(error, MemoryStillInUse):  # no source may fill this memory, and it must not be freed
            self._over = True
            yield p.Fail(error)
            return
        pins = self._pinning.pins
        yield from self._pinning.ended(session)
        if self._pinning.pins != pins:
            self._sources.try_held(now)
        if event.transport:
            self.shares.setdefault(str(source), SourceShare()).transport = event.transport
        if self._over:
            if error is not None and not session.dismissed:
                yield self._failed(source, error)
            return
        if error is None and session.denied and not self.ledger.complete:
            text = f"it could not give every block: {session.denied}"
            hint = "add a source that holds all of them"
            error = RefusedError("gone", text, hint=hint, sources=session.elsewhere)
            error.story = event.story
        dead = isinstance(error, PeerLost) and not session.reached and bool(self._sources.generation_of(source))
        if session.abandoned or dead:
            yield self._failed(source, error or NetloaderError(_TOO_SLOW))
            self._sources.drop(source)
            return
        if self._other_transport_may_work(event):
            self._unfit.setdefault(source, set()).add(event.transport)
            yield p.Log("warning", f"source {source}: not by {event.transport}: {error}")
            yield self._connect(source, now)
            return
        if error is None:
            self._sources.rest(source, now, last=session.starved)
            return
        if self._requests.taken_over(session, error.message):  # not a failure: it stays the last resort
            yield self._failed(source, error)
            self._sources.demote(source, now)
            return
        if self._pinning.concerns(session, error):
            yield self._failed(source, error)
            self._sources.hold(source, now, until_unpinned=session.pin == self._pinning.pins)
            return
        yield from self._handle_failure(source, error, now, progressed=session.blocks > 0)

    @staticmethod
    def _other_transport_may_work(event: p.SessionEnded) -> bool:
        """Whether the chosen transport could not be set up, and another one may work."""
        error = event.error
        unfit = isinstance(error, TransportUnavailable) or (
            isinstance(error, RefusedError) and error.code == "transport"
        )
        return unfit and bool(event.transport) and event.others and not event.opened

    def _handle_failure(
        self, source: Address, error: NetloaderError, now: float, *, progressed: bool
    ) -> Iterator[p.Command]:
        retry_after = error.retry_after if isinstance(error, RefusedError) else None
        if isinstance(error, RefusedError) and error.sources:
            named = list(valid_addresses(error.sources))
            others = ", ".join(map(str, named))
            if error.code == "gone":
                yield p.Log("info", f"source {source}: {error.message}; it had them from {others}")
                yield self._failed(source, error)
                self._sources.gone(source, named, now, retry_after)
                return
            if self._sources.redirect(source, named, now):
                yield p.Log("info", f"source {source}: {error.message}; going on to {others}")
                return
        yield self._failed(source, error)
        code = error.code if isinstance(error, RefusedError) else ""
        if self._sources.can_be_spared(source) and (code == "gone" or isinstance(error, PeerLost)):
            # A relay that its server named has gone. Retrying it would only delay asking that server again.
            self._sources.drop(source)
            return
        match next_step(error, progressed=progressed):
            case "later":
                # Others come and go where replicas pull from each other: there is room again soon.
                busy, steady = code == "busy", code == "busy" and self._order.differs
                self._sources.later(source, now, retry_after, put_off=progressed and busy, steady=steady)
            case "again":
                self._sources.again(source, now)
            case "last":
                self._sources.again(source, now, last=True)
            case "drop":
                self._sources.drop(source)

    def _search_failed(self, error: DiscoveryError) -> p.Log:
        """Account for a search that brings no more sources: what is known stays."""
        self._failures.add("discovery", error)
        return p.Log("warning", f"discovery: {error}")

    def _failed(self, source: Address | str, error: NetloaderError) -> p.Log:
        """Count a failed attempt. Only the first of its kind is a warning, because retries repeat the same error."""
        generation = self._sources.generation_of(source) if isinstance(source, Address) else ""
        first = self._failures.add(str(source), error, generation)
        return p.Log("warning" if first else "debug", f"source {AttemptFailed(str(source), error)}")
