"""The event loop of the tests."""

from __future__ import annotations

import asyncio
import math
import selectors

__all__ = ["DebugLoop"]


class DebugLoop(asyncio.SelectorEventLoop):
    """An event loop in asyncio's debug mode that does not note where futures, tasks and calls were made.

    Every check of debug mode is made: what it does for them it does by itself. Others ask whether it is in debug mode,
    and are told no: they would only note stacks, pytest's and all, which costs a quarter of a test's processor time.

    Slow steps are not logged: how long one takes depends on what else the machine does, and a test that counts log
    lines would count them. Calls that block are found by `tests.guards`.
    """

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        super().__init__(selector)
        self.slow_callback_duration = math.inf

    def get_debug(self) -> bool:
        """Whether futures and others are to note stacks."""
        return False
