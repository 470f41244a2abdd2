"""Signals that end a command, so that it can clean up and say what is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import anyio

__all__ = ["ENDING", "Stop", "Stopped", "ending_signals", "stop_on_signal"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The command was told to stop. Raised in its threads."""


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

    def check(self) -> None:
        """Return if the command goes on.

        Raises:
            Stopped: It was told to stop.
        """
        if self._event.is_set():
            raise Stopped


@contextmanager
def ending_signals() -> Iterator[AsyncIterator[signal.Signals]]:
    """Receive the signals that end a process, except those that its parent had it ignore (``nohup``)."""
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    with anyio.open_signal_receiver(*heeded) as signals:
        yield signals


async def stop_on_signal(
    signals: AsyncIterator[signal.Signals],
    scope: anyio.CancelScope,
    stop: Stop,
    tell: Callable[[signal.Signals], None] | None = None,
) -> None:
    """Wait for a signal, then stop the command: call `tell`, set `stop`, and cancel `scope`."""
    async for number in signals:
        if tell is not None:
            tell(number)
        stop.set(number)
        scope.cancel()
        return
