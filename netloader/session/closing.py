"""Closing what a transport has opened: within a bound, and so that nobody misses what is not freed by it."""

from __future__ import annotations

import logging

import anyio

from netloader.errors import MemoryStillInUse
from netloader.transports.base import Channel, Pending

__all__ = ["Lent", "close_pending", "forget_frames"]

_CLOSING = 60.0
"""Seconds that closing a channel, or giving up an offer, may take. Ours keep to less, thread by thread: this is for
transports of others."""

_log = logging.getLogger("netloader")


class Lent:
    """The memory that a session lends to its channel.

    Args:
        label: The session, for the log.

    Attributes:
        in_use: Why it can't be had back, as far as is known when the session is over; None when it can.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self.in_use: MemoryStillInUse | None = None

    def note(self, error: Exception) -> None:
        """See whether an error says that memory is still in use."""
        if not isinstance(error, MemoryStillInUse):
            return
        if self.in_use is None:
            _log.error("%s: %s", self._label, error)
        if self.in_use is None or error.writes:
            self.in_use = error
            forget_frames(error)

    async def close(self, channel: Channel, name: str, *, writes: bool) -> None:
        """Close the channel, cancelled or not.

        Args:
            channel: The channel.
            name: What it is called in messages.
            writes: Whether what was lent to it was to be filled.
        """
        unknown = MemoryStillInUse(name, writes=writes, seconds=_CLOSING)
        try:
            with anyio.move_on_after(_CLOSING, shield=True) as scope:
                await channel.aclose()
            if scope.cancelled_caught:
                self.note(unknown)
        except MemoryStillInUse as error:
            self.note(error)
        except Exception:  # noqa: BLE001 - a transport of others broke the contract: nobody knows what it left running
            _log.exception("%s: the %s could not be closed", self._label, name)
            self.note(unknown)


async def close_pending(pending: Pending, name: str) -> None:
    """Give up an offer, cancelled or not. No memory was lent to it."""
    with anyio.move_on_after(_CLOSING, shield=True) as scope:
        await pending.aclose()
    if scope.cancelled_caught:
        _log.error("%s: an offer could not be given up within %g s", name, _CLOSING)


def forget_frames(error: BaseException | None) -> None:
    """Keep an error, but not where it came from: tracebacks keep the tensors alive that were being moved."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ if error.__cause__ is not None else error.__context__
