"""Runs an asynchronous context manager in a task of its own, so that it may be entered in one task and left in another.

A task group belongs to the task that enters it, but fixtures of test frameworks and exit stacks of applications may
enter and leave in different tasks.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio

from netloader.errors import LocalProtocolError

__all__ = ["OwnTask"]

_log = logging.getLogger("netloader")


class OwnTask:
    """The task in which a context manager is entered and left.

    Args:
        manager: The context manager. Its end has to be bounded in time.
        name: Name of the task, for messages.
    """

    def __init__(self, manager: AbstractAsyncContextManager[Any], name: str) -> None:
        self._manager = manager
        self._name = name
        self._leave = asyncio.Event()
        self._entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def enter(self) -> None:
        """Enter the context manager. If this fails or is cancelled, its task has ended.

        Raises:
            BaseException: What the context manager raised.
        """
        task = self._task = asyncio.create_task(self._run(), name=self._name)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait({task, self._entered}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            task.cancel()
            await _done(task)
            raise
        if not self._entered.done():
            self._task = None
            try:
                task.result()
            finally:
                del task  # it has the error, whose traceback has this frame

    async def leave(self) -> None:
        """Leave the context manager, and wait until it has ended, also when this wait is cancelled.

        Raises:
            LocalProtocolError: It is not running.
            BaseException: What the context manager raised when it was left, or what ended its task before.
        """
        task, self._task = self._task, None
        if task is None:
            raise LocalProtocolError(f"{self._name} is not running")
        self._leave.set()
        try:
            await _done(task)
            task.result()
        finally:
            del task  # it has the error, whose traceback has this frame

    async def _run(self) -> None:
        async with self._manager:
            self._entered.set_result(None)
            await self._leave.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log an end that nobody asked for: it is raised only when the context manager is left."""
        if self._entered.done() and not self._leave.is_set():
            error = None if task.cancelled() else task.exception()
            _log.error("%s ended unexpectedly: %s", self._name, error or "its task was cancelled", exc_info=error)


async def _done(task: asyncio.Task[None]) -> None:
    """Wait for `task`. A cancellation of this wait is raised once the task is done."""
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
