"""Blocks that may be moved and have not been handed to the channel yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import anyio

from netloader.core.plan import Plan, Ranges, expand, in_groups
from netloader.errors import RemoteProtocolError

__all__ = ["BlockQueue", "groups"]

_CALL_SPANS = 4096
"""Pieces of memory in one call of a channel: while it runs, those of the next call are looked up."""


class BlockQueue:
    """Blocks in the order in which they are to be moved, put in by messages and taken out for calls of the channel.

    Args:
        limit: Messages that may be waiting.
        too_many: What is said when a peer brings more.
    """

    def __init__(self, limit: int, too_many: str) -> None:
        self._too_many = too_many
        self._inlet, self._outlet = anyio.create_memory_object_stream[Ranges](limit)
        self._taken: deque[int] = deque()

    def put(self, ranges: Ranges) -> None:
        """Add blocks.

        Raises:
            RemoteProtocolError: The peer brought more messages than may wait.
        """
        try:
            self._inlet.send_nowait(ranges)
        except anyio.WouldBlock:
            raise RemoteProtocolError(self._too_many) from None

    async def wait(self) -> bool:
        """Wait until there is a block; False when there will be none any more."""
        if not self._taken:
            try:
                self._taken.extend(expand(await self._outlet.receive()))
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                return False
        return True

    def take(self, plan: Plan, nbytes: int) -> list[int]:
        """The first blocks, for one call.

        Args:
            plan: The plan that they belong to.
            nbytes: Bytes after which no block is added.
        """
        numbers: list[int] = []
        spans = 0
        while nbytes > 0 and (self._taken or self._look()):
            block = plan.blocks[self._taken[0]]
            spans += len(block.tensors)
            if numbers and spans > _CALL_SPANS:
                break
            numbers.append(self._taken.popleft())
            nbytes -= block.nbytes
        return numbers

    def drop(self) -> None:
        """Forget what :meth:`wait` found and :meth:`take` has not taken."""
        self._taken.clear()

    def close(self) -> None:
        """Nothing more will be put in or taken out. Idempotent."""
        self._inlet.close()
        self._outlet.close()

    def _look(self) -> bool:
        """Whether more came meanwhile."""
        try:
            self._taken.extend(expand(self._outlet.receive_nowait()))
        except (anyio.WouldBlock, anyio.EndOfStream):
            return False
        return True


def groups(plan: Plan, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Blocks in groups of as many pieces of memory as one call has."""
    return in_groups(plan, numbers, _CALL_SPANS)
