"""The notes of one session in the log, limited in number because a peer can cause them at will."""

from __future__ import annotations

import logging
import time

__all__ = ["SessionNotes"]

_log = logging.getLogger("netloader")

_MOST = 10
"""Most notes of one session in a minute. A server that lets a client wait causes one every few seconds at most."""

_MINUTE = 60.0


class SessionNotes:
    """Writes the notes of one session to the log.

    A note that repeats the last one is a debug line. Of more than a few notes in a minute, the rest is only counted.

    Args:
        label: Name of the session in the log.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._last = ""
        self._written = 0
        self._left_out = 0
        self._until = 0.0

    def add(self, text: str) -> None:
        """Write a note, or only count it."""
        now = time.monotonic()
        if now >= self._until:
            if self._left_out:
                _log.info("%s: %d more notes since the last line", self._label, self._left_out)
            self._written, self._left_out, self._until = 0, 0, now + _MINUTE
        if self._written >= _MOST:
            self._left_out += 1
            return
        self._written += 1
        _log.log(logging.DEBUG if text == self._last else logging.INFO, "%s: %s", self._label, text)
        self._last = text
