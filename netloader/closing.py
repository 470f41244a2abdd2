"""Closing what a transport has opened: within a bound, and so that nobody misses what is not freed by it."""

from __future__ import annotations

import logging

import anyio

from netloader.errors import MemoryStillInUse
from netloader.transports.base import Channel, Pending

__all__ = ["close_channel", "close_pending"]

_CLOSING = 60.0
"""Seconds that closing a channel, or giving up an offer, may take. Ours keep to less, thread by thread: this is for
transports of others."""

_log = logging.getLogger("netloader")


async def close_channel(channel: Channel, name: str, *, writes: bool) -> MemoryStillInUse | None:
    """Close a channel, cancelled or not.

    Args:
        channel: The channel.
        name: What it is called in messages.
        writes: Whether memory was lent to it to be filled.

    Returns:
        Why memory that was lent to it can't be had back; None when it can.
    """
    try:
        with anyio.move_on_after(_CLOSING, shield=True) as scope:
            await channel.aclose()
    except MemoryStillInUse as error:
        return error
    except Exception:  # noqa: BLE001 - a transport of others broke the contract: nobody knows what it left running
        _log.exception("%s could not be closed", name)
        return MemoryStillInUse(name, writes=writes, seconds=_CLOSING)
    return MemoryStillInUse(name, writes=writes, seconds=_CLOSING) if scope.cancelled_caught else None


async def close_pending(pending: Pending, name: str) -> None:
    """Give up an offer, cancelled or not. No memory was lent to it."""
    with anyio.move_on_after(_CLOSING, shield=True) as scope:
        await pending.aclose()
    if scope.cancelled_caught:
        _log.error("%s: an offer could not be given up within %g s", name, _CLOSING)
