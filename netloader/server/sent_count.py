"""What one session has sent: finished calls of the channel, and those that have not returned."""

from __future__ import annotations

__all__ = ["SentCount"]


class SentCount:
    """Counts the blocks of one session.

    Attributes:
        blocks: Blocks in calls that have returned.
        nbytes: Their bytes.
        unfinished: Blocks in calls that have not returned.
    """

    def __init__(self) -> None:
        self.blocks = self.nbytes = self.unfinished = 0
        self._unfinished_bytes = 0
        self._told = (0, 0)

    def began(self, blocks: int, nbytes: int) -> None:
        """A call began."""
        self.unfinished += blocks
        self._unfinished_bytes += nbytes

    def ended(self, blocks: int, nbytes: int) -> None:
        """A call has sent its blocks."""
        self.began(-blocks, -nbytes)
        self.blocks += blocks
        self.nbytes += nbytes

    def so_far(self, *, all_arrived: bool) -> tuple[int, int]:
        """Blocks sent, and their bytes. If all have arrived, those of unfinished calls count."""
        if all_arrived:
            return self.blocks + self.unfinished, self.nbytes + self._unfinished_bytes
        return self.blocks, self.nbytes

    def news(self, *, all_arrived: bool) -> tuple[int, int]:
        """Blocks, and their bytes, that were not returned by an earlier call of this method."""
        (blocks, nbytes), before = self.so_far(all_arrived=all_arrived), self._told
        self._told = blocks, nbytes
        return blocks - before[0], nbytes - before[1]
