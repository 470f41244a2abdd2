"""Which blocks a pull requests of which session, and how far ahead. No I/O; the time is an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from netloader.core import pull_events as p
from netloader.core.block_order import BlockOrder
from netloader.core.ledger import Ledger
from netloader.core.messages import Outcome
from netloader.core.plan import Plan
from netloader.core.pull_state import SessionState
from netloader.core.redirect_budget import RedirectBudget
from netloader.core.report import SourceShare

__all__ = ["Requests"]

_REQUEST_PART = 2
"""More blocks are requested once 1 / this of the window is free."""

_TAKEN_OVER = "its blocks are taken over by faster sources"

_STARVED_SECONDS = 2.0
"""Seconds without a block that it could request, after which a session makes room for one with another source."""


class Requests:
    """The requests of one pull.

    Args:
        ledger: Its ledger.
        order: What its sources have.
        sessions: Its sessions that have not ended; only read here.
        shares: What each source gave.
        budget: The time that relays may take.
    """

    def __init__(
        self,
        ledger: Ledger,
        order: BlockOrder,
        sessions: Mapping[int, SessionState],
        shares: Mapping[str, SourceShare],
        budget: RedirectBudget,
    ) -> None:
        self._ledger = ledger
        self._order = order
        self._sessions = sessions
        self._shares = shares
        self._budget = budget

    def active(self) -> list[SessionState]:
        """Sessions that have blocks in flight."""
        return [
            s
            for s in self._sessions.values()
            if s.open and not (s.parked or s.leaving) and self._ledger.in_flight_bytes(s.number)
        ]

    def give_work(self, session: SessionState, now: float) -> Iterator[p.Command]:
        """Request blocks. Without any, finish the session, or park it while it may be of use later."""
        if not session.open or session.finished or session.leaving:
            return
        ahead = self._ledger.in_flight_bytes(session.number)
        if not ahead:
            session.moved = now
        asked = list(self.request(session))
        yield from asked
        if asked and session.relay and self._ledger.plan is not None and not self._ledger.verified_blocks:
            self._budget.asked(self._ledger.plan.block_bytes, now)
        was_parked, session.parked = session.parked, False
        if asked or ahead:
            return
        waits = self._order.partial(session.number) and not session.denied
        if self._ledger.complete or session.denied or (self._ledger.idle and not waits):
            yield self.finish(session)
            return
        session.parked = True
        if not was_parked:
            session.parked_at = now

    def request(self, session: SessionState) -> Iterator[p.Command]:
        """Request blocks until the session's window is full."""
        plan = self._ledger.plan
        if plan is None or session.finished or session.leaving:
            return
        ahead = self._ledger.in_flight_bytes(session.number)
        order = self._order.order(session.number, self._ledger.pending_mask)
        several = sum(s.open for s in self._sessions.values()) > 1
        window = session.window(plan, shared=several and order is not None)
        sharers = self._ledger.sharers
        if sharers > (1 if ahead else 0):
            # Near the end, a large window of one session would leave the other sessions idle.
            fair = self._ledger.pending_bytes // (sharers + (0 if ahead else 1))
            window = min(window, max(fair, 2 * plan.block_bytes))
        # Many small requests would cost more messages than they save time.
        if ahead > window - window // _REQUEST_PART:
            return
        ranges = self._ledger.assign(session.number, window - ahead, order)
        if ranges:
            yield p.RequestBlocks(session.number, ranges)

    def finish(self, session: SessionState) -> p.Finish:
        """End a session from which nothing more is needed."""
        session.finished, session.parked = True, False
        outcome: Outcome = "complete" if self._ledger.complete else "partial"
        share = self._shares.get(str(session.source), SourceShare())
        return p.Finish(session.number, outcome, share.blocks, share.nbytes)

    # --- sources that are of little use ---------------------------------------------------------------------------

    def leave_slow_ones(self, now: float) -> Iterator[p.Command]:
        """End sessions whose next block is overdue, if another session is parked and can take over."""
        plan = self._ledger.plan
        if plan is None:
            return
        for session in self._replaceable():
            if now >= session.overdue_at(plan):
                session.leaving = session.slow = True
                yield p.LeaveSource(session.number, _TAKEN_OVER)

    def overdue_times(self, plan: Plan) -> list[float]:
        """When sessions are due for :meth:`leave_slow_ones`."""
        return [s.overdue_at(plan) for s in self._replaceable()]

    def starved(self) -> list[SessionState]:
        """Sessions whose sources have nothing that is still needed, although blocks are."""
        return [s for s in self._sessions.values() if s.parked] if self._ledger.idle else []

    def starved_until(self) -> float | None:
        """When :meth:`leave_starved` is due next; None while no session is starved, or one makes room already."""
        if any(s.finished or s.leaving for s in self._sessions.values()):
            return None
        return min((s.parked_at + _STARVED_SECONDS for s in self.starved()), default=None)

    def leave_starved(self, now: float) -> Iterator[p.Command]:
        """Finish one session that was starved for long, to make room for another source."""
        for session in self.starved():
            if now >= session.parked_at + _STARVED_SECONDS:
                session.starved = True
                yield self.finish(session)
                return

    def taken_over(self, session: SessionState, message: str) -> bool:
        """Whether a session ended with `message` because others are faster, which is no failure."""
        return session.slow and message == _TAKEN_OVER

    def _replaceable(self) -> list[SessionState]:
        """Sessions with blocks in flight that the source of a parked session has."""
        parked = [s.number for s in self._sessions.values() if s.parked]
        if not parked:
            return []
        if not any(map(self._order.partial, parked)):
            return self.active()
        found = []
        for session in self.active():
            blocks = sum(1 << number for number in self._ledger.in_flight(session.number))
            if any(self._order.can_give(number, blocks) for number in parked):
                found.append(session)
        return found
