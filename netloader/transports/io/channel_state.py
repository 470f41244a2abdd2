"""The state of a channel: whether it is open, and how many operations run in each direction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from netloader.errors import ChannelBusy, ChannelClosed, MemoryStillInUse, TransportError

__all__ = ["ChannelState", "LoopEvent", "finished_within"]

_LOOK = 1.0
"""Seconds that one wait counts at most. If the process or its host was suspended meanwhile, the threads that are waited
for were suspended too."""

_SETTLING = 10.0
"""Seconds that operations of a closed channel may take to end. They need a few iterations of the event loop. Threads
that take longer are waited for by their thread pool."""


async def finished_within(seconds: float, wait: Callable[[], Awaitable[object]]) -> bool:
    """Wait for at most `seconds` seconds, shielded from cancellation.

    Args:
        seconds: How long; more than 0.
        wait: What to wait for. It may be cancelled and called again.

    Returns:
        Whether `wait` finished.
    """
    left = seconds
    while left > 0:
        with anyio.move_on_after(min(left, _LOOK), shield=True) as look:
            await wait()
        if not look.cancelled_caught:
            return True
        left -= _LOOK
    return False


class LoopEvent:
    """An event that one event loop waits for, and that any thread may set. It belongs to the loop that creates it."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()

    def set(self) -> None:
        """Wake the waiting tasks. Does nothing once the loop has ended."""
        if threading.get_ident() == self._thread:
            self._event.set()
            return
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop is closed
            return

    def is_set(self) -> bool:
        """Whether :meth:`set` has taken effect."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until it is set."""
        await self._event.wait()


class ChannelState:
    """Whether a channel is open, failed or closed, and a limit on the operations of each direction.

    Args:
        name: Name of the channel in messages (``gloo channel``).
        depth: How many operations of one direction may run at once.
    """

    def __init__(self, name: str, depth: int = 1) -> None:
        self._name = name
        self._depth = depth
        self._why: str | None = None
        self._closed = False
        self._running: dict[str, list[anyio.Event]] = {}

    @property
    def name(self) -> str:
        """Name of the channel in messages."""
        return self._name

    @property
    def ended(self) -> bool:
        """Whether no operation can run any more."""
        return self._why is not None

    def end(self, why: str, *, closed: bool = False) -> bool:
        """Mark the channel as unusable. The first reason is kept.

        Args:
            why: The reason, for messages.
            closed: Whether this side closed it on purpose.

        Returns:
            Whether this call ended it.
        """
        if self._why is not None:
            return False
        self._why = why
        self._closed = closed
        return True

    def closed(self) -> ChannelClosed:
        """The error for an operation on a channel that has ended."""
        return ChannelClosed(f"this {self._name} can't be used any more: {self._why}", hint="open a new one")

    @asynccontextmanager
    async def operation(self, direction: str, cut: Callable[[], object] | None = None) -> AsyncIterator[None]:
        """Run an operation of a direction (``send``, ``recv``). Any error inside ends the channel.

        The body starts without a prior await, so operations start in the order of the calls.

        Args:
            direction: Its name.
            cut: Called when the operation fails for any reason; ends the channel for the peer. Must not block.

        Raises:
            ChannelClosed: The channel had ended, or was closed while the operation ran.
            ChannelBusy: `depth` operations run in this direction already; they continue.
            MemoryStillInUse: As the operation raised it, even if the channel was closed.
        """
        running = self._running.setdefault(direction, [])
        if len(running) >= self._depth:
            raise ChannelBusy(
                f"another {direction} runs on this {self._name}",
                hint=f"{self._depth} at a time in each direction: await the first one",
            )
        if self._why is not None:
            raise self.closed()
        over = anyio.Event()
        running.append(over)
        try:
            yield
        except BaseException as error:
            ours = self.end(f"a {direction} on it ended with {type(error).__name__}: {error}".rstrip(": "))
            if cut is not None:
                cut()
            # The channel was closed while the operation ran, so its error is a consequence of that.
            echo = isinstance(error, TransportError) and not isinstance(error, MemoryStillInUse)
            if self._closed and not ours and echo:
                raise self.closed() from error
            raise
        finally:
            running.remove(over)
            over.set()

    async def idle(self) -> None:
        """Wait until no operation runs, shielded from cancellation. Call it only after the channel has ended.

        Raises:
            MemoryStillInUse: An operation does not end.
        """

        async def all_over() -> None:
            for running in self._running.values():
                for over in list(running):
                    await over.wait()

        if not await finished_within(_SETTLING, all_over):
            raise MemoryStillInUse(self._name, writes=bool(self._running.get("recv")), seconds=_SETTLING)
