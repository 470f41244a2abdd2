"""Calls that may wait for a file system, in a thread, with a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from netloader.errors import DiscoveryError

__all__ = ["OffLoop"]

T = TypeVar("T")


class OffLoop:
    """Runs one call after another in a worker thread.

    A thread that waits for a file system which does not answer can't be ended. It is left behind, and no other one is
    started until it has returned.

    Args:
        seconds: After which a call has failed.
        what: What is waited for, in messages.
    """

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._what = what
        self._running = False

    async def run(self, call: Callable[[], T]) -> T:
        """The result of a call.

        Raises:
            DiscoveryError: It, or the one before it, has not returned in time.
            OSError: Raised by the call.
        """

        def run() -> T:
            self._running = True
            try:
                return call()
            finally:
                self._running = False

        if self._running:
            raise self._late()
        try:
            with anyio.fail_after(self._seconds):
                return await anyio.to_thread.run_sync(run, abandon_on_cancel=True)
        except TimeoutError as error:
            raise self._late() from error

    def _late(self) -> DiscoveryError:
        return DiscoveryError(
            f"{self._what} does not answer within {self._seconds:g} s", hint="check that its file system is reachable"
        )
