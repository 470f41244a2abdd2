"""Publishes a server in a registry, renews its lease, and withdraws it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import anyio

from netloader.core.entries import Entry, decode_entry, encode_entry
from netloader.discovery.base import Publication
from netloader.discovery.beside import beside
from netloader.discovery.leases.calls import LEAVING, Outage, Pace, ask
from netloader.discovery.leases.names import WITHDRAWN, server_name
from netloader.discovery.store import LeaseStore, OpenStore
from netloader.errors import DiscoveryError, LocalProtocolError

__all__ = ["LeasePublisher"]

_SIMILAR = 100
"""Most names that are read to find one: other ports of one host may begin with the same digits."""

_log = logging.getLogger("netloader")


class LeasePublisher:
    """Publishes servers in a registry. A `Publisher`.

    Args:
        open_store: Opens a connection to the registry.
        prefix: The beginning of all names.
        pace: How long a lease lasts, and how often it is renewed.
        name: Of the registry, for the log.
    """

    def __init__(self, open_store: OpenStore, prefix: str, pace: Pace, name: str) -> None:
        self._open = open_store
        self._prefix = prefix
        self._pace = pace
        self._name = name
        self._mine: set[str] = set()

    def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        """See :meth:`netloader.discovery.Publisher.publish`."""
        return self._publish(entry)

    @asynccontextmanager
    async def _publish(self, entry: Entry) -> AsyncIterator[Publication]:
        name = server_name(self._prefix, entry)
        if name in self._mine:
            raise LocalProtocolError(f"{entry.address} is published already")
        publication = _LeasePublication(name, entry, self._pace, f"publishing {entry.address} in {self._name}")
        self._mine.add(name)
        try:
            async with self._open() as store:
                try:
                    await publication.send(store)
                    async with beside(partial(publication.run, store), f"netloader-publish-{entry.address}"):
                        yield publication
                finally:
                    await publication.withdraw(store)
        finally:
            self._mine.discard(name)


class _LeasePublication:
    """One published server."""

    def __init__(self, name: str, entry: Entry, pace: Pace, what: str) -> None:
        self._name = name
        self._entry = entry
        self._pace = pace
        self._wanted = encode_entry(entry)
        self._changed = asyncio.Event()
        self._outage = Outage(what)
        self._what = what
        self._accepted: bytes | None = None  # what the registry holds; None if that is not known
        self._replaced = False

    def update(self, entry: Entry) -> None:
        """See :meth:`netloader.discovery.Publication.update`."""
        if _same(entry) != _same(self._entry):
            raise LocalProtocolError(f"an update of {self._entry.address} names another server: {entry.address}")
        self._wanted, self._entry = encode_entry(entry), entry
        self._changed.set()

    async def run(self, store: LeaseStore) -> None:
        """Renew the lease and send updates, until this is cancelled."""
        answered = self._accepted is not None
        while True:
            sent = anyio.current_time()
            if answered:
                await anyio.sleep(self._pace.update)
                with anyio.move_on_at(sent + self._pace.renew * random.uniform(0.9, 1.0)):  # noqa: S311 - spreads load
                    await self._changed.wait()
            else:
                await anyio.sleep(self._pace.retry * random.uniform(0.9, 1.1))  # noqa: S311
            answered = await self.send(store)

    async def send(self, store: LeaseStore) -> bool:
        """Renew the lease, or write the latest entry. Returns whether the registry answered."""
        self._changed.clear()
        try:
            await self._send(store, self._wanted)
        except DiscoveryError as error:
            self._outage.failed(error)
            return False
        self._outage.over()
        return True

    async def _send(self, store: LeaseStore, value: bytes) -> None:
        ttl, call = self._pace.ttl, self._pace.call
        ours = self._accepted
        if ours is None:
            # The first time, or it is not known what the registry holds. An entry of another generation is older.
            await ask(store.put(self._name, value, ttl=ttl), call)
        elif not await ask(store.renew(self._name, ours, ttl=ttl), call):
            if not await ask(store.create(self._name, value, ttl=ttl), call):
                self._say_replaced()
                return
            _log.info("netloader: %s: it was missing, and is published again", self._what)
        elif value != ours:
            self._accepted = None
            await ask(store.put(self._name, value, ttl=ttl), call)
        self._accepted, self._replaced = value, False

    def _say_replaced(self) -> None:
        if not self._replaced:
            self._replaced = True
            _log.warning(
                "netloader: %s: another server publishes this address now, so this one is not found", self._what
            )

    async def withdraw(self, store: LeaseStore) -> None:
        """Remove the entry, and leave a mark that it is not to be waited for. Raises nothing; the lease ends anyway."""
        with anyio.move_on_after(LEAVING, shield=True):
            try:
                value = self._accepted if self._accepted is not None else await self._held(store)
                if value is not None and await ask(store.remove(self._name, value), LEAVING):
                    await ask(store.create(self._name, WITHDRAWN, ttl=max(1.0, self._pace.missing)), LEAVING)
            except DiscoveryError as error:
                _log.debug("%s: it can't be withdrawn, and expires: %s", self._what, error)

    async def _held(self, store: LeaseStore) -> bytes | None:
        """What the registry holds under our name, if it is ours: the answer to the last call was lost."""
        values = await ask(store.read(self._name, limit=_SIMILAR), LEAVING)
        value = values.get(self._name)
        return value if value is not None and decode_entry(value).generation == self._entry.generation else None


def _same(entry: Entry) -> tuple[object, ...]:
    return entry.key, entry.rank, entry.role, entry.address, entry.generation
