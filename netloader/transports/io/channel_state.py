"""What every channel of ours keeps: whether it is open, and who uses which direction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from netloader.errors import ChannelBusy, ChannelClosed, MemoryStillInUse, TransportError

__all__ = ["ChannelState", "LoopEvent", "came_in_time"]

_LOOK = 1.0
"""Seconds that one look at what is waited for counts at most, however long the process or its host stood still in it:
the threads that are waited for stood still, too."""

_SETTLING = 10.0
"""Seconds that operations of a closed channel may take to end. They need some turns of the event loop; a thread that
keeps one longer is waited for where it is known."""


async def came_in_time(seconds: float, wait: Callable[[], Awaitable[object]]) -> bool:
    """Wait, cancelled or not, for at most `seconds` seconds.

    Args:
        seconds: How long; more than 0.
        wait: What is waited for. It may be cut off and begun anew.

    Returns:
        Whether `wait` came to its end.
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
    """An event that one event loop waits for and that any thread may set.

    Belongs to the loop in which it is made.
    """

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()

    def set(self) -> None:
        """Wake whoever waits; does nothing once the loop has ended, since nobody waits then."""
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
    """Open, failed or closed; and a guard for each direction.

    Args:
        name: What the channel is called in messages (``gloo channel``).
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
        """What the channel is called in messages."""
        return self._name

    @property
    def ended(self) -> bool:
        """Whether no operation can run any more."""
        return self._why is not None

    def end(self, why: str, *, closed: bool = False) -> bool:
        """Note that the channel is unusable from now on; the first reason stays.

        Args:
            why: The reason, for messages.
            closed: Whether this side closed it on purpose.

        Returns:
            Whether this call was the one that ended it.
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
        """Run an operation of a direction (``send``, ``recv``); whatever goes wrong inside ends the channel.

        The first step of what runs inside is taken at once: operations get under way in the order of the calls.

        Args:
            direction: Its name.
            cut: Called when the operation fails, for any reason: tells the peer. Must not block.

        Raises:
            ChannelClosed: The channel had ended, or was closed while the operation ran.
            ChannelBusy: As many as may run in this direction do; they go on unharmed.
            MemoryStillInUse: As the operation raised it: that the channel was closed is no reason to say less.
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
            # Closed under the operation's feet: what it says then is an echo of that, whatever it looks like.
            echo = isinstance(error, TransportError) and not isinstance(error, MemoryStillInUse)
            if self._closed and not ours and echo:
                raise self.closed() from error
            raise
        finally:
            running.remove(over)
            over.set()

    async def idle(self) -> None:
        """Wait until no operation runs, cancelled or not. Once the channel has ended.

        Raises:
            MemoryStillInUse: One does not end.
        """

        async def all_over() -> None:
            for running in self._running.values():
                for over in list(running):
                    await over.wait()

        if not await came_in_time(_SETTLING, all_over):
            raise MemoryStillInUse(self._name, writes=bool(self._running.get("recv")), seconds=_SETTLING)
