"""Runs a call, or an asynchronous context manager, in a task of its own.

- A task group belongs to the task that enters it, but fixtures of test frameworks and exit stacks of applications may
  enter and leave in different tasks.
- asyncio cancels a task as often as somebody asks for it: a time limit, a task group, the end of the application. Each
  time it interrupts what the task awaits, also a shielded block that closes a connection. Here the caller's task only
  waits, and what it waits for is cancelled once, by a cancel scope, which leaves shielded blocks alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio

from netloader.errors import LocalProtocolError

__all__ = ["OwnTask", "in_own_task"]

R = TypeVar("R")

_log = logging.getLogger("netloader")

_ONE_LOOP = "use it in the event loop in which it was entered; in pytest-asyncio, fixture and test need one loop_scope"
_END_OF_LOOP = "leave it before its event loop ends"


async def in_own_task(call: Callable[[], Awaitable[R]], name: str) -> R:
    """Run `call` in a task of its own, and wait until it has ended, also when this wait is cancelled.

    Args:
        call: What to run. Its end after a cancellation has to be bounded in time.
        name: Name of the task.

    Raises:
        BaseException: What the call raised. After a cancellation too: then it says more than the cancellation.
    """
    scope = anyio.CancelScope()
    results: list[R] = []

    async def run() -> None:
        with scope:
            results.append(await call())

    task = asyncio.create_task(run(), name=name)
    try:
        await asyncio.wait({task})
        task.result()
    except asyncio.CancelledError:
        scope.cancel()
        try:
            await _done(task)
        finally:
            if not task.cancelled():
                task.result()
        raise
    finally:
        del task  # it has the error, whose traceback has this frame
    return results.pop()


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
        self._scope = anyio.CancelScope()
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
            self._leave.set()
            self._scope.cancel()
            self._task = None
            await _done(task)
            if not task.cancelled() and (error := task.exception()):  # nobody else will ask for it
                _log.error("%s could not be left: %s", self._name, error, exc_info=error)
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
            LocalProtocolError: It is not running, its event loop is another one, or its task was cancelled.
            BaseException: What the context manager raised when it was left, or what ended its task before.
        """
        self.check_loop()
        task, self._task = self._task, None
        if task is None:
            raise LocalProtocolError(f"{self._name} is not running")
        self._leave.set()
        try:
            await _done(task)
            if task.cancelled():  # to its caller, the error of the task would say that the caller was cancelled
                raise LocalProtocolError(f"{self._name} ended before: its task was cancelled", hint=_END_OF_LOOP)
            task.result()
        finally:
            del task  # it has the error, whose traceback has this frame

    def check_loop(self) -> None:
        """Check that the calling task runs in the event loop in which the context manager was entered.

        Raises:
            LocalProtocolError: It runs in another one.
        """
        loop = None if self._task is None else self._task.get_loop()
        if loop is None or loop is asyncio.get_running_loop():
            return
        if loop.is_closed():
            raise LocalProtocolError(f"{self._name} ended with its event loop, which is closed", hint=_END_OF_LOOP)
        raise LocalProtocolError(f"{self._name} runs in another event loop than this call", hint=_ONE_LOOP)

    def check_running(self) -> None:
        """Check that the context manager is entered, and by this event loop.

        Raises:
            LocalProtocolError: It runs in another event loop, or it ended; its error is the cause.
        """
        self.check_loop()
        if self._task is not None and self._task.done():
            cause = None if self._task.cancelled() else self._task.exception()
            raise LocalProtocolError(f"{self._name} ended before", hint="leave it, which says why") from cause

    async def _run(self) -> None:
        with self._scope:
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
