"""Conformance checks of a source provider; see :mod:`netloader.discovery.conformance`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import anyio

from netloader.core.addresses import Address
from netloader.core.sources import Source
from netloader.discovery.base import Appeared, Listed, SourceProvider, Vanished
from netloader.transports.conformance_kit import PATIENCE, Failed, require, within

__all__ = ["LEAVING", "ONE", "PROVIDER_CHECKS", "TWO", "MakeAvailable", "ProviderCheck", "Stream", "named", "watched"]

MakeAvailable = Callable[[Address], AbstractAsyncContextManager[object]]
"""Opens a context in which a server is available at an address, as far as the backend knows."""

ProviderCheck = Callable[[SourceProvider, MakeAvailable], Awaitable[None]]

_LISTED = 10.0
"""Seconds for which a pull waits for `Listed`."""

LEAVING = 10.0
"""Seconds that closing a stream or leaving a context may take: 5 for the backend, and as long for a busy host."""

ONE, TWO, THREE = Address("192.0.2.1", 19374), Address("192.0.2.2", 19374), Address("2001:db8::3", 19374)


async def named(name: str, check: Awaitable[None]) -> None:
    """Run a check.

    Raises:
        Failed: It failed, whatever it raised. The message begins with its name.
    """
    try:
        await check
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise Failed(f"{name}: {cause}") from error


class Stream:
    """Watches a provider in a task of its own."""

    def __init__(self, provider: SourceProvider) -> None:
        self.scope = anyio.CancelScope()
        self.sources: dict[Address, Source] = {}
        self.vanished: list[Address] = []
        self.listed = False
        self.over = False
        self._provider = provider
        self._more = anyio.Event()

    async def run(self) -> None:
        """Watch until the stream ends or `scope` is cancelled."""
        with self.scope:
            async with aclosing(self._provider.watch()) as changes:
                async for change in changes:
                    match change:
                        case Appeared(source):
                            self.sources[source.address] = source
                        case Vanished(address):
                            self.sources.pop(address, None)
                            self.vanished.append(address)
                        case Listed():
                            self.listed = True
                        case _:
                            raise Failed(f"the stream yields {change!r}, which is no change")
                    self._tell()
        self.over = True
        self._tell()

    def _tell(self) -> None:
        more, self._more = self._more, anyio.Event()
        more.set()

    async def until(self, condition: Callable[[], bool], otherwise: str, seconds: float = PATIENCE) -> None:
        """Wait until a condition holds that depends on what was told."""
        with within(seconds, otherwise):
            while not condition():
                await self._more.wait()


@asynccontextmanager
async def watched(*providers: SourceProvider) -> AsyncIterator[list[Stream]]:
    """One stream each, listed; they have to end when they are cancelled."""
    streams = [Stream(provider) for provider in providers]
    async with anyio.create_task_group() as tasks:
        for stream in streams:
            tasks.start_soon(stream.run)
            await stream.until(lambda s=stream: s.listed, "Listed does not come", _LISTED)  # type: ignore[misc]
        yield streams
        for stream in streams:
            stream.scope.cancel()
            await stream.until(lambda s=stream: s.over, "a cancelled stream does not end", LEAVING)  # type: ignore[misc]


async def a_stream_begins_with_what_is_there(provider: SourceProvider, available: MakeAvailable) -> None:
    """Each source that is there has appeared before `Listed`, and nothing else; each stream begins anew."""
    async with watched(provider) as (nothing,):
        require(not nothing.sources, f"sources are found where there are none: {sorted(nothing.sources)}")
    async with available(ONE), available(THREE):
        for _ in range(2):
            async with watched(provider) as (stream,):
                require(set(stream.sources) == {ONE, THREE}, f"Listed comes after {sorted(stream.sources)} only")


async def changes_are_told_while_a_stream_is_open(provider: SourceProvider, available: MakeAvailable) -> None:
    """To all streams: a source that appears, one that vanishes, and one that comes back."""
    async with watched(provider, provider) as streams:
        for address in (ONE, TWO, ONE):
            async with available(address):
                for stream in streams:
                    await stream.until(lambda s=stream: address in s.sources, f"{address} does not appear")  # type: ignore[misc]  # noqa: B023
            for stream in streams:
                await stream.until(lambda s=stream: not s.sources, f"{address} does not vanish")  # type: ignore[misc]
        for stream in streams:
            require(stream.vanished == [ONE, TWO, ONE], f"what vanished is {stream.vanished}")


async def streams_are_independent(provider: SourceProvider, available: MakeAvailable) -> None:
    """One goes on when another one is closed."""
    async with watched(provider, provider) as (first, second):
        first.scope.cancel()
        await first.until(lambda: first.over, "a cancelled stream does not end", LEAVING)
        async with available(TWO):
            await second.until(lambda: TWO in second.sources, "a stream tells nothing after another one was closed")


async def a_stream_can_be_closed_at_any_step(provider: SourceProvider, available: MakeAvailable) -> None:
    """After each of its first changes, by the task that iterates it."""
    async with available(ONE):
        for steps in range(3):
            stream = provider.watch()
            with within(_LISTED, "the stream tells nothing"):
                for _ in range(min(steps, 2)):  # Appeared and Listed; a third step may be long in coming
                    await anext(stream)
            with within(LEAVING, "a stream can't be closed"):
                await stream.aclose()


PROVIDER_CHECKS: tuple[ProviderCheck, ...] = (
    a_stream_begins_with_what_is_there,
    changes_are_told_while_a_stream_is_open,
    streams_are_independent,
    a_stream_can_be_closed_at_any_step,
)
"""All checks of a `SourceProvider`, in order."""
