"""An operation of a channel that several threads carry out together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from netloader.errors import TransferTimeout
from netloader.transports.base import BlockView, Landed

__all__ = ["Operation"]

_LONGEST_LOOK = 1 / 4
"""Part of the stall time that the time between two checks counts at most. If this process or its host was suspended
meanwhile, the peer was not silent for all of that time."""


class Operation:
    """The state that the threads of one call share: progress, the first error, and the callback for complete blocks.

    Blocks complete in any order. The thread that completes a block calls `landed` at once, and threads do so in
    parallel. The callback hashes the block, and a single thread would hash more slowly than several move bytes.

    Args:
        what: What a stall means, for messages (``the peer sends nothing``).
        blocks: All blocks of the call, in order.
        landed: Called for each complete block; or None.
        stall: Seconds without progress after which the operation has failed.
        cut: Ends the channel, so that the other threads return; callable from any thread.
    """

    def __init__(
        self, what: str, blocks: Sequence[BlockView], landed: Landed | None, stall: float, cut: Callable[[], object]
    ) -> None:
        self._error: BaseException | None = None
        self._what = what
        self._blocks = blocks
        self._landed = landed
        self._stall = stall
        self._cut = cut
        self._lock = threading.Lock()
        self._reporting: list[int] = []  # positions; list append and pop need no lock
        self._moved_at = self._looked_at = time.monotonic()
        self._silent = 0.0

    def run(self, work: Callable[[], object]) -> None:
        """Run one thread's share. An error ends the operation for all threads, and the first one is kept."""
        self.moved()  # the thread may have been busy with the operation before this one
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - kept, and raised by check_error
            with self._lock:
                if self._error is None:
                    self._error = error
            self._cut()

    @property
    def failed(self) -> bool:
        """Whether a thread raised an error, so that the others have to return."""
        return self._error is not None

    def check_error(self) -> None:
        """Raise the first error of the threads. Call it once they have all returned."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # breaks the reference cycle between the error and this frame

    def moved(self) -> None:
        """Record that bytes moved."""
        self._moved_at = time.monotonic()

    def check_stall(self) -> None:
        """Check that bytes moved within the stall time. Waiting threads call it several times within that time.

        Raises:
            TransferTimeout: Nothing moved.
        """
        now = time.monotonic()
        with self._lock:
            if self._moved_at >= self._looked_at:
                self._silent = 0.0
            since = max(self._moved_at, self._looked_at)
            self._silent += min(now - since, self._stall * _LONGEST_LOOK)
            self._looked_at = now
            stalled = not self._reporting and self._silent > self._stall
        if stalled:
            raise TransferTimeout(f"{self._what} for {self._stall:g} s", hint="check that the peer is still running")

    def completed(self, place: int) -> None:
        """Record that a block is complete, and call `landed`, unless the operation has failed.

        Args:
            place: Position of the block in the call.
        """
        if self._landed is None or self._error is not None:
            return
        self._reporting.append(place)
        try:
            self._landed(self._blocks[place])
        finally:
            self._reporting.pop()
            self.moved()
