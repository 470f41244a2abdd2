"""Finds sources in the registries that DISCOVERY names, before the model is built and while it is pulled."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace

import anyio

from netloader import sync
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity, name_of
from netloader.core.model_key import key_of
from netloader.core.sources import Source
from netloader.core.texts import time_text
from netloader.discovery.base import (
    Appeared,
    Backend,
    Claims,
    Listed,
    Publisher,
    SourceChange,
    SourceProvider,
    Vanished,
    Wanted,
)
from netloader.discovery.place import this_place, zone_of
from netloader.discovery.preferred import Preferred

__all__ = ["OfRank", "find_sources"]

log = logging.getLogger(__name__)

_LISTING = 10.0
"""Seconds that a registry may take to list what it has, also without WAIT."""

_LINE_EVERY = 10.0
"""Seconds between two lines about one wait."""


@dataclass(frozen=True)
class OfRank:
    """The registries as one rank uses them: it looks for sources of its rank, and never finds itself. A `Backend`.

    Attributes:
        backend: The registries.
        rank: The rank.
        own: Addresses of this worker's server.
    """

    backend: Backend
    rank: int
    own: Callable[[], Collection[Address]] = tuple

    def sources(self, wanted: Wanted) -> SourceProvider:
        """See :meth:`netloader.discovery.Backend.sources`."""
        return _Others(self.backend.sources(replace(wanted, rank=self.rank)), self.own)

    def publisher(self) -> Publisher | None:
        """See :meth:`netloader.discovery.Backend.publisher`."""
        return self.backend.publisher()

    def claims(self) -> Claims | None:
        """See :meth:`netloader.discovery.Backend.claims`."""
        return self.backend.claims()


class _Others:
    """The sources of a provider, without those of this process."""

    def __init__(self, provider: SourceProvider, own: Callable[[], Collection[Address]]) -> None:
        self._provider = provider
        self._own = own

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        async with aclosing(self._provider.watch()) as changes:
            async for change in changes:
                if not (isinstance(change, Appeared) and change.source.address in self._own()):
                    yield change


def find_sources(
    backend: Backend, identity: ModelIdentity, rank: int, *, wait: float, zone: str | None
) -> list[Address]:
    """The servers of this model that the registries know, the preferred one first.

    Waits until they are listed, and then for the first one if there is none.

    Args:
        backend: The registries.
        identity: The identity of the model.
        rank: The rank, for the log.
        wait: Seconds to wait for the first one.
        zone: ZONE.
    """
    here = this_place(zone_of(zone), name_of(identity))
    provider = Preferred(backend.sources(Wanted(key_of(identity), role=identity.role)), here)
    return sync.wait_for(lambda: _first(provider, rank, identity.role, wait), "netloader-find")


async def _first(provider: SourceProvider, rank: int, role: str, wait: float) -> list[Address]:
    found: dict[Address, Source] = {}
    began = time.monotonic()
    with anyio.move_on_after(max(_LISTING, wait)) as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_say, rank, role, began, wait)
            async with aclosing(provider.watch()) as changes:
                listed = False
                async for change in changes:
                    match change:
                        case Appeared(source):
                            found[source.address] = source
                        case Vanished(address):
                            found.pop(address, None)
                        case Listed():
                            listed = True
                            scope.deadline = anyio.current_time() + max(0.0, began + wait - time.monotonic())
                    if listed and found:
                        break
            tasks.cancel_scope.cancel()
    return list(found)


async def _say(rank: int, role: str, began: float, wait: float) -> None:
    while True:
        await anyio.sleep(_LINE_EVERY)
        waited = time.monotonic() - began
        log.info(
            "netloader: rank %d: waiting for a server of this %s in DISCOVERY, %s of %s",
            rank,
            role,
            time_text(waited),
            time_text(wait),
        )
