"""Events: points on a stream that others wait for."""

from __future__ import annotations

import time
from typing import Any

from ._streams import Joinable, Stream, streams


class Event:
    """The work that a stream had pending when the event was recorded. Operators run at once here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._before: list[Joinable] = []
        self._recorded = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Stand for what the stream has pending now."""
        self._before = list((stream or streams.current()).pending)
        self._recorded = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Work queued on the stream from now on comes after this event."""
        (stream or streams.current()).pending.extend(self._before)

    def synchronize(self) -> None:
        """Wait here for this event."""
        while self._before:
            self._before.pop(0).join()

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds between two recorded events."""
        return (later._recorded - self._recorded) * 1e3


class ExternalEvent(Event):
    """An event that captured graphs wait for; nothing is captured here that could wait."""

    def reset(self, stream: Stream | None = None) -> None:
        """Stand for nothing again."""
        self._before = []
