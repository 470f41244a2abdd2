"""What is logged while a registry, a resolver or a folder can't be used."""

from __future__ import annotations

import logging

from netloader.errors import DiscoveryError

__all__ = ["Outage"]

_log = logging.getLogger("netloader")


class Outage:
    """Logs that something does not answer: once as a warning, and once when it answers again.

    Args:
        what: What it is, and what for.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._down = False

    def failed(self, error: DiscoveryError) -> None:
        """A call failed."""
        if not self._down:
            _log.warning("netloader: %s: %s; it is tried again until it answers", self._what, error)
        self._down = True

    def over(self) -> None:
        """A call succeeded."""
        if self._down:
            _log.info("netloader: %s: it answers again", self._what)
        self._down = False
