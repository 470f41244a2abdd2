"""Streams: work that is queued elsewhere, and the work that a stream waits for."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class Joinable(Protocol):
    """Queued work that ends."""

    def join(self) -> None:
        """Wait for its end."""
        ...


class Stream:
    """Operators run at once here; a stream has nothing pending but the work that it waits for."""

    def __init__(self, device: object = None, priority: int = 0, **_: Any) -> None:
        self.pending: list[Joinable] = []
        self.npu_stream = id(self)
        """The runtime's handle."""

    def synchronize(self) -> None:
        """Wait until all pending work has ended."""
        while self.pending:
            self.pending.pop(0).join()

    drain = synchronize

    def wait_stream(self, other: Stream) -> None:
        """Work queued here from now on comes after what `other` has pending."""
        self.pending.extend(other.pending)


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack = [Stream()]
        self.device = 0

    def current(self) -> Stream:
        return self.stack[-1]


streams = _Local()
communicators: list[Stream] = []  # one for each communicator, for waits on the whole device
