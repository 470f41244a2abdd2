"""The queue of blocks that were granted and have not been passed to the channel yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import anyio

from netloader.core.plan import Plan, Ranges, expand, in_groups
from netloader.errors import RemoteProtocolError

__all__ = ["BlockQueue", "groups"]

_CALL_SPANS = 4096
"""Most spans in one call of a channel. While the call runs, the spans of the next one are looked up."""


class BlockQueue:
    """Blocks in the order in which they will be sent or received. Messages add them; calls of the channel take them.

    Args:
        limit: Most messages in the queue.
        too_many: Text of the error when a peer sends more.
    """

    def __init__(self, limit: int, too_many: str) -> None:
        self._too_many = too_many
        self._inlet, self._outlet = anyio.create_memory_object_stream[Ranges](limit)
        self._taken: deque[int] = deque()

    def put(self, ranges: Ranges) -> None:
        """Add blocks.

        Raises:
            RemoteProtocolError: The queue is full.
        """
        try:
            self._inlet.send_nowait(ranges)
        except anyio.WouldBlock:
            raise RemoteProtocolError(self._too_many) from None

    async def wait(self) -> bool:
        """Wait until there is a block. Returns False when the queue is closed."""
        if not self._taken:
            try:
                self._taken.extend(expand(await self._outlet.receive()))
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                return False
        return True

    def take(self, plan: Plan, nbytes: int) -> list[int]:
        """Remove and return the first blocks, for one call.

        Args:
            plan: The plan of the blocks.
            nbytes: No further block is added once the blocks have this many bytes.
        """
        numbers: list[int] = []
        spans = 0
        while nbytes > 0 and (self._taken or self._receive_more()):
            block = plan.blocks[self._taken[0]]
            spans += len(block.tensors)
            if numbers and spans > _CALL_SPANS:
                break
            numbers.append(self._taken.popleft())
            nbytes -= block.nbytes
        return numbers

    def drop(self) -> None:
        """Discard the blocks that :meth:`wait` received and :meth:`take` has not returned."""
        self._taken.clear()

    def close(self) -> None:
        """Close the queue for both directions. Idempotent."""
        self._inlet.close()
        self._outlet.close()

    def _receive_more(self) -> bool:
        """Receive one more message without waiting. Returns False when there is none."""
        try:
            self._taken.extend(expand(self._outlet.receive_nowait()))
        except (anyio.WouldBlock, anyio.EndOfStream):
            return False
        return True


def groups(plan: Plan, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Split blocks into groups that have as many spans as one call."""
    return in_groups(plan, numbers, _CALL_SPANS)
