"""Finds the servers that a registry names, and tells what changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from functools import partial

import anyio
import anyio.lowlevel

from netloader.core.entries import MAX_ENTRY_BYTES, decode_entry
from netloader.core.sources import MAX_KNOWN, Source
from netloader.core.texts import LINE, one_line
from netloader.discovery.base import Listed, SourceChange, Wanted
from netloader.discovery.beside import beside
from netloader.discovery.leases.calls import Pace, ask, listen
from netloader.discovery.leases.names import WITHDRAWN, server_name, servers_prefix
from netloader.discovery.outage import Outage
from netloader.discovery.store import OpenStore
from netloader.discovery.told import Told
from netloader.errors import DiscoveryError, plural

__all__ = ["LeaseSources"]

_QUICK = 0.2
_PER_SERVER = 0.005
"""Seconds between two reads: at least, and for each server. A thousand clients read a thousand servers at a bearable
rate, and the few servers of a small fleet are seen at once."""

_AT_ONCE = 256
"""Entries that are decoded without giving others the event loop."""

_log = logging.getLogger("netloader")


class LeaseSources:
    """Finds the servers that are published in a registry. A `SourceProvider`.

    While the registry does not answer, all sources that are known stay known. A source whose entry is missing stays
    known for half a lease: the registry may have been emptied, and the server publishes again. One that has withdrawn
    vanishes at once, and so does one whose address has another generation.

    Args:
        open_store: Opens a connection to the registry.
        prefix: The beginning of all names.
        wanted: Which servers.
        pace: How often it reads.
        name: Of the registry, for the log.
    """

    def __init__(self, open_store: OpenStore, prefix: str, wanted: Wanted, pace: Pace, name: str) -> None:
        self._open = open_store
        self._prefix = prefix
        self._wanted = wanted
        self._pace = pace
        self._name = name

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """See :meth:`netloader.discovery.SourceProvider.watch`. It ends when it is closed only, and raises nothing."""
        pace, below = self._pace, servers_prefix(self._prefix, self._wanted)
        outage, told, reader = Outage(f"finding sources in {self._name}"), Told(pace.missing), _Reader(self._prefix)
        changed = asyncio.Event()
        listed = False
        async with self._open() as store, beside(partial(listen, store, below, changed, pace), "netloader-changes"):
            while True:
                changed.clear()
                began = anyio.current_time()
                try:
                    values = await ask(store.read(below, limit=MAX_KNOWN + 1), pace.call)
                except DiscoveryError as error:
                    outage.failed(error)
                    told.unknown()
                    await anyio.sleep(pace.retry)
                    continue
                outage.over()
                found = await reader.sources(values)
                for change in told.changes(found, anyio.current_time()):
                    yield change
                if not listed:
                    listed = True
                    yield Listed()
                until = began + pace.renew if told.due is None else min(began + pace.renew, told.due)
                with anyio.move_on_at(until):
                    await changed.wait()
                await anyio.sleep_until(began + min(pace.renew, _QUICK + _PER_SERVER * len(told)))


class _Reader:
    """Decodes entries that anyone may have written. An entry that has not changed is not decoded again."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._decoded: dict[str, tuple[bytes, Source | None]] = {}
        self._said = False
        self._said_more = False

    async def sources(self, values: Mapping[str, bytes]) -> dict[str, Source | None]:
        """The servers by name; None for one that has withdrawn. What is no server is left out, and logged once."""
        if len(values) > MAX_KNOWN and not self._said_more:
            self._said_more = True
            _log.warning("netloader: a registry names more than %d servers; the others are left out", MAX_KNOWN)
        found: dict[str, Source | None] = {}
        decoded: dict[str, tuple[bytes, Source | None]] = {}
        skipped: list[str] = []
        for count, (name, value) in enumerate(sorted(values.items())[:MAX_KNOWN]):
            if count % _AT_ONCE == _AT_ONCE - 1:
                await anyio.lowlevel.checkpoint()
            known = self._decoded.get(name)
            if known is None or known[0] != value:
                if value == WITHDRAWN:
                    found[name] = None
                    continue
                try:
                    known = value, self._source(name, value)
                except Exception as error:  # noqa: BLE001 - no entry of a stranger may hide the others
                    skipped.append(f"{name}: {str(error) or type(error).__name__}")
                    known = value[: MAX_ENTRY_BYTES + 1], None
            decoded[name] = known
            if known[1] is not None:
                found[name] = known[1]
        self._decoded = decoded
        if skipped and not self._said:
            self._said = True
            names, first = plural(len(skipped), "name"), one_line(skipped[0], LINE)
            _log.warning("netloader: %s in a registry can't be used, and left out: %s", names, first)
        return found

    def _source(self, name: str, value: bytes) -> Source:
        entry = decode_entry(value)
        if server_name(self._prefix, entry) != name:
            raise DiscoveryError("the entry says another address, key, role or rank than its name")
        return entry.source()
