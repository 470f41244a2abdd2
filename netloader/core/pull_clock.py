"""How the time of a pull is spent, and for what it waits. No I/O: the time is an argument.

:class:`PullClock` takes the events and commands of a :class:`~netloader.core.pull.Pull`, and decides nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from netloader.core import pull_events as p
from netloader.core.options import PullOptions
from netloader.core.texts import one_line
from netloader.errors import NetloaderError, without_source

__all__ = ["PullClock", "Wait"]

_SAY_EVERY = 1.0
"""Seconds of waiting until it is reported, and between two reports."""


class Wait(NamedTuple):
    """For what a pull waits.

    Attributes:
        seconds: Seconds since the pull began.
        source: Address of the source; empty when none is known.
        reason: Why that source does not send yet; one short line.
        waited: Seconds that this wait has taken.
        limit: Seconds after which the pull stops waiting.
    """

    seconds: float
    source: str
    reason: str
    waited: float
    limit: float


class PullClock:
    """The seconds that a pull waits and transfers.

    A pull *waits* while no source has accepted it: it connects, is queued, was refused for the time being, or knows no
    source. It *transfers* while a channel is open.

    Args:
        options: How long the pull may wait.
        began: When the pull began.

    Attributes:
        waited: Seconds spent waiting.
        transferred: Seconds in which a channel was open.
    """

    def __init__(self, options: PullOptions, began: float) -> None:
        self.waited = 0.0
        self.transferred = 0.0
        self._options = options
        self._began = self._now = self._since = self._said = began
        self._sources: dict[int, str] = {}
        self._queued: set[int] = set()
        self._accepted: set[int] = set()
        self._open: set[int] = set()
        self._failed: tuple[str, str] | None = None  # the last source that failed, and why
        self._stopped = False

    def connecting(self, command: p.Connect) -> None:
        """A session begins."""
        self._sources[command.session] = str(command.source)

    def take(self, event: p.Event, now: float) -> None:
        """Take an event of the pull."""
        self.advance(now)
        match event:
            case p.SessionQueued(number):
                self._queued.add(number)
            case p.HoldingAnnounced(number):
                self._queued.discard(number)
                self._accepted.add(number)
            case p.SessionReady(number):
                self._open.add(number)
            case p.SessionEnded(number, error):
                self._ended(number, error, now)
            case _:
                pass

    def stop(self, now: float) -> None:
        """The pull is over; no more time is counted."""
        self.advance(now)
        self._stopped = True

    def advance(self, now: float) -> None:
        """Count the seconds until `now`."""
        if self._stopped:
            return
        seconds, self._now = now - self._now, now
        if self._open:
            self.transferred += seconds
        elif not self._accepted:
            self.waited += seconds

    def due(self) -> float | None:
        """When to call :meth:`report` if nothing else happens; None while the pull does not wait."""
        return None if self._accepted or self._stopped else self._said + _SAY_EVERY

    def report(self, now: float) -> Wait | None:
        """For what the pull waits, if that has to be reported now: at most once per second."""
        due = self.due()
        if due is None or now < due:
            return None
        self._said = now
        source, reason = self._why()
        last = self._began + self._options.wait
        if self._queued or last <= now:  # a turn is waited for until TIMEOUT; so is an answer that is under way
            last = self._began + self._options.timeout
        return Wait(now - self._began, source, reason, now - self._since, last - self._since)

    def _ended(self, number: int, error: NetloaderError | None, now: float) -> None:
        source = self._sources.pop(number, "")
        had = bool(self._accepted)
        for group in (self._queued, self._accepted, self._open):
            group.discard(number)
        if had and not self._accepted:
            self._since = self._said = now
        if error is not None:
            self._failed = (source, one_line(without_source(error.message, source)))

    def _why(self) -> tuple[str, str]:
        for number in self._queued:
            return self._sources.get(number, ""), "waiting for a turn"
        if self._failed is not None:
            return self._failed
        for source in self._sources.values():
            return source, "no answer yet"
        return "", "no source was found yet"
