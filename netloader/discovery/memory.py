"""A registry in the memory of one process: for tests, and the example of a store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

__all__ = ["MemoryRegistry", "MemoryStore"]


class MemoryRegistry:
    """A registry that lives as long as this object, for tasks of one event loop. It is an `OpenStore`.

    Attributes:
        names: Each name with its value, and when it expires by the clock of the event loop.
    """

    def __init__(self) -> None:
        self.names: dict[str, tuple[bytes, float]] = {}
        self.watchers: dict[asyncio.Event, str] = {}

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[MemoryStore]:
        """Open a connection."""
        yield MemoryStore(self)

    def flush(self) -> None:
        """Lose everything."""
        self.names.clear()
        for watcher in self.watchers:
            watcher.set()


class MemoryStore:
    """A connection to a :class:`MemoryRegistry`. A `LeaseStore`.

    Args:
        registry: The registry.
    """

    def __init__(self, registry: MemoryRegistry) -> None:
        self._registry = registry

    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        """See :meth:`netloader.discovery.store.LeaseStore.put`."""
        await anyio.lowlevel.checkpoint()
        self._write(name, value, ttl)

    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.create`."""
        await anyio.lowlevel.checkpoint()
        if self._value(name) is not None:
            return False
        self._write(name, value, ttl)
        return True

    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.renew`."""
        await anyio.lowlevel.checkpoint()
        if self._value(name) != value:
            return False
        self._registry.names[name] = value, anyio.current_time() + ttl
        return True

    async def remove(self, name: str, value: bytes) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.remove`."""
        await anyio.lowlevel.checkpoint()
        if self._value(name) != value:
            return False
        del self._registry.names[name]
        self._tell(name)
        return True

    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        """See :meth:`netloader.discovery.store.LeaseStore.read`."""
        await anyio.lowlevel.checkpoint()
        found = ((name, self._value(name)) for name in list(self._registry.names) if name.startswith(prefix))
        return dict([(name, value) for name, value in found if value is not None][:limit])

    async def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        """See :meth:`netloader.discovery.store.LeaseStore.changes`. It does not tell that a name has expired."""
        changed = asyncio.Event()
        self._registry.watchers[changed] = prefix
        try:
            while True:
                yield
                await changed.wait()
                changed.clear()
        finally:
            del self._registry.watchers[changed]

    def _value(self, name: str) -> bytes | None:
        value, until = self._registry.names.get(name, (None, 0.0))
        if value is not None and anyio.current_time() >= until:
            del self._registry.names[name]
            return None
        return value

    def _write(self, name: str, value: bytes, ttl: float) -> None:
        self._registry.names[name] = value, anyio.current_time() + ttl
        self._tell(name)

    def _tell(self, name: str) -> None:
        for watcher, prefix in self._registry.watchers.items():
            if name.startswith(prefix):
                watcher.set()
