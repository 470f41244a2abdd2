"""Several backends as one: what all of them find, published in all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from functools import partial

import anyio

from netloader.core.addresses import Address
from netloader.core.entries import Entry
from netloader.core.sources import Source
from netloader.discovery.base import (
    Appeared,
    Backend,
    Claims,
    Listed,
    Publication,
    Publisher,
    SourceChange,
    SourceProvider,
    Vanished,
    Wanted,
)
from netloader.discovery.beside import beside
from netloader.errors import ConfigError

__all__ = ["MergedSources", "combined"]

_AHEAD = 256
"""Changes that are kept for a reader who is slower than the streams."""

_log = logging.getLogger("netloader")


def combined(backends: Sequence[Backend]) -> Backend:
    """One backend of several: it finds what all of them find, publishes in all, and claims in the first that can.

    Raises:
        ConfigError: There is none.
    """
    if not backends:
        raise ConfigError(field="discovery", value=[], allowed="one URL or more")
    return backends[0] if len(backends) == 1 else _Combined(backends)


class _Combined:
    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = tuple(backends)

    def sources(self, wanted: Wanted) -> SourceProvider:
        return MergedSources([backend.sources(wanted) for backend in self._backends])

    def publisher(self) -> Publisher | None:
        publishers = [publisher for backend in self._backends if (publisher := backend.publisher()) is not None]
        return _PublisherInAll(publishers) if publishers else None

    def claims(self) -> Claims | None:
        return next((claims for backend in self._backends if (claims := backend.claims()) is not None), None)


class MergedSources:
    """What several providers find, as one stream. A `SourceProvider`.

    A source that several of them find is told as the first of them knows it, and vanishes when the last one no longer
    finds it. A provider that raises is logged as a warning; what it found stays. `Listed` follows when each of them has
    listed, ended or raised.

    Args:
        providers: The providers, those first whose word counts most.
    """

    def __init__(self, providers: Sequence[SourceProvider]) -> None:
        self._providers = tuple(providers)

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """See :meth:`netloader.discovery.SourceProvider.watch`. It ends when all of them have ended."""
        heard: asyncio.Queue[tuple[int, SourceChange | None]] = asyncio.Queue(_AHEAD)
        merge = _Merge(len(self._providers))
        async with beside(partial(self._hear, heard), "netloader-sources"):
            while merge.open:
                for change in merge.changes(*await heard.get()):
                    yield change

    async def _hear(self, heard: asyncio.Queue[tuple[int, SourceChange | None]]) -> None:
        async with anyio.create_task_group() as tasks:
            for number, provider in enumerate(self._providers):
                tasks.start_soon(self._hear_one, number, provider, heard)

    @staticmethod
    async def _hear_one(
        number: int, provider: SourceProvider, heard: asyncio.Queue[tuple[int, SourceChange | None]]
    ) -> None:
        try:
            async with aclosing(provider.watch()) as changes:
                async for change in changes:
                    await heard.put((number, change))
        except Exception as error:  # noqa: BLE001 - third-party code: the others go on
            _log.warning("netloader: %s failed; what it found stays known: %s", type(provider).__name__, error)
        await heard.put((number, None))


class _Merge:
    """Which sources the streams have told, and what follows of the next change. Pure."""

    def __init__(self, streams: int) -> None:
        self._found: list[dict[Address, Source]] = [{} for _ in range(streams)]
        self._told: dict[Address, Source] = {}
        self._unlisted = set(range(streams))
        self._open = set(range(streams))

    @property
    def open(self) -> bool:
        """Whether a stream can still tell something."""
        return bool(self._open)

    def changes(self, stream: int, change: SourceChange | None) -> list[SourceChange]:
        """What follows of a change of one stream; None for its end."""
        match change:
            case Appeared(source):
                self._found[stream][source.address] = source
                return self._about(source.address)
            case Vanished(address):
                self._found[stream].pop(address, None)
                return self._about(address)
        if change is None:
            self._open.discard(stream)
        if stream not in self._unlisted:
            return []
        self._unlisted.discard(stream)
        return [] if self._unlisted else [Listed()]

    def _about(self, address: Address) -> list[SourceChange]:
        told = self._told.pop(address, None)
        now = next((found[address] for found in self._found if address in found), None)
        if now is None:
            return [] if told is None else [Vanished(address)]
        self._told[address] = now
        if told == now:
            return []
        another = told is not None and told.generation and now.generation and told.generation != now.generation
        return [Vanished(address), Appeared(now)] if another else [Appeared(now)]


class _PublisherInAll:
    """Publishes in several backends."""

    def __init__(self, publishers: Sequence[Publisher]) -> None:
        self._publishers = tuple(publishers)

    def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        return self._publish(entry)

    @asynccontextmanager
    async def _publish(self, entry: Entry) -> AsyncIterator[Publication]:
        async with AsyncExitStack() as stack:
            made = [await stack.enter_async_context(publisher.publish(entry)) for publisher in self._publishers]
            yield _PublicationInAll(made)


class _PublicationInAll:
    def __init__(self, publications: Sequence[Publication]) -> None:
        self._publications = tuple(publications)

    def update(self, entry: Entry) -> None:
        for publication in self._publications:
            publication.update(entry)
