"""Sources as a provider finds them, told to the pull."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing

import anyio.lowlevel

from netloader.core import pull_events as p
from netloader.discovery.base import Appeared, Listed, SourceProvider, Vanished
from netloader.errors import DiscoveryError, shown

__all__ = ["search"]

_log = logging.getLogger("netloader")


async def search(provider: SourceProvider, tell: Callable[[p.Event], None]) -> None:
    """Tell what `provider` finds, until its stream is over; never raises for anything that it does."""
    name, error = type(provider).__name__, None
    try:
        async with aclosing(provider.watch()) as changes:
            async for change in changes:
                match change:
                    case Appeared(source):
                        tell(p.SourcesFound([source]))
                    case Vanished(address):
                        tell(p.SourceLost(address))
                    case Listed():
                        tell(p.Listed())
                    case _:
                        raise DiscoveryError(f"{shown(change)} is no change of sources")
                await anyio.lowlevel.checkpoint()  # one that never waits leaves the loop to the rest
    except Exception as caught:  # noqa: BLE001 - another one's code: what it finds may be missing, the pull goes on
        _log.debug("%s: the search for sources failed", name, exc_info=caught)
        told = caught.message if isinstance(caught, DiscoveryError) else f"{type(caught).__name__}: {caught}"
        error = DiscoveryError(f"{name} failed: {told}", hint=caught.hint if isinstance(caught, DiscoveryError) else "")
    tell(p.SearchEnded(error))
