"""Discovery in the memory of one process, for tests only: an implementation of all three contracts.

A lease ends when the test ends it: there is no clock.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from netloader.core.addresses import Address
from netloader.core.entries import Entry
from netloader.core.sources import Source
from netloader.discovery import Appeared, Claim, Holder, Listed, Publication, SourceChange, Vanished
from netloader.errors import DiscoveryError, LocalProtocolError


class InMemoryBackend:
    """The state that all instances of a group share."""

    def __init__(self) -> None:
        self.sources: dict[Address, Source] = {}
        self.claims: dict[str, InMemoryClaim] = {}
        self.changed = anyio.Event()
        self.down = False

    def tell(self) -> None:
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def ask(self) -> None:
        if self.down:
            raise DiscoveryError("the backend is down")


class InMemoryProvider:
    def __init__(self, backend: InMemoryBackend) -> None:
        self._backend = backend

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        told: dict[Address, Source] = {}
        listed = False
        while True:
            self._backend.ask()
            changed, now = self._backend.changed, dict(self._backend.sources)
            for source in now.values():
                if told.get(source.address) != source:
                    yield Appeared(source)
            for address in told.keys() - now.keys():
                yield Vanished(address)
            told = now
            if not listed:
                listed = True
                yield Listed()
            await changed.wait()


class _InMemoryPublication:
    def __init__(self, backend: InMemoryBackend) -> None:
        self._backend = backend

    def update(self, entry: Entry) -> None:
        source = entry.source()
        self._backend.sources[source.address] = source
        self._backend.tell()


class InMemoryPublisher:
    def __init__(self, backend: InMemoryBackend) -> None:
        self._backend = backend
        self._mine: set[Address] = set()

    def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        return self._publish(entry)

    @asynccontextmanager
    async def _publish(self, entry: Entry) -> AsyncIterator[Publication]:
        source = entry.source()
        if source.address in self._mine:
            raise LocalProtocolError(f"{source.address} is published already")
        published = _InMemoryPublication(self._backend)
        published.update(entry)
        self._mine.add(source.address)
        try:
            yield published
        finally:
            self._mine.discard(source.address)
            del self._backend.sources[source.address]
            self._backend.tell()


class InMemoryClaim:
    def __init__(self) -> None:
        self._lost = anyio.Event()

    @property
    def held(self) -> bool:
        return not self._lost.is_set()

    async def lost(self) -> None:
        await self._lost.wait()

    def tell(self, progress: str) -> None:
        pass

    def lose(self) -> None:
        self._lost.set()


class InMemoryClaims:
    def __init__(self, backend: InMemoryBackend) -> None:
        self._backend = backend

    def claim(
        self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
    ) -> AbstractAsyncContextManager[Claim | None]:
        return self._claim(work, within)

    @asynccontextmanager
    async def _claim(self, work: str, within: float) -> AsyncIterator[Claim | None]:
        backend = self._backend
        backend.ask()
        with anyio.move_on_after(within):
            while (holder := backend.claims.get(work)) is not None and holder.held:
                await backend.changed.wait()
        if (holder := backend.claims.get(work)) is not None and holder.held:
            yield None
            return
        mine = backend.claims[work] = InMemoryClaim()
        try:
            yield mine
        finally:
            mine.lose()
            if backend.claims.get(work) is mine:
                del backend.claims[work]
            backend.tell()
