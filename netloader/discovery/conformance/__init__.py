"""Conformance checks: what every source provider, backend and store has to do, for authors of their own.

- ``await check_provider(provider, available)``: a `SourceProvider`.
- ``await check_backend(make)``: a `Backend`, with its provider, and with its publisher and its claims if it has them.
- ``await check_store(open_store)``: a `LeaseStore`, over which `LeaseBackend` makes a backend.

They use a real registry under names that nobody else uses, and leave nothing there for longer than a lease. No test
framework is needed: a failure is raised as :class:`Failed`, which names the check.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import anyio

from netloader.discovery.base import Backend, SourceProvider
from netloader.discovery.conformance.backend import BACKEND_CHECKS, BackendCheck
from netloader.discovery.conformance.provider import LEAVING, PROVIDER_CHECKS, MakeAvailable, ProviderCheck, named
from netloader.discovery.conformance.store import STORE_CHECKS, StoreCheck
from netloader.discovery.store import OpenStore
from netloader.transports.conformance_kit import PATIENCE, Failed, within

__all__ = [
    "BACKEND_CHECKS",
    "PROVIDER_CHECKS",
    "STORE_CHECKS",
    "BackendCheck",
    "Failed",
    "MakeAvailable",
    "ProviderCheck",
    "StoreCheck",
    "check_backend",
    "check_provider",
    "check_store",
]


async def check_provider(
    provider: SourceProvider, available: MakeAvailable, checks: Sequence[ProviderCheck] | None = None
) -> None:
    """Check a source provider.

    Args:
        provider: It finds no source when a check begins.
        available: Makes a server available for as long as its context is open, and no longer. The checks use addresses
            of RFC 5737 and RFC 3849, port 19374; nothing listens there.
        checks: The checks to run; by default all of :data:`PROVIDER_CHECKS`.

    Raises:
        Failed: The first check that failed, and why.
    """
    for check in PROVIDER_CHECKS if checks is None else checks:
        await _run(check.__name__, check(provider, available))


async def check_backend(make: Callable[[], Backend], checks: Sequence[BackendCheck] | None = None) -> None:
    """Check a backend, with what it publishes and claims.

    Args:
        make: Makes a backend of the same registry each time, as every instance of a group does. The checks publish
            under random keys.
        checks: The checks to run; by default all of :data:`BACKEND_CHECKS`. Those of a publisher or of claims pass if
            the backend has none.

    Raises:
        Failed: The first check that failed, and why.
    """
    for check in BACKEND_CHECKS if checks is None else checks:
        await _run(check.__name__, check(make))


async def check_store(open_store: OpenStore, checks: Sequence[StoreCheck] | None = None) -> None:
    """Check a store. This takes about ten seconds, because leases have to end.

    Args:
        open_store: Opens connections to one registry. The checks write below ``netloader-check/``.
        checks: The checks to run; by default all of :data:`STORE_CHECKS`.

    Raises:
        Failed: The first check that failed, and why.
    """
    for check in STORE_CHECKS if checks is None else checks:
        await _run(check.__name__, check(open_store))


async def _run(name: str, check: Awaitable[None]) -> None:
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())

    async def to_the_end() -> None:
        with within(4 * PATIENCE, "it does not end"):
            await check
        await _nothing_left(tasks, threads)

    await named(name, to_the_end())


async def _nothing_left(tasks: set[asyncio.Task[object]], threads: set[threading.Thread]) -> None:
    """Fail if what a check began goes on after it. Threads that event loops keep for blocking calls may stay."""
    left: list[str] = []
    with anyio.move_on_after(LEAVING):
        while True:
            left = [f"task {task.get_name()}" for task in asyncio.all_tasks() - tasks]
            left += [
                f"thread {thread.name}"
                for thread in set(threading.enumerate()) - threads
                if not thread.name.startswith(("asyncio_", "AnyIO worker"))
            ]
            if not left:
                return
            await anyio.sleep(0.05)
    raise Failed(f"it leaves behind: {', '.join(left)}")
