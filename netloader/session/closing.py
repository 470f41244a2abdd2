"""Closes channels and offers within a deadline, and records memory that a channel does not give back."""

from __future__ import annotations

import logging

import anyio

from netloader.errors import MemoryStillInUse
from netloader.transports.base import Channel, Pending

__all__ = ["LentMemory", "close_pending", "drop_tracebacks"]

_CLOSING = 60.0
"""Seconds that closing a channel or withdrawing an offer may take. The transports of this package have shorter
deadlines of their own; this one is for third-party transports."""

_log = logging.getLogger("netloader")


class LentMemory:
    """The memory that a session lends to its channel.

    Args:
        label: The session, for the log.

    Attributes:
        in_use: Why the channel may still use the memory after the session ended; None when it does not.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self.in_use: MemoryStillInUse | None = None

    def note(self, error: Exception) -> None:
        """Record `error` if it says that memory is still in use."""
        if not isinstance(error, MemoryStillInUse):
            return
        if self.in_use is None:
            _log.error("%s: %s", self._label, error)
        if self.in_use is None or error.writes:
            self.in_use = error
            drop_tracebacks(error)

    async def close(self, channel: Channel, name: str, *, writes: bool) -> None:
        """Close the channel. A cancellation does not interrupt this.

        Args:
            channel: The channel.
            name: Name of the channel in messages.
            writes: Whether the channel writes to the memory.
        """
        unknown = MemoryStillInUse(name, writes=writes, seconds=_CLOSING)
        try:
            with anyio.move_on_after(_CLOSING, shield=True) as scope:
                await channel.aclose()
            if scope.cancelled_caught:
                self.note(unknown)
        except MemoryStillInUse as error:
            self.note(error)
        except Exception:  # noqa: BLE001 - a third-party transport broke the contract: it may have left threads running
            _log.exception("%s: the %s could not be closed", self._label, name)
            self.note(unknown)


async def close_pending(pending: Pending, name: str) -> None:
    """Withdraw an offer. A cancellation does not interrupt this. No memory was lent to the offer."""
    with anyio.move_on_after(_CLOSING, shield=True) as scope:
        await pending.aclose()
    if scope.cancelled_caught:
        _log.error("%s: an offer could not be withdrawn within %g s", name, _CLOSING)


def drop_tracebacks(error: BaseException | None) -> None:
    """Remove the tracebacks of an error and its causes: their frames keep the tensors of the transfer alive."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ if error.__cause__ is not None else error.__context__
