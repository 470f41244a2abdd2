"""The event loop of a worker's server: a thread of its own, and questions to it that never wait without a bound."""

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

__all__ = ["ANSWER_WITHIN", "ServerLoop", "ServerLost"]

log = logging.getLogger(__name__)

ANSWER_WITHIN = 10.0
"""Seconds that the loop may let a caller wait beyond what the work itself takes: an engine that goes to sleep, or wakes
up, waits for it. On a busy machine a loop gets round to a question in well under a second."""

_START_WITHIN = 60.0
_LOOK_AGAIN = 1.0
"""Seconds between two looks whether the thread still lives, for what has no bound."""

_Result = TypeVar("_Result")


class ServerLost(NetloaderError):
    """The server of this process gives no answer: its event loop has ended, or stands still."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the server of this process gives no answer: {why}", hint="its log says why")


class ServerLoop:
    """A server with an event loop of its own, in a daemon thread.

    Args:
        make: Makes the server, in the loop.
        name: Of the server, for the log.

    Raises:
        ConfigError: The server's address can't be bound.
        TransportUnavailable: No transport can run here.
        TimeoutError: The server did not start in time.

    Attributes:
        server: The server; its methods belong to the loop.
    """

    def __init__(self, make: Callable[[], Server], name: str) -> None:
        self._name = name
        self._started: Future[tuple[asyncio.AbstractEventLoop, contextvars.Context, anyio.Event, TaskGroup, Server]]
        self._started = Future()
        self._thread = threading.Thread(target=self._run, args=(make,), name="netloader-server", daemon=True)
        self._thread.start()
        self._loop, self._context, self._stop, self._tasks, self.server = self._started.result(_START_WITHIN)

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
            self._started.set_result((loop, context, stop, tasks, server))
            await stop.wait()
            tasks.cancel_scope.cancel()

    def ask(
        self, function: Callable[..., Awaitable[_Result] | _Result], *arguments: Any, within: float = 0.0
    ) -> _Result:
        """Have the loop carry something out, and wait for the result.

        Args:
            function: Called in the loop; awaited, if it is asynchronous.
            arguments: Its arguments.
            within: Seconds that the work itself may take.

        Raises:
            ServerLost: There is no result after that time and ANSWER_WITHIN, or the loop has ended. What was asked for
                is not begun any more then, and cancelled where it was begun.
        """
        seconds = within + ANSWER_WITHIN
        answer = self._begin(time.monotonic() + seconds, function, arguments)
        if not wait([answer], seconds).done:
            raise ServerLost(f"its event loop stood still for {seconds:g} s")
        return _result_of(answer)

    def ask_to_the_end(self, function: Callable[[], Awaitable[_Result]]) -> _Result:
        """The same for work that has a bound of its own, and that nobody may give up while it could still go on.

        Raises:
            ServerLost: The loop has ended, and the work with it.
        """
        answer: Future[_Result] = self._begin(math.inf, function, ())
        try:
            while not wait([answer], _LOOK_AGAIN).done:
                if not self.alive and not answer.done():  # what came in the last moment is what became of the work
                    raise ServerLost("its event loop has ended")
        except BaseException:
            answer.cancel()  # the caller's thread is being ended: nobody is left to use what comes
            raise
        return _result_of(answer)

    def end(self, within: float = 0.0) -> None:
        """End the server, and wait so many seconds for that; a loop that stands still ends when it goes on."""
        if not self.alive:
            return
        with suppress(RuntimeError):  # the loop was closed this very moment
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
                await anyio.lowlevel.checkpoint()  # nobody waits any more: nothing is begun
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
            with suppress(RuntimeError):  # the loop has ended, and all that ran in it
                self._loop.call_soon_threadsafe(scope.cancel)


def _result_of(answer: Future[_Result]) -> _Result:
    try:
        return answer.result()
    except CancelledError as error:
        raise ServerLost("what it was asked for was cancelled") from error
