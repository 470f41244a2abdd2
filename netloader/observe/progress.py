"""How far a pull is, for people: a bar on a terminal, plain lines everywhere else.

Both are progress callbacks, and observers. They take the time from what they are told, so that they behave the same in
a test.
"""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from netloader.core.report import Progress
from netloader.observe.events import Event

__all__ = ["ProgressBar", "ProgressLog", "Rate", "byte_text", "time_text"]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_STEP = 1000
_SAMPLE_EVERY = 0.05
_NARROWEST = 10


def byte_text(nbytes: float) -> str:
    """A number of bytes with three digits or four: ``512 B``, ``4.19 MB``, ``141 GB``."""
    value, unit = float(nbytes), 0
    while value >= _STEP - 0.5 and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    digits = 0 if unit == 0 else max(0, 2 - len(str(int(value))) + 1)
    return f"{value:.{digits}f} {_UNITS[unit]}"


def time_text(seconds: float) -> str:
    """A time in whole seconds, rounded up: ``0:07``, ``12:05``, ``1:02:09``."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Rate:
    """Bytes per second over the last few seconds.

    Args:
        window: How many seconds count.
    """

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._samples: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, seconds: float, nbytes: int) -> None:
        """Take note that `nbytes` in all were there at time `seconds`; times do not decrease."""
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
    """What both forms share: the words, and when to say them."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._rate = Rate()
        self._said = 0.0
        self._done = False

    def __call__(self, progress: Progress | Event) -> None:
        """Take note of progress, and show it when it is time. Other events than `BlocksVerified` change nothing."""
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
        """Write it where it belongs."""

    def _speed(self, progress: Progress) -> tuple[str, str]:
        """The rate and the time that is left; the latter empty when it can't be known."""
        rate, left = self._rate.per_second, progress.total - progress.verified
        if self._done and progress.seconds > 0:  # over all of it, now that this is known
            rate = progress.verified / progress.seconds
        return f"{byte_text(rate)}/s", time_text(left / rate) if rate > 0 and progress.total else ""


class ProgressLog(_Display):
    """Plain lines: one every few seconds, and one when all is there.

    Args:
        emit: Takes a line (``logger.info``, say).
        every: Seconds between two lines.
        verb: What is happening.
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
    """A bar that is drawn again and again in the last line of a terminal; a context manager that leaves that line.

    Args:
        stream: The terminal.
        every: Seconds between two drawings.
        columns: Gives the width of the terminal.
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
