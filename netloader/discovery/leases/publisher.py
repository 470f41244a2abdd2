"""Publishes a server in a registry, renews its lease, and withdraws it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from netloader.core.entries import Entry, decode_entry
from netloader.discovery.base import Publication
from netloader.discovery.beside import beside
from netloader.discovery.leases.calls import LEAVING, Pace, ask
from netloader.discovery.leases.names import WITHDRAWN, server_name
from netloader.discovery.outage import Outage
from netloader.discovery.publishing import Updates
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
        what = f"publishing {entry.address} in {self._name}"
        self._mine.add(name)
        try:
            async with self._open() as store:
                written = _Written(store, name, entry.generation, self._pace, what)
                every, retry = self._pace.update, self._pace.retry
                updates = Updates(entry, written.send, Outage(what), renew=self._pace.renew, retry=retry, every=every)
                try:
                    await updates.send()
                    async with beside(updates.run, f"netloader-publish-{entry.address}"):
                        yield updates
                finally:
                    await written.withdraw()
        finally:
            self._mine.discard(name)


class _Written:
    """What the registry holds of one server."""

    def __init__(self, store: LeaseStore, name: str, generation: str, pace: Pace, what: str) -> None:
        self._store = store
        self._name = name
        self._generation = generation
        self._pace = pace
        self._what = what
        self._value: bytes | None = None  # None if it is not known
        self._accepted = False
        self._replaced = False

    async def send(self, value: bytes) -> None:
        """Renew the lease, or write another value.

        Raises:
            DiscoveryError: The registry does not answer.
        """
        store, ttl, call = self._store, self._pace.ttl, self._pace.call
        ours = self._value
        if self._accepted and ours is None:  # the answer to the last call was lost
            ours = await self._held()
        if not self._accepted:  # an entry of another generation is older than this one
            await ask(store.put(self._name, value, ttl=ttl), call)
            self._accepted = True
        elif ours is None or not await ask(store.renew(self._name, ours, ttl=ttl), call):
            self._value = None
            if not await ask(store.create(self._name, value, ttl=ttl), call):
                self._value = ours
                self._say_replaced()
                return
            _log.info("netloader: %s: it was missing, and is published again", self._what)
        elif value != ours:
            self._value = None
            await ask(store.put(self._name, value, ttl=ttl), call)
        self._value, self._replaced = value, False

    def _say_replaced(self) -> None:
        if not self._replaced:
            self._replaced = True
            _log.warning(
                "netloader: %s: another server publishes this address now, so this one is not found", self._what
            )

    async def withdraw(self) -> None:
        """Remove the entry, and leave a mark that it is not to be waited for. Raises nothing; the lease ends anyway."""
        with anyio.move_on_after(LEAVING, shield=True):
            try:
                store = self._store
                value = self._value if self._value is not None else await self._held()
                if value is not None and await ask(store.remove(self._name, value), LEAVING):
                    await ask(store.create(self._name, WITHDRAWN, ttl=max(1.0, self._pace.missing)), LEAVING)
            except DiscoveryError as error:
                _log.debug("%s: it can't be withdrawn, and expires: %s", self._what, error)

    async def _held(self) -> bytes | None:
        """What the registry holds under our name, if it is ours: the answer to the last call was lost."""
        values = await ask(self._store.read(self._name, limit=_SIMILAR), LEAVING)
        value = values.get(self._name)
        try:
            return value if value is not None and decode_entry(value).generation == self._generation else None
        except DiscoveryError:  # a mark that one has withdrawn, or no entry: another wrote it
            return None
