"""Signals that end a command, so that it can clean up and say what is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio

__all__ = ["ENDING", "Stop", "ending_signals", "stop_on_signal"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Whether the command was told to stop. Threads look at it, the event loop is cancelled.

    Attributes:
        number: The signal; 0 before, or when something else stopped the command.
    """

    def __init__(self) -> None:
        self.number = 0
        self._event = threading.Event()

    def set(self, number: int = 0) -> None:
        """Stop."""
        self.number = number
        self._event.set()

    def is_set(self) -> bool:
        """Whether it was told to stop."""
        return self._event.is_set()


@contextmanager
def ending_signals() -> Iterator[AsyncIterator[signal.Signals]]:
    """Receive the signals that end a process, except those that its parent had it ignore (``nohup``)."""
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    with anyio.open_signal_receiver(*heeded) as signals:
        yield signals


async def stop_on_signal(signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope, stop: Stop) -> None:
    """Wait for a signal, then stop the command: set `stop`, and cancel `scope`."""
    async for number in signals:
        stop.set(number)
        scope.cancel()
        return
