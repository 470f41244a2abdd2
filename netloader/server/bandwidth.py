"""A limit for the bytes that a server sends per second, shared equally by the clients that want more."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import anyio

from netloader.server.pace import Pace

__all__ = ["Bandwidth"]

_BURST = 0.05
"""Seconds' worth of bytes that may be sent at once after a time without any."""

_SLICE = 0.05
"""Seconds' worth of bytes after which it is the next client's turn."""


class Bandwidth:
    """Says when a client's next bytes may be sent.

    Start-time fair queueing: each client has a virtual clock that advances by the bytes it was given, and the one that
    is furthest behind is next. A client that comes new begins where the one served last stands, so it neither waits
    for those that were there before it nor makes them wait for what it missed.

    Args:
        rate: Bytes per second for all clients together; None for no limit.
        now: The time in seconds, by a clock that never goes back.

    Attributes:
        rate: As given.
    """

    def __init__(self, rate: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._now = now
        self._pace = Pace(_BURST)
        self._clocks: dict[Hashable, float] = {}
        self._clock = 0.0  # of the client that was served last
        self._waiting: dict[Hashable, tuple[float, int]] = {}
        self._arrivals = 0
        self._changed = anyio.Event()

    @property
    def slice_bytes(self) -> int | None:
        """Most bytes that should be sent in one call, so that others need not wait long; None for no limit."""
        return None if self.rate is None else max(1, int(self.rate * _SLICE))

    async def wait(self, client: Hashable, nbytes: int) -> None:
        """Wait until `client` may send `nbytes`. One call per client at a time. Returns at once without a limit."""
        if self.rate is None:
            return
        self._arrivals += 1
        start = max(self._clock, self._clocks.get(client, 0.0))
        self._waiting[client] = start, self._arrivals
        self._tell()
        try:
            while (pause := self._pause(client)) != 0.0:
                changed = self._changed
                with anyio.move_on_after(pause):
                    await changed.wait()
            self._clock = start
            self._clocks[client] = start + nbytes
            self._pace.spend(nbytes / self.rate, self._now())
        finally:
            self._waiting.pop(client, None)
            self._tell()

    def leave(self, client: Hashable) -> None:
        """Forget a client that has ended. Idempotent."""
        self._clocks.pop(client, None)

    def _pause(self, client: Hashable) -> float | None:
        """Seconds until it may be this client's turn; None while another one is before it."""
        first = min(self._waiting, key=self._waiting.__getitem__)
        return self._pace.wait(self._now()) if first is client else None

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
