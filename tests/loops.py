"""The event loop of the tests."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["DebugLoop"]


class DebugLoop(asyncio.SelectorEventLoop):
    """An event loop for asyncio's debug mode that does not note for each future where it was made.

    Every check of debug mode is made, and tasks still tell where they were started. For futures that costs a tenth
    of a test's processor time, since the whole stack is noted, pytest's and all.
    """

    def create_future(self) -> asyncio.Future[Any]:
        """A future that belongs to this loop."""
        debug = self.get_debug()
        self._debug = False
        try:
            return super().create_future()
        finally:
            self._debug = debug
