"""A registry in memory that fails as a test wants, and what a stream has told so far."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import anyio

from netloader.core.addresses import Address
from netloader.core.sources import Source
from netloader.discovery import Appeared, Listed, SourceProvider, Vanished
from netloader.discovery.memory import MemoryRegistry, MemoryStore
from netloader.errors import DiscoveryError

T = TypeVar("T")

DOWN = DiscoveryError("it is down")


class Faulty:
    """Opens connections to a registry. What a call meets is decided by `fault`, call by call.

    `fault` is given the name of the method, and returns "" (works), "refused" (raises, without an effect), "lost" (has
    its effect, and raises) or "stuck" (never answers).
    """

    def __init__(self, registry: MemoryRegistry | None = None) -> None:
        self.registry = MemoryRegistry() if registry is None else registry
        self.fault: Callable[[str], str] = lambda _: ""
        self.calls: list[str] = []
        self._cut = anyio.Event()

    def stop(self) -> None:
        """From now on nothing is answered, and whoever listens is cut off."""
        self.fault = lambda _: "refused"
        self._cut.set()
        self._cut = anyio.Event()

    def start(self) -> None:
        """It answers again."""
        self.fault = lambda _: ""

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[FaultyStore]:
        yield FaultyStore(self)

    async def cut(self) -> None:
        await self._cut.wait()


class FaultyStore:
    def __init__(self, world: Faulty) -> None:
        self._world = world
        self._store = MemoryStore(world.registry)

    async def _call(self, method: str, call: Callable[[], Awaitable[T]]) -> T:
        self._world.calls.append(method)
        fault = self._world.fault(method)
        if fault == "stuck":
            await anyio.sleep_forever()
        if fault == "refused":
            await anyio.sleep(0.01)
            raise DOWN
        result = await call()
        if fault == "lost":
            raise DOWN
        return result

    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        await self._call("put", lambda: self._store.put(name, value, ttl=ttl))

    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        return await self._call("create", lambda: self._store.create(name, value, ttl=ttl))

    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        return await self._call("renew", lambda: self._store.renew(name, value, ttl=ttl))

    async def remove(self, name: str, value: bytes) -> bool:
        return await self._call("remove", lambda: self._store.remove(name, value))

    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        return await self._call("read", lambda: self._store.read(prefix, limit=limit))

    async def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        async with aclosing(self._store.changes(prefix)) as changes:
            while True:
                if self._world.fault("changes"):
                    raise DOWN
                async with anyio.create_task_group() as tasks:

                    async def until_cut() -> None:
                        await self._world.cut()
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(until_cut)
                    await anext(changes)
                    tasks.cancel_scope.cancel()
                yield


class Watcher:
    """Watches a provider in a task, and keeps what it has told.

    Attributes:
        sources: What is available, as far as it was told.
        history: ``+address/generation`` and ``-address``, and ``.`` for `Listed`, with the time.
    """

    def __init__(self, provider: SourceProvider) -> None:
        self._provider = provider
        self.sources: dict[Address, Source] = {}
        self.history: list[tuple[float, str]] = []
        self.listed = anyio.Event()
        self._changed = anyio.Event()

    @property
    def words(self) -> list[str]:
        return [word for _, word in self.history]

    async def run(self) -> None:
        async with aclosing(self._provider.watch()) as changes:
            async for change in changes:
                match change:
                    case Appeared(source):
                        self.sources[source.address] = source
                        word = f"+{source.address}/{source.generation}"
                    case Vanished(address):
                        self.sources.pop(address, None)
                        word = f"-{address}"
                    case _:
                        assert isinstance(change, Listed)
                        self.listed.set()
                        word = "."
                self.history.append((anyio.current_time(), word))
                changed, self._changed = self._changed, anyio.Event()
                changed.set()

    async def until(self, condition: Callable[[], bool], within: float) -> None:
        """Wait until a condition holds that depends on what was told."""
        with anyio.fail_after(within):
            while not condition():
                await self._changed.wait()
