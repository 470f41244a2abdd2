"""Measures how long a session stays in each state."""

from __future__ import annotations

import time

from netloader.core.protocol import State

__all__ = ["PhaseClock"]


class PhaseClock:
    """Seconds spent in each state.

    Args:
        began: When the first state began, by the monotonic clock.
    """

    def __init__(self, began: float) -> None:
        self._seconds: dict[State, float] = {}
        self._state = State.LISTEN
        self._since = began

    def enter(self, state: State) -> tuple[State, float]:
        """Enter `state`. Returns the previous state and the seconds spent in it since it was entered."""
        now = time.monotonic()
        before, seconds = self._state, now - self._since
        self._seconds[before] = self._seconds.get(before, 0.0) + seconds
        self._state, self._since = state, now
        return before, seconds

    def seconds(self) -> dict[State, float]:
        """Seconds in each visited state, up to the last call of :meth:`enter`."""
        return dict(self._seconds)
