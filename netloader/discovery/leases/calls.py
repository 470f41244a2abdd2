"""Calls to a registry: their times and deadlines, and listening for changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.lowlevel

from netloader.discovery.store import LeaseStore
from netloader.errors import ConfigError, DiscoveryError

__all__ = ["LEAVING", "Pace", "ask", "listen"]

T = TypeVar("T")

LEAVING = 5.0
"""Seconds that giving back or withdrawing something may take."""

_TTL = (1.0, 30.0)

_log = logging.getLogger("netloader")


@dataclass(frozen=True, slots=True)
class Pace:
    """How often and how long, all in proportion to the lease.

    Args:
        ttl: Seconds that a lease lasts without being renewed, from 1 to 30.

    Raises:
        ConfigError: `ttl` is out of these bounds.
    """

    ttl: float

    def __post_init__(self) -> None:
        if not _TTL[0] <= self.ttl <= _TTL[1]:
            raise ConfigError(field="ttl", value=self.ttl, allowed=f"seconds from {_TTL[0]:g} to {_TTL[1]:g}")

    @property
    def renew(self) -> float:
        """Seconds between two renewals, and between two reads of one who waits."""
        return self.ttl / 3

    @property
    def call(self) -> float:
        """Seconds after which a call has failed."""
        return self.ttl / 3

    @property
    def retry(self) -> float:
        """Seconds after a call that failed."""
        return self.ttl / 15

    @property
    def update(self) -> float:
        """Least seconds between two updates of what one server or one holder tells."""
        return min(1.0, self.ttl / 15)

    @property
    def missing(self) -> float:
        """Seconds for which a name may be missing before it counts as gone.

        A registry that was restarted or emptied has lost everything, and within `call` + `retry` it has again what is
        alive. A dead name expires after `ttl`, its absence is noticed within `renew`, and this ends before two leases.
        """
        return self.ttl / 2


async def ask(call: Awaitable[T], seconds: float) -> T:
    """The result of a call to a store.

    Raises:
        DiscoveryError: It failed, whatever the store raised, or took longer than `seconds`.
    """
    try:
        with anyio.fail_after(seconds):
            return await call
    except DiscoveryError:
        raise
    except TimeoutError as error:
        raise DiscoveryError(f"there is no answer within {seconds:g} s", hint="check that the registry runs") from error
    except Exception as error:  # third-party code; one failed call must not end what goes on without a registry
        _log.debug("a call to a registry failed", exc_info=error)
        raise DiscoveryError(
            f"{type(error).__name__}: {error}", hint="the log has the details at level DEBUG"
        ) from error


async def listen(store: LeaseStore, prefix: str, changed: asyncio.Event, pace: Pace) -> None:
    """Set `changed` whenever something below `prefix` may have changed, until this is cancelled.

    A registry that does not tell changes is read at the usual pace, so failures are logged at level DEBUG only.
    """
    while True:
        try:
            async with aclosing(store.changes(prefix)) as changes:
                async for _ in changes:
                    changed.set()
                    await anyio.lowlevel.checkpoint()  # a store that never waits must not block the event loop
        except Exception as error:  # noqa: BLE001 - third-party code, as above
            _log.debug("changes below %s are not told: %s", prefix, error)
        changed.set()
        await anyio.sleep(pace.retry)
