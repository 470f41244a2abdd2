"""What all publishers share: the latest entry of one server, and when it is sent."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import anyio

from netloader.core.entries import Entry, encode_entry
from netloader.discovery.outage import Outage
from netloader.errors import DiscoveryError, LocalProtocolError

__all__ = ["Updates"]

_log = logging.getLogger("netloader")


class Updates:
    """The latest entry of one server, which a task sends. A `Publication`.

    Args:
        entry: The first one.
        send: Sends an encoded entry, or renews it. Raises `DiscoveryError` if that fails.
        outage: Told of failures.
        renew: Seconds between two times that it is sent, changed or not; infinite for changes only.
        retry: Seconds after a failure.
        every: Least seconds between two times.

    Attributes:
        entry: The latest one.

    Raises:
        DiscoveryError: The entry is too long.
    """

    def __init__(
        self,
        entry: Entry,
        send: Callable[[bytes], Awaitable[None]],
        outage: Outage,
        *,
        renew: float,
        retry: float,
        every: float,
    ) -> None:
        self.entry = entry
        self._encoded = encode_entry(entry)
        self._send = send
        self._outage = outage
        self._renew, self._retry, self._every = renew, retry, every
        self._changed = asyncio.Event()
        self._answered = False

    def update(self, entry: Entry) -> None:
        """See :meth:`netloader.discovery.Publication.update`."""
        if _server(entry) != _server(self.entry):
            raise LocalProtocolError(f"an update of {self.entry.address} names another server: {entry.address}")
        self._encoded, self.entry = encode_entry(entry), entry
        self._changed.set()

    async def send(self) -> None:
        """Send the latest entry once. A failure is logged."""
        self._changed.clear()
        try:
            await self._send(self._encoded)
        except DiscoveryError as error:
            self._outage.failed(error)
            self._answered = False
        except Exception as error:  # noqa: BLE001 - the task that renews the lease must go on
            _log.debug("unexpected error of a publisher", exc_info=error)
            self._outage.failed(
                DiscoveryError(f"{type(error).__name__}: {error}", hint="the log has the details at level DEBUG")
            )
            self._answered = False
        else:
            self._outage.over()
            self._answered = True

    async def run(self) -> None:
        """Send it again and again, until this is cancelled. Call :meth:`send` before."""
        while True:
            sent = anyio.current_time()
            if self._answered:
                await anyio.sleep(self._every)
                # Servers that were started together must not renew together.
                with anyio.move_on_at(sent + self._renew * random.uniform(0.9, 1.0)):  # noqa: S311
                    await self._changed.wait()
            else:
                await anyio.sleep(self._retry * random.uniform(0.9, 1.1))  # noqa: S311
            await self.send()


def _server(entry: Entry) -> tuple[object, ...]:
    return entry.key, entry.rank, entry.role, entry.address, entry.generation
