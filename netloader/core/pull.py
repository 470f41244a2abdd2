"""The decisions of a pull: which source next, what to ask of whom, when to wait, to leave, to give up. Pure.

:meth:`Pull.handle` is told what happened and when, and says what is to be done. It opens no socket and knows no clock:
time is an argument, chance a generator that is handed over. Who carries it out is :mod:`netloader.client.pull`.

The ledger stands above the sessions: striping over several sources, taking over from one that is slow, and going on
where one died are nothing but blocks that move between pending and in flight. Nothing waits for a source once every
block is verified.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from netloader.core import pull_moves as p
from netloader.core.addresses import Address, valid_addresses
from netloader.core.ledger import Ledger
from netloader.core.messages import MAX_SOURCES, Outcome
from netloader.core.options import PullOptions
from netloader.core.protocol.events import Announcement
from netloader.core.pull_state import Failures, SessionState
from netloader.core.report import SourceShare
from netloader.core.sources import MAX_KNOWN, Source, Sources
from netloader.errors import (
    AttemptFailed,
    DigestMismatch,
    DiscoveryError,
    LocalProtocolError,
    ManifestError,
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

_REQUEST_PART = 2
"""Part of a window that has to be free before more is asked for: how often a source is given more."""

_TAKEN_OVER = "its blocks are taken over by faster sources"


class Pull:
    """One pull.

    Args:
        sources: Where to pull from, in the order to try; more may be found.
        options: How it behaves.
        chance: Spreads the pauses of clients that wait for one source.
        began: When it began.
        adopts: It has no memory yet, and takes what the first source announces.
        listing: Seconds that finding the first sources may take; None when none will be found.

    Attributes:
        ledger: The account of blocks.
        shares: What each source gave, by address, in the order of first use.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        options: PullOptions,
        chance: random.Random,
        *,
        began: float = 0.0,
        adopts: bool = False,
        listing: float | None = None,
    ) -> None:
        self.ledger = Ledger(options.expect_root, "EXPECT_ROOT" if options.expect_root else "")
        self.shares: dict[str, SourceShare] = {}
        self._options = options
        self._began = began
        self._sources = Sources(sources, tries=options.tries, until=began + options.wait, chance=chance)
        searching = -math.inf if listing is None else max(options.wait, listing)
        self._search_until = began + searching  # until then having no source left is no end
        self._left_out = False
        self._sessions: dict[int, SessionState] = {}
        self._count = 0
        self._unfit: dict[Address, set[str]] = {}
        self._failures = Failures()
        self._adopts = adopts
        self._adopted = ""  # digest of the manifest that memory was provided for
        self._allocating: SessionState | None = None
        self._to_pin: list[tuple[SessionState, Announcement]] = []
        self._over = False
        self._last = ""

    # --- what can be asked ------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether Done or Failed was said."""
        return self._over

    @property
    def retries(self) -> int:
        """Tries that failed."""
        return self._failures.retries

    @property
    def attempts(self) -> tuple[AttemptFailed, ...]:
        """How they failed, once for each source and kind of failure."""
        return tuple(self._failures.by_kind.values())

    def wake_at(self, now: float) -> float | None:
        """When Moment has to be told, if nothing else happens before; None when time alone changes nothing."""
        if self._over:
            return None
        due = [] if self._first_is_alone() or self._full() else [self._sources.next_due(now)]
        plan = self.ledger.plan
        if not self._sessions and due == [None]:
            due = [self._search_until]
        if plan is not None and any(s.parked for s in self._sessions.values()):
            due += [s.overdue_at(plan) for s in self._moving()]
        times = [at for at in due if at is not None]
        return min(times) if times else None

    # --- what happens -----------------------------------------------------------------------------------------------

    def begin(self, now: float) -> list[p.Command]:
        """The first moves."""
        return list(self._go_on(now))

    def handle(self, event: p.Event, now: float) -> list[p.Command]:
        """Take one event.

        Args:
            event: What happened.
            now: When, on any clock that does not go backwards.

        Returns:
            What is to be done, in order.
        """
        commands = [*self._react(event, now)]
        if not self._over:
            commands += self._go_on(now)
        return commands

    def _react(self, event: p.Event, now: float) -> Iterator[p.Command]:
        match event:
            case p.Found() | p.Lost() | p.Listed() | p.SearchEnded():
                yield from self._of_search(event)
            case p.TimeIsUp(seconds):
                yield from self._time_is_up(seconds)
            case p.Moment():
                yield from self._leave_slow_ones(now)
            case p.Ended():
                session = self._sessions.pop(event.session, None)
                if session is not None:
                    yield from self._ended(session, event, now)
            case p.Adopted(number, error):
                yield from self._allocated(self._sessions.get(number), error)
            case _:
                session = self._sessions.get(event.session)
                if session is not None:
                    yield from self._of_session(session, event, now)

    def _of_search(self, event: p.Found | p.Lost | p.Listed | p.SearchEnded) -> Iterator[p.Command]:
        match event:
            case p.Found(sources):
                if self._sources.add(sources) and not self._left_out:
                    self._left_out = True
                    yield p.Log("warning", f"{MAX_KNOWN} sources are known: more are left out until some are gone")
            case p.Lost(source):
                self._sources.lose(source)
            case p.Listed():
                self._search_until = min(self._search_until, self._began + self._options.wait)
            case p.SearchEnded(error):
                self._search_until = -math.inf
                if error is not None:
                    yield self._search_failed(error)

    def _of_session(
        self,
        session: SessionState,
        event: p.Connected | p.Queued | p.Announced | p.Opened | p.WantsWork | p.Denied | p.Landed,
        now: float,
    ) -> Iterator[p.Command]:
        match event:
            case p.Connected():
                self.shares.setdefault(str(session.source), SourceShare())
            case p.Queued():
                session.queued = True
            case p.Announced(_, announcement):
                session.queued = False
                self._to_pin.append((session, announcement))
                yield from self._pin_next()
            case p.Opened():
                session.open = True
                session.began = session.moved = now
            case p.WantsWork():
                yield from self._give_work(session, now)
            case p.Denied(_, ranges, reason, sources):
                session.denied, session.elsewhere = reason or "it did not say why", sources
                self.ledger.give_back(session.number, ranges)
            case p.Landed(_, blocks):
                yield from self._landed(session, blocks, now)
                # A fast source is asked for more before it has nothing to do.
                if self.ledger.in_flight_bytes(session.number):
                    yield from self._ask(session)

    def _go_on(self, now: float) -> Iterator[p.Command]:
        """What follows from where things stand: finish, wake the parked, connect, or give up."""
        if self.ledger.complete:
            yield from self._complete()
            return
        yield from self._wake(now)
        while not (self._full() or self._first_is_alone()):
            source = self._sources.take(now, work=self.ledger.plan is None or self.ledger.idle)
            if source is None:
                break
            yield self._connect(source)
        if not self._sessions and now >= self._search_until and self._sources.next_due(now) is None:
            if not self._count and self._search_until > -math.inf:
                none = f"no source appeared within {now - self._began:.3g} s"
                yield self._search_failed(DiscoveryError(none, hint="raise WAIT"))
            yield from self._fail()

    def _wake(self, now: float) -> Iterator[p.Command]:
        """Blocks may be pending again: give them to who has nothing to do."""
        for session in [s for s in self._sessions.values() if s.parked]:
            yield from self._give_work(session, now)

    def _full(self) -> bool:
        return len(self._sessions) >= max(1, self._options.stripe)

    def _first_is_alone(self) -> bool:
        """Before one is accepted there is one at a time, unless it lets us wait: the first one decides the root."""
        return self.ledger.plan is None and any(not session.queued for session in self._sessions.values())

    def _connect(self, source: Address) -> p.Connect:
        self._count += 1
        self._last = str(source)
        self._sessions[self._count] = SessionState(self._count, source)
        labels, named_by = self._sources.told_of(source)
        return p.Connect(
            self._count,
            source,
            root=self.ledger.root,
            pinned_by=self.ledger.pinned_by,
            avoid=tuple(str(address) for address in self._sources.avoid[-MAX_SOURCES:]),
            unfit=frozenset(self._unfit.get(source, ())),
            labels=labels,
            named_by=named_by,
        )

    # --- pinning ----------------------------------------------------------------------------------------------------

    def _pin_next(self) -> Iterator[p.Command]:
        """Accept or refuse what was announced, one source after the other: the first decides for all."""
        while self._to_pin and self._allocating is None:
            session, announcement = self._to_pin[0]
            if session.number not in self._sessions:
                self._to_pin.pop(0)
                continue
            if self._adopts:
                self._allocating = session
                yield p.Allocate(session.number, announcement.manifest)
                return
            self._to_pin.pop(0)
            yield from self._pin(session, announcement)

    def _allocated(self, session: SessionState | None, error: NetloaderError | None) -> Iterator[p.Command]:
        if self._allocating is None:
            raise LocalProtocolError("memory was provided that nobody asked for")
        self._allocating = None
        asked, announcement = self._to_pin[0]
        if error is None:
            self._adopts, self._adopted = False, announcement.manifest_digest
        elif session is asked:
            self._to_pin.pop(0)
            yield p.Refuse(asked.number, error)
        yield from self._pin_next()

    def _pin(self, session: SessionState, announcement: Announcement) -> Iterator[p.Command]:
        first = self.ledger.plan is None
        try:
            if self._adopted and announcement.manifest_digest != self._adopted:
                raise ManifestError(
                    "the source holds other tensors than those that memory was provided for",
                    hint="give sources of one checkpoint only",
                )
            self.ledger.pin(announcement.root, announcement.plan, announcement.digests, str(session.source))
        except NetloaderError as error:
            yield p.Refuse(session.number, error)
            return
        yield p.Accept(session.number)
        if first:
            yield p.PassOn(announcement)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _moving(self) -> list[SessionState]:
        """Sessions that fetch blocks."""
        return [
            s
            for s in self._sessions.values()
            if s.open and not (s.parked or s.leaving) and self.ledger.in_flight_bytes(s.number)
        ]

    def _landed(self, session: SessionState, blocks: Sequence[tuple[int, bytes]], now: float) -> Iterator[p.Command]:
        plan = self.ledger.plan
        if plan is None:
            raise LocalProtocolError("blocks landed before a plan was agreed")
        share = self.shares.setdefault(str(session.source), SourceShare())
        for number, digest in blocks:
            self.ledger.received(session.number, number)
            try:
                self.ledger.verify(session.number, number, digest)
            except DigestMismatch as error:  # pending again, for others
                session.leaving = True
                yield p.Refuse(session.number, error)
                continue
            nbytes = plan.blocks[number].nbytes
            session.blocks += 1
            session.nbytes += nbytes
            share.blocks += 1
            share.nbytes += nbytes
        session.moved = now

    def _give_work(self, session: SessionState, now: float) -> Iterator[p.Command]:
        """Ask for blocks; with none to ask for, finish, or park while blocks of others may come back."""
        if not session.open or session.finished or session.leaving:
            return
        ahead = self.ledger.in_flight_bytes(session.number)
        if not ahead:
            session.moved = now
        asked = list(self._ask(session))
        yield from asked
        session.parked = False
        if asked or ahead:
            return
        if self.ledger.complete or session.denied or self.ledger.idle:
            yield self._finish(session)
        else:
            session.parked = True

    def _ask(self, session: SessionState) -> Iterator[p.Command]:
        """Fill the session's window."""
        plan = self.ledger.plan
        if plan is None or session.finished or session.leaving:
            return
        ahead = self.ledger.in_flight_bytes(session.number)
        window = session.window(plan)
        sharers = self.ledger.sharers
        if sharers > (1 if ahead else 0):
            # Towards the end, what one session has asked for others could have fetched.
            fair = self.ledger.pending_bytes // (sharers + (0 if ahead else 1))
            window = min(window, max(fair, 2 * plan.block_bytes))
        # No trickle: a request is worth its messages only when it is a fair part of the window.
        if ahead > window - window // _REQUEST_PART:
            return
        ranges = self.ledger.assign(session.number, window - ahead)
        if ranges:
            yield p.Ask(session.number, ranges)

    def _finish(self, session: SessionState) -> p.Finish:
        session.finished, session.parked = True, False
        outcome: Outcome = "complete" if self.ledger.complete else "partial"
        share = self.shares.get(str(session.source), SourceShare())
        return p.Finish(session.number, outcome, share.blocks, share.nbytes)

    def _leave_slow_ones(self, now: float) -> Iterator[p.Command]:
        """Leave sessions that move nothing, if another one has nothing left to do."""
        plan = self.ledger.plan
        if plan is None or not any(s.parked for s in self._sessions.values()):
            return
        for session in self._moving():
            if now >= session.overdue_at(plan):
                session.leaving = session.slow = True
                yield p.Leave(session.number, _TAKEN_OVER)

    # --- ends -------------------------------------------------------------------------------------------------------

    def _complete(self) -> Iterator[p.Command]:
        self._over = True
        for session in self._sessions.values():
            if session.open and not session.finished and not session.leaving:
                yield self._finish(session)
            elif not session.open:
                session.dismissed = True
                yield p.Dismiss(session.number)
        yield p.Done()

    def _fail(self) -> Iterator[p.Command]:
        self._over = True
        yield p.Failed(
            NoSourceLeft(self.attempts, verified=self.ledger.verified_bytes, total=self.ledger.total_bytes),
        )

    def _time_is_up(self, seconds: float) -> Iterator[p.Command]:
        late = TransferTimeout(f"the pull did not end within {seconds:g} s", hint="raise TIMEOUT")
        yield self._failed(self._last or "all sources", late)
        yield from self._fail()

    def _ended(self, session: SessionState, event: p.Ended, now: float) -> Iterator[p.Command]:
        """One session is over: what follows for its source."""
        source, error = session.source, event.error
        self.ledger.lose(session.number)
        if event.transport:
            self.shares.setdefault(str(source), SourceShare()).transport = event.transport
        if isinstance(error, MemoryStillInUse):  # no other source may fill this memory
            self._over = True
            yield p.Failed(error)
            return
        if self._over:
            if error is not None and not session.dismissed:
                yield self._failed(source, error)
            return
        if error is None and session.denied and not self.ledger.complete:
            text = f"it could not give every block: {session.denied}"
            hint = "add a source that holds all of them"
            error = RefusedError("gone", text, hint=hint, sources=session.elsewhere)
            error.story = event.story
        if self._goes_otherwise(event):
            self._unfit.setdefault(source, set()).add(event.transport)
            yield p.Log("warning", f"source {source}: not by {event.transport}: {error}")
            yield self._connect(source)
            return
        if error is None:
            self._sources.rest(source)
            return
        if session.slow and error.message == _TAKEN_OVER:  # it did nothing wrong, and may be the only one in the end
            yield self._failed(source, error)
            self._sources.demote(source, now)
            return
        yield from self._judge(source, error, now, progressed=session.blocks > 0)

    @staticmethod
    def _goes_otherwise(event: p.Ended) -> bool:
        """Whether the chosen transport could not be set up, and another one may do."""
        error = event.error
        unfit = isinstance(error, TransportUnavailable) or (
            isinstance(error, RefusedError) and error.code == "transport"
        )
        return unfit and bool(event.transport) and event.others and not event.opened

    def _judge(self, source: Address, error: NetloaderError, now: float, *, progressed: bool) -> Iterator[p.Command]:
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
        gone = isinstance(error, RefusedError) and error.code == "gone"
        if self._sources.can_be_spared(source) and (gone or isinstance(error, PeerLost)):
            # It was there when it was named to us, and while it is waited for, whoever named it is not asked again.
            self._sources.drop(source)
            return
        match next_step(error, progressed=progressed):
            case "later":
                self._sources.later(source, now, retry_after)
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
        """Account for a try that failed. A source that is waited for says the same again and again: shown once."""
        first = self._failures.add(str(source), error)
        return p.Log("warning" if first else "debug", f"source {source}: {error}")
