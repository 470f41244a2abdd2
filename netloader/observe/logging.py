"""The log lines of a server, made from events; and lines that others can cause as often as they like."""

from __future__ import annotations

import logging
import time

from netloader.errors import NetloaderError, RefusedError
from netloader.observe.events import Event, ServingStarted, SessionEnded, TransportChosen

__all__ = ["LimitedLine", "ServerLog"]

_log = logging.getLogger("netloader")

_MINUTE = 60.0

_SHOWN = 500
"""Characters of a log line about a session: part of it is the client's own text."""

_NOT_NEWS = ("not-ready", "busy", "done")
"""Refusals that clients get again and again while they wait, and the farewell of one that has got all from others."""


class LimitedLine:
    """Something that others can cause as often as they like: a few log lines a minute, then how many there were.

    Args:
        what: Its name in the log.
        level: Level of the lines.
        lines: Lines in a minute.
    """

    def __init__(self, what: str, level: int, lines: int) -> None:
        self._what = what
        self._level = level
        self._lines = lines
        self._shown = 0
        self._untold = 0
        self._until = 0.0

    def happened(self, detail: str) -> None:
        """Log it, or count it."""
        now = time.monotonic()
        if now >= self._until:
            if self._untold:
                _log.log(self._level, "%s: %d more since the last line", self._what, self._untold)
            self._shown, self._untold, self._until = 0, 0, now + _MINUTE
        if self._shown < self._lines:
            self._shown += 1
            _log.log(self._level, "%s: %s", self._what, detail)
        else:
            self._untold += 1


class ServerLog:
    """An observer that logs what is served, and each session of a client."""

    def __init__(self) -> None:
        self._strays = LimitedLine("a connection that was no client's", logging.INFO, 1)
        self._failures = LimitedLine("a session failed", logging.WARNING, 20)

    def __call__(self, event: Event) -> None:
        """Log `event`, if it is one of a server that is logged."""
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
        """Log a connection that was gone before a session began."""
        self._strays.happened(detail)

    def _ended(self, event: SessionEnded) -> None:
        error, label = event.error, _label(event)
        if error is None:
            _log.info("%s: done, %d blocks, %.1f MB", label, event.blocks, event.nbytes / 1e6)
        elif isinstance(error, RefusedError) and error.code in _NOT_NEWS:
            _log.debug("%s: %s", label, _one_line(error))
        elif event.stray:
            self._strays.happened(f"{label}: {_one_line(error)}")
        else:
            self._failures.happened(f"{label}, after {event.blocks} blocks: {_one_line(error)}")


def _label(event: TransportChosen | SessionEnded) -> str:
    return f"session {event.session} with {event.peer}"


def _one_line(error: NetloaderError) -> str:
    """An error for the log: part of it may be a stranger's text."""
    text = str(error)
    if len(text) > _SHOWN:
        text = text[: _SHOWN - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
