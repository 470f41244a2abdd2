"""The event loop of a worker's server, in a thread of its own. Every call from another thread has a time limit."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from netloader.api import Server
from netloader.errors import NetloaderError

__all__ = ["ANSWER_TIMEOUT", "ServerLoop", "ServerLost"]

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = 10.0
"""Seconds that a call may take in addition to its work. An engine that goes to sleep or wakes up waits for the call.
On a busy machine, the loop begins a call in well under a second."""

_START_WITHIN = 60.0
_CHECK_INTERVAL = 1.0
"""Seconds between two checks whether the thread is alive, for calls without a time limit of their own."""

_Result = TypeVar("_Result")


class ServerLost(NetloaderError):
    """The server of this process does not answer: its event loop has ended, or is blocked."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the server of this process gives no answer: {why}", hint="its log says why")


class ServerLoop:
    """A server with an event loop of its own, in a daemon thread.

    Args:
        make: Constructs the server, in the loop.
        name: The name of the server, for the log.

    Raises:
        ConfigError: The server's address can't be bound.
        TransportUnavailable: No transport can run here.
        TimeoutError: The server did not start in time. It is ended if it starts later.

    Attributes:
        server: The server. Its methods may be called in the loop only.
    """

    def __init__(self, make: Callable[[], Server], name: str) -> None:
        self._name = name
        self._started: Future[tuple[asyncio.AbstractEventLoop, contextvars.Context, anyio.Event, TaskGroup, Server]]
        self._started = Future()
        self._thread = threading.Thread(target=self._run, args=(make,), name="netloader-server", daemon=True)
        self._thread.start()
        try:
            started = self._started.result(_START_WITHIN)
        except TimeoutError:
            if self._started.cancel():  # a server that starts later ends at once, because nobody could end it
                raise
            started = self._started.result()
        self._loop, self._context, self._stop, self._tasks, self.server = started

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def _run(self, make: Callable[[], Server]) -> None:
        try:
            anyio.run(self._serve, make)
        except BaseException as error:
            if self._started.done():
                log.exception("netloader: the server of %s ended", self._name)
            else:
                self._started.set_exception(error)

    async def _serve(self, make: Callable[[], Server]) -> None:
        stop = anyio.Event()
        async with make() as server, anyio.create_task_group() as tasks:
            loop, context = asyncio.get_running_loop(), contextvars.copy_context()
            if not self._started.set_running_or_notify_cancel():
                return
            self._started.set_result((loop, context, stop, tasks, server))
            await stop.wait()
            tasks.cancel_scope.cancel()

    def call(
        self, function: Callable[..., Awaitable[_Result] | _Result], *arguments: Any, within: float = 0.0
    ) -> _Result:
        """Call a function in the loop, and wait for its result.

        Args:
            function: The function; its result is awaited if it is awaitable.
            arguments: Its arguments.
            within: Seconds that the work itself may take.

        Raises:
            ServerLost: There is no result after `within` plus ANSWER_TIMEOUT seconds, or the loop has ended. The call
                is cancelled, or not begun any more.
        """
        seconds = within + ANSWER_TIMEOUT
        answer = self._begin(time.monotonic() + seconds, function, arguments)
        if not wait([answer], seconds).done:
            raise ServerLost(f"its event loop stood still for {seconds:g} s")
        return _result_of(answer)

    def call_to_completion(self, function: Callable[[], Awaitable[_Result]]) -> _Result:
        """Call a function that has a time limit of its own, and wait until it has ended.

        The caller may not stop waiting earlier, because the work could still be going on.

        Raises:
            ServerLost: The loop has ended, and the work with it.
        """
        answer: Future[_Result] = self._begin(math.inf, function, ())
        try:
            while not wait([answer], _CHECK_INTERVAL).done:
                if not self.alive and not answer.done():  # a result that came just before the end counts
                    raise ServerLost("its event loop has ended")
        except BaseException:
            answer.cancel()  # the caller's thread is being ended, and nothing uses the result
            raise
        return _result_of(answer)

    def end(self, within: float = 0.0) -> None:
        """End the server, and wait at most `within` seconds. A blocked loop ends when it goes on."""
        if not self.alive:
            return
        with suppress(RuntimeError):  # the loop has just been closed
            self._loop.call_soon_threadsafe(self._stop.set)
        if within > 0:
            self._thread.join(within)

    def _begin(
        self, until: float, function: Callable[..., Awaitable[_Result] | _Result], arguments: tuple[Any, ...]
    ) -> Future[_Result]:
        answer: Future[_Result] = Future()

        def begin() -> None:
            try:
                self._tasks.start_soon(partial(self._carry_out, answer, until, function, arguments))
            except RuntimeError as error:  # the group is closed: the loop is about to end
                answer.set_exception(ServerLost(str(error)))

        try:
            self._loop.call_soon_threadsafe(begin, context=self._context.copy())
        except RuntimeError as error:
            raise ServerLost(str(error)) from error  # "Event loop is closed"
        return answer

    async def _carry_out(
        self,
        answer: Future[_Result],
        until: float,
        function: Callable[..., Awaitable[_Result] | _Result],
        arguments: tuple[Any, ...],
    ) -> None:
        with anyio.CancelScope(deadline=anyio.current_time() + until - time.monotonic()) as scope:
            answer.add_done_callback(partial(self._cancel, scope))
            try:
                await anyio.lowlevel.checkpoint()  # raises if nothing waits for the result any more
                found = function(*arguments)
                result: _Result = await found if inspect.isawaitable(found) else found
            except Exception as error:  # noqa: BLE001 - raised in the thread that asked
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(error)
            except BaseException:
                if answer.set_running_or_notify_cancel():
                    answer.set_exception(ServerLost("it was stopped, or took too long"))
                raise
            else:
                if answer.set_running_or_notify_cancel():
                    answer.set_result(result)

    def _cancel(self, scope: anyio.CancelScope, answer: Future[Any]) -> None:
        if answer.cancelled():
            with suppress(RuntimeError):  # the loop has ended, and the call with it
                self._loop.call_soon_threadsafe(scope.cancel)


def _result_of(answer: Future[_Result]) -> _Result:
    try:
        return answer.result()
    except CancelledError as error:
        raise ServerLost("what it was asked for was cancelled") from error
