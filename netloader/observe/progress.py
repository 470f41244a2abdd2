"""Displays of the progress of a pull: a bar on a terminal, plain lines elsewhere.

Both are progress callbacks and observers. They take the time from the events, not from a clock, so a test can control
it.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TextIO

from netloader.core.report import Progress
from netloader.core.texts import byte_text, time_text
from netloader.observe.events import Event, PhaseEnded, SourceWaiting

__all__ = ["Display", "ProgressBar", "ProgressLog", "Rate", "byte_text", "time_text"]

_SAMPLE_EVERY = 0.05
_NARROWEST = 10
_LONGEST_SILENCE = 30.0
"""Most seconds between two lines about one wait, unless lines are asked for less often."""


class Rate:
    """Bytes per second over the last few seconds.

    Args:
        window: Length of the period in seconds.
        begin: Time from which to count, and bytes verified by then.
    """

    def __init__(self, window: float = 5.0, *, begin: tuple[float, int] = (0.0, 0)) -> None:
        self._window = window
        self._samples: deque[tuple[float, int]] = deque([begin])

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


class Display(ABC):
    """The common base of both displays: the rate, and when to update.

    The rate counts from the time when the first channel was open, or when the pull last waited: it is a rate of the
    transfer.
    """

    def __init__(self, every: float) -> None:
        self._every = every
        self._rate = Rate()
        self._said = 0.0
        self._done = False
        self._verified = 0
        self._waited = 0.0  # in all waits
        self._wait = 0.0  # in the last one
        self._prepared = 0.0  # connecting and opening channels, before the first block

    def __call__(self, progress: Progress | Event) -> None:
        """Record progress or a wait, and show it if an update is due. Most other events are ignored."""
        if isinstance(progress, PhaseEnded):
            if progress.side == "client" and progress.phase in ("connect", "plan") and not self._verified:
                self._prepared += progress.seconds
            return
        if isinstance(progress, SourceWaiting):
            again = progress.waited >= self._wait
            self._waited += progress.waited - (self._wait if again else 0.0)
            self._wait = progress.waited
            self._rate = Rate(begin=(progress.seconds, self._verified))
            if not self._done:
                self.show_wait(progress)
        if not isinstance(progress, Progress):
            return
        if progress.verified and not self._verified:
            self._prepared = min(self._prepared, progress.seconds - self._waited)
            self._rate = Rate(begin=(self._prepared + self._waited, 0))
        self._verified = progress.verified
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

    @abstractmethod
    def show_wait(self, wait: SourceWaiting) -> None:
        """Write for what the pull waits to the display. Called about once per second."""

    def _speed(self, progress: Progress) -> tuple[str, str]:
        """The rate, and the estimated time left; the latter is empty when it is not known."""
        rate, left = self._rate.per_second, progress.total - progress.verified
        seconds = progress.seconds - self._waited - self._prepared
        if self._done and seconds > 0:  # the average of the whole transfer
            rate = progress.verified / seconds
        return f"{byte_text(rate)}/s", time_text(left / rate) if rate > 0 and progress.total else ""


class ProgressLog(Display):
    """Plain lines: one every few seconds, and one at the end.

    While a pull waits, the lines say for what. Their distance grows to half a minute, if the reason stays the same.

    Args:
        emit: Takes a line, for example ``logger.info``.
        every: Seconds between two lines.
        verb: First word of each line about bytes.
        last: Whether to write a line at the end. Without it, nothing repeats the summary of the pull.
    """

    def __init__(
        self, emit: Callable[[str], object], *, every: float = 5.0, verb: str = "pulled", last: bool = True
    ) -> None:
        super().__init__(every)
        self._emit = emit
        self._verb = verb
        self._last = last
        self._pause = every
        self._reason = ""

    def show(self, progress: Progress) -> None:
        """Emit a line."""
        if self._done and not self._last:
            return
        rate, left = self._speed(progress)
        share = f" ({100 * progress.verified // progress.total}%)" if progress.total else ""
        rest = "" if self._done or not left else f", {left} left"
        of_all = f"{byte_text(progress.verified)} of {byte_text(progress.total)}{share}"
        self._emit(f"{self._verb} {of_all}, {rate}{rest}")

    def show_wait(self, wait: SourceWaiting) -> None:
        """Emit a line if enough time has passed since the last one."""
        if wait.reason != self._reason:
            self._pause, self._reason = self._every, wait.reason
        if wait.seconds - self._said >= self._pause:
            self._said = wait.seconds
            self._pause = max(self._every, min(2 * self._pause, _LONGEST_SILENCE))
            self._emit(str(wait))


class ProgressBar(Display):
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
        begin, left = f"{int(100 * share):4}%", f"{left or '-:--'} left"
        whole = f"{byte_text(progress.verified)} of {byte_text(progress.total)}  {rate}  {left}"
        room = self._columns() - len(f"{begin} || {whole}") - 1
        if room >= _NARROWEST:
            filled = int(share * room)
            whole = f"|{'#' * filled}{'-' * (room - filled)}| {whole}"
        self._draw([f"{begin} {whole}", f"{begin} {rate}  {left}", f"{begin} {left}", begin.lstrip()])

    def show_wait(self, wait: SourceWaiting) -> None:
        """Write for what the pull waits, in place of the bar."""
        times = f"{wait.waited:.0f} of {wait.limit:.0f} s"
        self._draw([str(wait), f"waiting for {wait.source or 'a source'}, {times}", f"waiting, {times}", times])

    def _draw(self, texts: Sequence[str]) -> None:
        """Draw the first of `texts` that fits: fields are left out, because a number that is cut looks like another."""
        text = next((text for text in texts if len(text) <= self._columns()), "")
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()
        self._drawn = True
