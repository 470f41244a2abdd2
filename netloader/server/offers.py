"""Tells a client which blocks there are: those that a relay has by now, or those that a server has sent to others."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from netloader.core.block_order import bits, mask_of
from netloader.core.plan import Ranges, to_ranges
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


async def tell_blocks(supply: Supply, tell: Callable[[BlocksOffered], None]) -> None:
    """Tell a client of a relay which blocks the relay has, until all are there."""
    told = 0
    while True:
        new, told = supply.blocks & ~told, supply.blocks
        if new:
            tell(BlocksOffered(has=to_ranges(bits(new))))
        if supply.complete:
            return
        await anyio.sleep(_EVERY)
        if supply.blocks == told:
            await supply.wait()


async def tell_sent(sent: SentBlocks, own: SentBlocks, tell: Callable[[BlocksOffered], None]) -> None:
    """Tell a client which blocks were sent to others, without end; `own` are those that were sent to this one."""
    told = 0
    while True:
        new = sent.mask & ~(told | own.mask)
        if new:
            told |= new
            tell(BlocksOffered(sent=to_ranges(bits(new))))
        before = sent.mask
        await anyio.sleep(_EVERY)
        if sent.mask == before:
            await sent.wait()
