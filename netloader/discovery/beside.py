"""A task that runs while a context is open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

__all__ = ["beside"]

_LEAVING = 5.0
"""Seconds that a task may take to end after it was cancelled."""

_log = logging.getLogger("netloader")


@asynccontextmanager
async def beside(call: Callable[[], Awaitable[None]], name: str) -> AsyncIterator[None]:
    """Run `call` in a task while the context is open. No task group: an async generator may hold this open.

    An error of the body is raised as it is. One of `call` is logged at once, and so is that it does not end in time.

    Args:
        call: Runs until it is cancelled.
        name: Of the task.
    """
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await call()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s has ended: %s", name, error, exc_info=error)

    task = asyncio.create_task(run(), name=name)
    task.add_done_callback(ended)
    try:
        yield
    finally:
        scope.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task}, timeout=_LEAVING)
        if not task.done():
            _log.error("%s does not end within %g s after it was cancelled", name, _LEAVING)
