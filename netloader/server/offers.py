"""Tells a client which blocks there are: those that a relay has by now, or those that a server has sent to others."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from netloader.core.plan import Ranges, mask_of, ranges_of
from netloader.core.protocol.events import BlocksOffered
from netloader.session.relay_progress import Supply

__all__ = ["SentBlocks", "tell_blocks", "tell_sent"]

_EVERY = 0.01
"""Least seconds between two messages to one client."""


class SentBlocks:
    """The blocks of one holding that were sent to clients that relay.

    Attributes:
        mask: Bit n stands for block n.
    """

    def __init__(self) -> None:
        self.mask = 0
        self._changed = anyio.Event()

    def add(self, ranges: Ranges) -> None:
        """Add blocks, and wake those that wait."""
        self.mask |= mask_of(ranges)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()


async def tell_blocks(
    supply: Supply, tell: Callable[[BlocksOffered], None], in_use: Callable[[], bool], orphan_wait: float
) -> bool:
    """Tell a client of a relay which blocks the relay has, until all are there.

    Args:
        supply: What the relay has.
        tell: Tells the client.
        in_use: Whether the client still waits for blocks that the relay has.
        orphan_wait: Seconds that the client waits for more after the relay lost its own source.

    Returns:
        Whether all are there. False: the relay has no source, and found none within `orphan_wait`.
    """
    told = 0
    while True:
        new, told = supply.blocks & ~told, supply.blocks
        if new:
            tell(BlocksOffered(has=ranges_of(new)))
        if supply.complete:
            return True
        await anyio.sleep(_EVERY)
        if supply.blocks == told:
            with anyio.move_on_after(None if supply.live else orphan_wait) as scope:
                await supply.wait()
            if scope.cancelled_caught and not (supply.live or in_use()):
                return False


async def tell_sent(sent: SentBlocks, own: SentBlocks, tell: Callable[[BlocksOffered], None]) -> None:
    """Tell a client which blocks were sent to others, without end; `own` are those that were sent to this one."""
    told = 0
    while True:
        new = sent.mask & ~(told | own.mask)
        if new:
            told |= new
            tell(BlocksOffered(sent=ranges_of(new)))
        before = sent.mask
        await anyio.sleep(_EVERY)
        if sent.mask == before:
            await sent.wait()
