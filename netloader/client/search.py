"""Watches a source provider on behalf of a pull."""

from __future__ import annotations

import asyncio
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
    """Report what `provider` finds until its stream ends. No exception of the provider is raised here."""
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
                await anyio.lowlevel.checkpoint()  # a provider that never waits must not block the event loop
    except asyncio.CancelledError as caught:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        error = _failure(name, caught)  # of a task of the provider: this one was not cancelled, and goes on
    except Exception as caught:  # noqa: BLE001 - third-party code: its sources may be missing, the pull goes on
        error = _failure(name, caught)
    tell(p.SearchEnded(error))


def _failure(provider: str, cause: BaseException) -> DiscoveryError:
    _log.debug("%s: the search for sources failed", provider, exc_info=cause)
    if isinstance(cause, DiscoveryError):
        return DiscoveryError(f"{provider} failed: {cause.message}", hint=cause.hint)
    return DiscoveryError(f"{provider} failed: {type(cause).__name__}: {cause}")
