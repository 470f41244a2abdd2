"""One operation of a channel, carried out by several threads at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from netloader.errors import TransferTimeout
from netloader.transports.base import BlockView, Landed

__all__ = ["Operation"]

_LONGEST_LOOK = 1 / 4
"""Part of the stall time that one look counts for at most, however long ago the look before it was: where the process
or its host stood still, the peer has not been silent for as long as the clock says."""


class Operation:
    """What the threads that move the blocks of one call have in common: progress, the first error, and whom to tell.

    Blocks complete in any order. Whichever thread completes one reports it at once, beside the others: whoever is told
    may take a while (blocks are hashed then), and one thread alone would be slower at that than several are at moving
    bytes.

    Args:
        what: The operation, for messages (``the peer sends nothing``).
        blocks: All blocks of the call, in order.
        landed: Told about each block; or None.
        stall: Seconds without progress after which it has failed.
        cut: Ends the channel, so that the other threads come back; callable from any thread.
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
        self._reporting: list[int] = []  # places; adding to it and taking from it need no lock
        self._moved_at = self._looked_at = time.monotonic()
        self._silent = 0.0

    def run(self, work: Callable[[], object]) -> None:
        """One thread's share; what it raises ends the operation for all of them, and is kept if it is the first."""
        self.moved()  # the thread may have been busy with the operation before this one
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - kept: raised by whoever waits for the operation
            with self._lock:
                if self._error is None:
                    self._error = error
            self._cut()

    @property
    def failed(self) -> bool:
        """Whether one of the threads raised something: the others are told to come back."""
        return self._error is not None

    def check_error(self) -> None:
        """Raise the first thing that any of the threads raised. Once they are all back."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # the error knows this frame: without this they would keep each other alive

    def moved(self) -> None:
        """Note that bytes moved."""
        self._moved_at = time.monotonic()

    def check_stall(self) -> None:
        """See whether anything moved lately. To be called several times within the stall time, while waiting.

        Raises:
            TransferTimeout: Nothing did.
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
            raise TransferTimeout(f"{self._what} for {self._stall:g} s", hint="is the peer still alive?")

    def completed(self, place: int) -> None:
        """Note that all bytes of a block are where they belong, and report it, unless the operation has failed.

        Args:
            place: Place of the block in the call.
        """
        if self._landed is None or self._error is not None:
            return
        self._reporting.append(place)
        try:
            self._landed(self._blocks[place])
        finally:
            self._reporting.pop()
            self.moved()
