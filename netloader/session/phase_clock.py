"""How long a session was in each of its states."""

from __future__ import annotations

import time

from netloader.core.protocol import State

__all__ = ["PhaseClock"]


class PhaseClock:
    """Seconds spent in each state.

    Args:
        began: When the first one began.
    """

    def __init__(self, began: float) -> None:
        self._seconds: dict[State, float] = {}
        self._state = State.LISTEN
        self._since = began

    def move(self, state: State) -> tuple[State, float]:
        """Account for the time since the last call, and go on in `state`. Returns the state before, and that time."""
        now = time.monotonic()
        before, seconds = self._state, now - self._since
        self._seconds[before] = self._seconds.get(before, 0.0) + seconds
        self._state, self._since = state, now
        return before, seconds

    def seconds(self) -> dict[State, float]:
        """Seconds in each state that was visited, up to the last move."""
        return dict(self._seconds)
