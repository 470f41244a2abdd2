"""An event loop with simulated time: its clock stands still while there is work, and jumps to the next timer when idle.

Hours of waiting take moments, and the speed of the machine has no effect. Sockets and worker threads are real:
before each jump the loop waits a moment for sockets, and without a limit for threads that are working.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Awaitable, Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import pytest

from tests.loops import DebugLoop

R = TypeVar("R")

_START = 1000.0

_MOMENT = 0.001
"""Seconds of real time without news after which none is expected: what is sent over loopback is there at once."""

_CERTAINLY = 5.0
"""The same where no timer is left either: on a busy machine a moment is too short to say that nothing comes."""

_NO_LONGER = 30.0
"""Seconds of real time that a worker thread may be at work."""

_IN_ALL = 60.0
"""Seconds of real time that everything may take: more is work that goes round in circles, without any wait."""


class Clock:
    """The simulated time of the loop.

    Attributes:
        now: Seconds.
    Number of jumps.
        watching: Called before each jump: nothing is on its way then. Says whether to look once more before that.
    """

    def __init__(self) -> None:
        self.now = _START
        self.jumps = 0
        self.watching: Callable[[], bool] = lambda: False
        self.at_work: Callable[[], int] = lambda: 0

    def monotonic(self) -> float:
        return self.now

    @staticmethod
    def perf_counter() -> float:
        return time.perf_counter()


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, clock: Clock, moment: float) -> None:
        super().__init__()
        self._clock = clock
        self._moment = moment
        self._began = time.perf_counter()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if time.perf_counter() - self._began > _IN_ALL:
            raise AssertionError(f"it goes on and on, {self._clock.now - _START:g} s after the beginning")
        if timeout is not None and timeout <= 0:
            return super().select(0)
        news = super().select(self._moment)
        until = time.perf_counter() + _NO_LONGER
        while not news and self._clock.at_work() and time.perf_counter() < until:
            news = super().select(_MOMENT)
        if news:
            return news
        if self._clock.watching():
            news = super().select(100 * _MOMENT)
            if news:
                return news
            self._clock.watching()
        if timeout is None:
            news = super().select(_CERTAINLY)
            if news:
                return news
            raise AssertionError("nothing will ever happen again")
        self._clock.now += timeout
        self._clock.jumps += 1
        return []


class _JumpingLoop(DebugLoop):
    def __init__(self, clock: Clock, moment: float) -> None:
        self._jumping_clock = clock
        super().__init__(_JumpingSelector(clock, moment))

    def time(self) -> float:
        return self._jumping_clock.now

    async def shutdown_default_executor(self, *_: object) -> None:
        # From Python 3.12 on the runner sets a limit, which the clock would jump to: nobody borrows a token then.
        await super().shutdown_default_executor()


def run(work: Callable[[Clock], Awaitable[R]], *modules: ModuleType, alone: bool = False) -> R:
    """Run `work` in such a loop; the ``time`` of `modules` is replaced by its clock.

    `alone`: it uses neither sockets nor threads, so the clock jumps at once.
    """
    clock = Clock()

    async def watched() -> R:
        limiter = anyio.to_thread.current_default_thread_limiter()
        clock.at_work = lambda: limiter.borrowed_tokens
        return await work(clock)

    options: Mapping[str, Any] = {"debug": True, "loop_factory": lambda: _JumpingLoop(clock, 0.0 if alone else _MOMENT)}
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "time", clock)
        return anyio.run(watched, backend_options=dict(options))
