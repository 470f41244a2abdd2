"""A thread for blocking calls that is driven from an event loop, and always joined."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

from netloader.errors import ChannelClosed, shortage
from netloader.transports.io.channel_state import LoopEvent, finished_within

__all__ = ["Job", "Worker"]

T = TypeVar("T")

_TURNS = 8
"""Iterations of the event loop to wait for a thread that has finished its last call: most need one or two."""

_JOIN_EVERY = 0.0005
"""Seconds between later checks whether it has ended."""

_PATIENCE = 30.0
"""Seconds that a call may take to return after it was told to. Then an error is logged, and it is not waited for."""

_AGAIN = 0.5
"""Seconds to wait for a thread that is known to be stuck."""

_log = logging.getLogger(__name__)


class Job(Generic[T]):
    """A call in the worker's thread.

    Attributes:
        over: Set when it has returned or raised.
        error: What it raised, until :meth:`result` raises it.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self.over = LoopEvent()
        self._call = call
        self._value: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call; in the worker's thread."""
        try:
            self._value.append(self._call())
        except BaseException as error:  # noqa: BLE001 - result() raises it
            _forget_locals(error)
            self.error = error
        finally:
            del self._call  # drops what it refers to
            self.over.set()

    def result(self) -> T:
        """What the call returned; raises what it raised. Only once `over`."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # breaks the reference cycle between the error and this frame
        return self._value[0]


class Worker:
    """One thread that makes blocking calls in order.

    It is created and used in one event loop. The thread is a daemon, so that a call that hangs in a foreign library
    can't keep an ending process alive. :meth:`aclose` waits for it.

    Args:
        name: Name of the thread.
        free: Makes the running call return soon; callable from any thread, must not block.

    Raises:
        TransportError: No more threads can be started.

    Attributes:
        closing: Whether it accepts no more calls.
        stuck: Whether a wait for it timed out.
        thread: The thread.
    """

    def __init__(self, name: str, free: Callable[[], object]) -> None:
        self._free = free
        self._jobs: queue.SimpleQueue[Job[object] | None] = queue.SimpleQueue()
        self.closing = False
        self.stuck = False
        self._lock = threading.Lock()
        self._last: Callable[[], object] | None = None
        self._left = False
        self._gone = LoopEvent()
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            raise shortage(error) or error from error

    @property
    def name(self) -> str:
        """Name of the thread."""
        return self.thread.name

    @property
    def patience(self) -> float:
        """Seconds that :meth:`finish` waits for a call to return after it was told to."""
        return _PATIENCE

    def start(self, call: Callable[[], T]) -> Job[T]:
        """Queue `call` behind earlier calls."""
        if self.closing:
            raise ChannelClosed(f"{self.name} is closed")
        job = Job(call)
        self._jobs.put(job)  # type: ignore[arg-type]  # a queue of jobs of all kinds
        return job

    async def finish(self, job: Job[T], watch: Callable[[], None] | None = None, every: float = 1.0) -> T:
        """Wait for a job.

        When this is cancelled, or `watch` raises, the running call is told to return. This method then waits until it
        has returned, or until that takes too long. `job.over` tells which.

        Args:
            job: From :meth:`start`.
            watch: Called in the event loop at intervals while the job runs.
            every: The interval in seconds.
        """
        try:
            while not job.over.is_set():
                with anyio.move_on_after(None if watch is None else every) as waited:
                    await job.over.wait()
                if waited.cancelled_caught and watch is not None:
                    watch()
        except BaseException:
            self._free()
            if not await finished_within(_PATIENCE, job.over.wait):
                self.stuck = True
                _log.error("thread %s did not return within %g s after it was told to", self.name, _PATIENCE)
            raise
        return job.result()

    async def run(self, call: Callable[[], T]) -> T:
        """Make a blocking call and wait for it; see :meth:`finish`."""
        return await self.finish(self.start(call))

    def end(self) -> None:
        """Let the thread end after the queued calls. No more calls are accepted. Idempotent."""
        if not self.closing:
            self.closing = True
            self._jobs.put(None)

    async def aclose(self, within: float) -> bool:
        """Let the thread end, as :meth:`end` does, and join it.

        Returns:
            Whether it has ended; False when it was still busy after `within` seconds.
        """
        self.end()
        gone = await finished_within(_AGAIN if self.stuck else within, self.gone)
        self.stuck = not gone
        return gone

    async def gone(self) -> None:
        """Wait until the thread has ended. Call :meth:`end` first."""
        await self._gone.wait()
        for _ in range(_TURNS):
            if self.thread.is_alive():
                await anyio.lowlevel.checkpoint()
        while self.thread.is_alive():  # noqa: ASYNC110 - the end of a thread sets no event
            await anyio.sleep(_JOIN_EVERY)

    def last(self, call: Callable[[], object]) -> None:
        """Have `call` made once, after all other calls: in the thread, or here when the thread has ended already."""
        with self._lock:
            if not self._left:
                self._last = call
                return
        call()

    def _main(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job
        with self._lock:
            self._left, call = True, self._last
        if call is not None:
            call()
        self._gone.set()


def _forget_locals(error: BaseException) -> None:
    """Clear the frames of an error, so that a stored error does not keep sockets alive."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            pending += [one.__cause__, one.__context__]
