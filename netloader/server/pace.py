"""Limits how much time something takes on average, and lets some of it pass at once. Pure: time is an argument."""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """Says how long to wait before the next one, so that what was spent is spread over time.

    Args:
        burst: Seconds that may be spent without a wait, after as many seconds in which nothing was spent.
    """

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._free_at = 0.0

    def spend(self, seconds: float, now: float) -> None:
        """Something happened after which the next one is to come later, by `seconds` on average."""
        self._free_at = max(self._free_at, now - self._burst) + seconds

    def wait(self, now: float) -> float:
        """Seconds to wait before the next one; 0 for none."""
        return max(0.0, self._free_at - now)
