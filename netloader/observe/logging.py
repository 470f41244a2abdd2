"""Log lines of pulls and servers, written from their events, and a limit for lines that peers can cause at will."""

from __future__ import annotations

import logging
import time

from netloader.core.report import PullReport, summary
from netloader.core.texts import LINE, one_line
from netloader.errors import RefusedError
from netloader.observe.events import (
    Event,
    PullEnded,
    ServingStarted,
    SessionEnded,
    SourceWaiting,
    TransportChosen,
)
from netloader.observe.progress import ProgressLog

__all__ = ["PullLog", "RateLimitedLog", "ServerLog"]

_log = logging.getLogger("netloader")

_MINUTE = 60.0

_ROUTINE_CODES = ("not-ready", "busy", "done")
"""Codes logged at debug level: the refusals that waiting clients receive repeatedly, and the goodbye of a client that
received every block from other sources. So is every refusal of a client that only asks what is held: a server asks
each client of its own that relays, before it sends others there."""


class RateLimitedLog:
    """Logs something that peers can cause at will: at most a few lines a minute, then the number of lines left out.

    Args:
        what: What happened, for the log.
        level: Level of the lines.
        lines: Most lines in a minute.
    """

    def __init__(self, what: str, level: int, lines: int) -> None:
        self._what = what
        self._level = level
        self._lines = lines
        self._shown = 0
        self._suppressed = 0
        self._until = 0.0

    def happened(self, detail: str, level: int | None = None) -> None:
        """Log one occurrence, or only count it. `level`: if it is not that of the other lines."""
        now = time.monotonic()
        if now >= self._until:
            if self._suppressed:
                _log.log(self._level, "%s: %d more since the last line", self._what, self._suppressed)
            self._shown, self._suppressed, self._until = 0, 0, now + _MINUTE
        if self._shown < self._lines:
            self._shown += 1
            _log.log(self._level if level is None else level, "%s: %s", self._what, detail)
        else:
            self._suppressed += 1


class PullLog:
    """An observer that logs for what a pull waits, and the summary of a pull that succeeded."""

    def __init__(self) -> None:
        self._waits = ProgressLog(lambda line: _log.info("netloader: %s", line), every=10.0)

    def __call__(self, event: Event) -> None:
        """Log `event` if it is one of these."""
        match event:
            case SourceWaiting():
                self._waits(event)
            case PullEnded(report=PullReport() as report):
                _log.info("netloader: %s", summary(report))


class ServerLog:
    """An observer that logs what a server serves, and each of its sessions."""

    def __init__(self) -> None:
        self._strays = RateLimitedLog("a connection that was no client's", logging.INFO, 1)
        self._failures = RateLimitedLog("a session failed", logging.WARNING, 20)

    def __call__(self, event: Event) -> None:
        """Log `event` if it is an event of a server that has a log line."""
        match event:
            case ServingStarted():
                _log.info(
                    "serving %s (%s, %s): %d tensors, %d blocks, %.1f MB, root %s",
                    event.model or "unnamed tensors",
                    event.role,
                    event.layout,
                    event.tensors,
                    event.blocks,
                    event.nbytes / 1e6,
                    event.root[:16],
                )
            case TransportChosen(side="server"):
                _log.info("%s: TRANSFER over %s", _label(event), event.transport)
            case SessionEnded(side="server"):
                self._ended(event)

    def stray(self, detail: str) -> None:
        """Log a connection that was closed before its session began."""
        self._strays.happened(detail)

    def _ended(self, event: SessionEnded) -> None:
        error, label = event.error, _label(event)
        if error is None:
            _log.info("%s: done, %d blocks, %.1f MB", label, event.blocks, event.nbytes / 1e6)
        elif isinstance(error, RefusedError) and (error.code in _ROUTINE_CODES or event.probe):
            _log.debug("%s: %s", label, one_line(str(error), LINE))
        elif event.stray:
            self._strays.happened(f"{label}: {one_line(str(error), LINE)}")
        else:
            more = f" and while sending {event.unfinished} more" if event.unfinished else ""
            self._failures.happened(f"{label}, after {event.blocks} blocks{more}: {one_line(str(error), LINE)}")


def _label(event: TransportChosen | SessionEnded) -> str:
    return f"session {event.session} with {event.peer}"
