"""The notes of one session in the log, limited in number because a peer can cause them at will."""

from __future__ import annotations

import logging

from netloader.observe.logging import RateLimitedLog

__all__ = ["SessionNotes"]

_MOST = 10
"""Most notes of one session in a minute. A server that lets a client wait causes one every few seconds at most."""


class SessionNotes:
    """Writes the notes of one session to the log. A note that repeats the last one is a debug line.

    Args:
        label: Name of the session in the log.
    """

    def __init__(self, label: str) -> None:
        self._log = RateLimitedLog(label, logging.INFO, _MOST)
        self._last = ""

    def add(self, text: str) -> None:
        """Write a note, or only count it."""
        self._log.happened(text, logging.DEBUG if text == self._last else None)
        self._last = text
