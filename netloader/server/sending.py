"""What one session sends: which granted blocks are next, when the server's limit lets them pass, and how many went."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from netloader.codecs.block_view import BlockView
from netloader.core.plan import Ranges
from netloader.errors import ManifestError
from netloader.server.admission import Admission
from netloader.server.bandwidth import Bandwidth
from netloader.server.catalog import Holdings
from netloader.session.block_queue import BlockQueue
from netloader.session.holding import Holding
from netloader.session.off_loop import look_up

__all__ = ["Batch", "Gone", "Sending"]

_SEND_BYTES = 256 << 20
"""Most bytes in one call of the channel. A client's request window is about half a second at its rate, so a call
takes no longer than that. A retraction takes effect between two calls."""

_FIRST_BYTES = 4 << 20
"""Most bytes in a call until more have been sent. A call may last as long as its bytes take at the least rate, so a
client that takes none must not hold its channel for a large one."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks for one call of the channel.

    Attributes:
        numbers: The blocks.
        views: Their memory.
        nbytes: Their bytes.
    """

    numbers: list[int]
    views: Sequence[BlockView]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The tensors are not held any more.

    Attributes:
        reason: Why.
        sources: Other sources of the same weights, as this server reaches them.
    """

    reason: str
    sources: tuple[str, ...] = ()


class Sending:
    """The granted blocks of one session, and what became of them.

    Args:
        client: The session, as `turns` and `bandwidth` know it.
        holdings: The catalog of the server.
        turns: Admission of pulls.
        bandwidth: Limit for what all sessions send.
        granted: Takes the granted blocks.
        note_waiting: Called when `waiting` has changed.

    Attributes:
        waiting: Whether blocks wait for the limit of the server.
        calls: Calls of the channel that have not returned.
        unfinished: Blocks in those calls that are being sent.
    """

    def __init__(
        self,
        client: Hashable,
        holdings: Holdings,
        turns: Admission,
        bandwidth: Bandwidth,
        granted: BlockQueue,
        note_waiting: Callable[[], None],
    ) -> None:
        self._client = client
        self._holdings = holdings
        self._turns = turns
        self._bandwidth = bandwidth
        self._granted = granted
        self._note_waiting = note_waiting
        self.waiting = False
        self.calls = 0
        self.unfinished = 0
        self._unfinished_bytes = 0
        self._blocks = self._nbytes = 0
        self._told = (0, 0)

    def grant(self, ranges: Ranges) -> None:
        """Add granted blocks."""
        self._granted.put(ranges)

    async def following(self, holding: Holding) -> Batch | Gone | None:
        """Wait for granted blocks, and return the next of them; None at the end of the session.

        The caller makes a call of the channel with a batch, and says so by `began`, `ended` and `returned`.
        """
        if not await self._granted.wait():
            return None
        plan = holding.announcement.plan
        most = min(max(_FIRST_BYTES, self._nbytes), _SEND_BYTES, holding.memory.call_bytes or _SEND_BYTES)
        numbers = self._granted.take(plan, min(most, self._bandwidth.slice_bytes or most))
        nbytes = sum(plan.blocks[number].nbytes for number in numbers)
        await self._wait_for_bandwidth(nbytes)
        if not self._holdings.holds(holding):
            self._granted.drop()
            return Gone(*self._holdings.why_gone(holding))
        self.calls += 1
        try:
            return Batch(numbers, await look_up(holding.memory.views, plan, numbers), nbytes)
        except ManifestError as error:  # the owner dropped the tensors after they were granted
            self.calls -= 1
            self._granted.drop()
            return Gone(error.message)
        except BaseException:
            self.calls -= 1
            raise

    async def _wait_for_bandwidth(self, nbytes: int) -> None:
        """Wait until the limit of the server lets these bytes pass."""
        if self._bandwidth.rate is None:
            return
        self.waiting = True
        self._note_waiting()
        try:
            await self._bandwidth.wait(self._client, nbytes)
        finally:
            self.waiting = False
            self._note_waiting()

    def began(self, batch: Batch) -> None:
        """A call of the channel begins to send a batch."""
        self.unfinished += len(batch.numbers)
        self._unfinished_bytes += batch.nbytes
        self._turns.call_began(self._client, batch.nbytes, time.monotonic())

    def returned(self) -> None:
        """A call of the channel returned, or failed."""
        self.calls -= 1

    def ended(self, batch: Batch) -> None:
        """A batch has been sent."""
        self._turns.call_ended(self._client, batch.nbytes, time.monotonic())
        self.unfinished -= len(batch.numbers)
        self._unfinished_bytes -= batch.nbytes
        self._blocks += len(batch.numbers)
        self._nbytes += batch.nbytes

    def close(self) -> None:
        """The session has ended."""
        self.calls = 0
        self._granted.close()

    def so_far(self, *, all_arrived: bool) -> tuple[int, int]:
        """Blocks sent, and their bytes. If all have arrived, those of unfinished calls count."""
        if all_arrived:
            return self._blocks + self.unfinished, self._nbytes + self._unfinished_bytes
        return self._blocks, self._nbytes

    def news(self, *, all_arrived: bool) -> tuple[int, int]:
        """Blocks sent, and their bytes, that were not returned by an earlier call of this method."""
        (blocks, nbytes), before = self.so_far(all_arrived=all_arrived), self._told
        self._told = blocks, nbytes
        return blocks - before[0], nbytes - before[1]
