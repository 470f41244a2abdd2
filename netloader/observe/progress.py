"""Displays of the progress of a pull: a bar on a terminal, plain lines elsewhere.

Both are progress callbacks and observers. They take the time from the events, not from a clock, so a test can control
it.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from netloader.core.report import Progress
from netloader.core.texts import byte_text, time_text
from netloader.observe.events import Event

__all__ = ["ProgressBar", "ProgressLog", "Rate", "byte_text", "time_text"]

_SAMPLE_EVERY = 0.05
_NARROWEST = 10


class Rate:
    """Bytes per second over the last few seconds.

    Args:
        window: Length of the period in seconds.
    """

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, seconds: float, nbytes: int) -> None:
        """Record that `nbytes` in all were verified at time `seconds`. Times must not decrease."""
        samples = self._samples
        if len(samples) > 1 and seconds - samples[-2][0] < _SAMPLE_EVERY:
            samples.pop()
        samples.append((seconds, nbytes))
        while len(samples) > 2 and samples[1][0] <= seconds - self._window:  # noqa: PLR2004 - two make a rate
            samples.popleft()

    @property
    def per_second(self) -> float:
        """The rate; 0 when no time has passed."""
        (begin, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - begin) if end > begin else 0.0


class _Display(ABC):
    """The common base of both displays: the rate, and when to update."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._rate = Rate()
        self._said = 0.0
        self._done = False

    def __call__(self, progress: Progress | Event) -> None:
        """Record progress, and show it if an update is due. Events other than `BlocksVerified` are ignored."""
        if not isinstance(progress, Progress):
            return
        self._rate.add(progress.seconds, progress.verified)
        if self._done:
            return
        self._done = 0 < progress.total <= progress.verified
        if self._done or progress.seconds - self._said >= self._every:
            self._said = progress.seconds
            self.show(progress)

    @abstractmethod
    def show(self, progress: Progress) -> None:
        """Write `progress` to the display."""

    def _speed(self, progress: Progress) -> tuple[str, str]:
        """The rate, and the estimated time left; the latter is empty when it is not known."""
        rate, left = self._rate.per_second, progress.total - progress.verified
        if self._done and progress.seconds > 0:  # the average over the whole pull
            rate = progress.verified / progress.seconds
        return f"{byte_text(rate)}/s", time_text(left / rate) if rate > 0 and progress.total else ""


class ProgressLog(_Display):
    """Plain lines: one every few seconds, and one at the end.

    Args:
        emit: Takes a line, for example ``logger.info``.
        every: Seconds between two lines.
        verb: First word of each line.
    """

    def __init__(self, emit: Callable[[str], object], *, every: float = 5.0, verb: str = "pulled") -> None:
        super().__init__(every)
        self._emit = emit
        self._verb = verb

    def show(self, progress: Progress) -> None:
        """Emit a line."""
        rate, left = self._speed(progress)
        share = f" ({100 * progress.verified // progress.total}%)" if progress.total else ""
        rest = "" if self._done or not left else f", {left} left"
        of_all = f"{byte_text(progress.verified)} of {byte_text(progress.total)}{share}"
        self._emit(f"{self._verb} {of_all}, {rate}{rest}")


class ProgressBar(_Display):
    """A bar in the last line of a terminal. A context manager: leaving it moves the cursor to the next line.

    Args:
        stream: The terminal.
        every: Seconds between two drawings.
        columns: Returns the width of the terminal.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        every: float = 0.1,
        columns: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ) -> None:
        super().__init__(every)
        self._stream = stream
        self._columns = columns
        self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()

    def show(self, progress: Progress) -> None:
        """Draw the bar."""
        rate, left = self._speed(progress)
        share = progress.verified / progress.total if progress.total else 0.0
        text = f"{byte_text(progress.verified)} of {byte_text(progress.total)}  {rate}  {left or '-:--'} left"
        room = self._columns() - len(text) - len(" 100% || ") - 1
        if room >= _NARROWEST:
            filled = int(share * room)
            text = f"|{'#' * filled}{'-' * (room - filled)}| {text}"
        self._stream.write(f"\r\x1b[K{int(100 * share):4}% {text}"[: self._columns() + len("\x1b[K")])
        self._stream.flush()
        self._drawn = True
