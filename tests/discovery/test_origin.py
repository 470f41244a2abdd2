"""One instance of a fleet reads storage, the others wait for it and pull: together, and when the one dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file, save_file

import netloader
from netloader.client.origin import Holders, useless_after
from netloader.core.addresses import Address, parse_address
from netloader.core.choice import NAME
from netloader.core.entries import Entry
from netloader.core.model_key import key_of
from netloader.core.sources import Source
from netloader.discovery.base import Appeared, Backend, Listed, SourceChange, Vanished
from netloader.discovery.leases.backend import LeaseBackend
from netloader.discovery.memory import MemoryRegistry
from netloader.errors import TRANSIENT_CODES, AttemptFailed, ConfigError, NoSourceLeft, PeerLost, RefusedError
from tests.discovery.test_library import blank, equal, weights
from tests.discovery.world import Faulty
from tests.drivers.kit import until

PATIENCE = 100.0
ENGINES = 8
TTL = 1.0
IDENTITY = netloader.ModelIdentity(model="m", architecture="A", dtype="float32")
HELD = weights(rows=512)

Tell = Callable[[str], None]


class Storage:
    """A folder with one file. Counts how often it is opened for reading."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "model.safetensors"
        save_file(HELD, self.file)
        self.opened = 0

    def read(self, into: dict[str, torch.Tensor]) -> None:
        self.opened += 1
        for name, tensor in load_file(self.file).items():
            into[name].copy_(tensor)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


class Engine:
    """One instance: tensors of its own, a server of its own, and a connection of its own to the registry."""

    def __init__(self, registry: MemoryRegistry, storage: Storage) -> None:
        self.connection = Faulty(registry)
        self.discovery: list[Backend] = [LeaseBackend(self.connection, ttl=TTL)]
        self.storage = storage
        self.tensors = blank(HELD)
        self.report: netloader.PullReport | None = None
        self.loaded = self.done = False
        self.scope = anyio.CancelScope()
        self.before: Callable[[Engine], Awaitable[None]] | None = None
        self.after: Callable[[Engine], Awaitable[None]] | None = None

    async def load(self, tell: Tell) -> None:
        if self.before is not None:
            await self.before(self)
        tell("reading")
        await anyio.to_thread.run_sync(self.storage.read, self.tensors)
        if self.after is not None:
            await self.after(self)
        self.loaded = True

    async def run(self) -> None:
        with self.scope:
            async with netloader.Server(host="127.0.0.1", discovery=self.discovery, fan_out=0) as server:
                self.report = await netloader.pull_or_load(
                    self.tensors, IDENTITY, self.load, server=server, discovery=self.discovery, wait=PATIENCE
                )
                self.done = True
                await anyio.sleep_forever()

    def die(self) -> None:
        """Nothing is withdrawn: as if its host were gone."""
        self.connection.stop()
        self.scope.cancel()


async def all_done(engines: list[Engine], dead: list[Engine] | None = None) -> None:
    """Wait until all but one that dies have their weights, and compare them."""
    with anyio.fail_after(PATIENCE):
        await until(lambda: dead is None or dead)
        alive = [engine for engine in engines if engine not in (dead or [])]
        await until(lambda: all(engine.done for engine in alive))
    assert len(alive) >= len(engines) - 1
    assert all(equal(engine.tensors, HELD) for engine in alive)


async def test_eight_engines_that_start_together_open_the_files_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "netloader")
    registry = MemoryRegistry()
    engines = [Engine(registry, storage) for _ in range(ENGINES)]

    async def slowly(_: Engine) -> None:
        await until(lambda: sum("waiting for" in record.getMessage() for record in caplog.records) >= ENGINES - 1)

    for engine in engines:
        engine.after = slowly  # the others wait for it by then
    async with anyio.create_task_group() as tasks:
        for engine in engines:
            tasks.start_soon(engine.run)
        await all_done(engines)
        tasks.cancel_scope.cancel()
    assert storage.opened == 1
    assert [engine.loaded for engine in engines].count(True) == 1
    assert sum(engine.report is not None for engine in engines) == ENGINES - 1


MOMENTS = ("before it reads", "after it has read", "while others pull from it")


@pytest.mark.parametrize("moment", MOMENTS)
async def test_when_the_origin_dies_the_next_one_loads(moment: str, storage: Storage) -> None:
    registry = MemoryRegistry()
    engines = [Engine(registry, storage) for _ in range(ENGINES)]
    dead: list[Engine] = []

    async def die(engine: Engine) -> None:
        if not dead:
            dead.append(engine)
            engine.die()
            await anyio.sleep_forever()

    for engine in engines:
        if moment == MOMENTS[0]:
            engine.before = die
        elif moment == MOMENTS[1]:
            engine.after = die
    async with anyio.create_task_group() as tasks:
        for engine in engines:
            tasks.start_soon(engine.run)
        if moment == MOMENTS[2]:
            with anyio.fail_after(PATIENCE):
                await until(lambda: any(engine.done for engine in engines))
            dead.append(next(engine for engine in engines if engine.loaded))
            dead[0].die()
        await all_done(engines, dead)
        tasks.cancel_scope.cancel()
    expected = {MOMENTS[0]: (1,), MOMENTS[1]: (2,), MOMENTS[2]: (1, 2)}  # others may have had all blocks by then
    assert storage.opened in expected[moment]


def put_forward(registry: MemoryRegistry, seconds: float) -> None:
    """The clock of a registry jumps: leases end that many seconds earlier for everyone."""
    registry.names = {name: (value, until - seconds) for name, (value, until) in registry.names.items()}


@pytest.mark.parametrize("which", [0, 1])
async def test_the_clock_of_a_registry_that_jumps_by_30_seconds_costs_reading_at_most(
    which: int, storage: Storage
) -> None:
    """Of two registries, whose clocks are apart from then on. No clock of a host is compared with either of them."""
    registries = MemoryRegistry(), MemoryRegistry()
    engines = [Engine(registries[0], storage) for _ in range(ENGINES // 2)]

    jumps = list[int]()

    async def jump(_: Engine) -> None:
        if not jumps:  # at the first load; a second one finds clocks that are apart, and go on
            jumps.append(which)
            put_forward(registries[which], 30.0)

    for engine in engines:
        engine.discovery = [engine.discovery[0], LeaseBackend(registries[1], ttl=TTL)]
        engine.before = jump
    async with anyio.create_task_group() as tasks:
        for engine in engines:
            tasks.start_soon(engine.run)
        await all_done(engines)
        tasks.cancel_scope.cancel()
    assert storage.opened in ((1, 2) if which == 0 else (1,))


async def test_wrong_arguments_are_refused_by_name(storage: Storage) -> None:
    engine = Engine(MemoryRegistry(), storage)
    async with netloader.Server(host="127.0.0.1") as server:
        with pytest.raises(ConfigError, match="discovery"):
            await netloader.pull_or_load(engine.tensors, IDENTITY, engine.load, server=server, discovery=None)
        with pytest.raises(ConfigError, match="server"):
            await netloader.pull_or_load(
                engine.tensors,
                IDENTITY,
                engine.load,
                server=None,  # type: ignore[arg-type]
                discovery=engine.discovery,
            )


async def test_a_load_in_a_thread_may_tell_how_far_it_is(storage: Storage) -> None:
    """asyncio's debug mode refuses calls of another thread that are not meant for it."""
    asyncio.get_running_loop().set_debug(True)
    backend = LeaseBackend(MemoryRegistry(), ttl=TTL)
    tensors = blank(HELD)

    def load(tell: Tell) -> None:
        tell("half of it")
        storage.read(tensors)

    async with netloader.Server(host="127.0.0.1", discovery=backend) as server:
        with anyio.fail_after(PATIENCE):
            assert await netloader.pull_or_load(tensors, IDENTITY, load, server=server, discovery=backend) is None
    assert equal(tensors, HELD)


async def test_a_server_that_is_published_nowhere_and_an_identity_without_a_name_are_refused() -> None:
    """Others would not find the server, and weights of any model could be taken."""
    backend = LeaseBackend(MemoryRegistry(), ttl=TTL)
    unnamed = netloader.ModelIdentity(architecture="A", dtype="float32")
    loads = list[str]()

    async def load(_tell: Tell) -> None:
        loads.append("from storage")

    alone, found = netloader.Server(host="127.0.0.1"), netloader.Server(host="127.0.0.1", discovery=backend)
    async with alone, found:
        for server, identity, match in (
            (alone, IDENTITY, "with discovery="),
            (found, unnamed, "a name or a fingerprint"),
        ):
            with pytest.raises(ConfigError, match=match):
                await netloader.pull_or_load(blank(HELD), identity, load, server=server, discovery=backend)
    assert not loads


@contextlib.asynccontextmanager
async def another_fine_tune(backend: LeaseBackend) -> AsyncIterator[None]:
    other = netloader.ModelIdentity(model="another", architecture="A", dtype="float32")
    async with netloader.Server(host="127.0.0.1", discovery=backend) as server:
        await server.hold({name: tensor + 1 for name, tensor in HELD.items()}, other)
        assert await server.until_published("target", within=PATIENCE)
        yield


@contextlib.asynccontextmanager
async def one_that_refuses(backend: LeaseBackend) -> AsyncIterator[None]:
    """Its entry claims to be of this model."""
    other = netloader.ModelIdentity(model="another", architecture="other")
    async with (
        netloader.Server({"w": torch.ones(10)}, other, host="127.0.0.1") as server,
        listed(backend, server.address),
    ):
        yield


@contextlib.asynccontextmanager
async def one_that_died(backend: LeaseBackend) -> AsyncIterator[None]:
    async with netloader.Server(host="127.0.0.1") as server:
        address = server.address
    async with listed(backend, address):
        yield


def listed(backend: LeaseBackend, address: Address) -> AbstractAsyncContextManager[object]:
    publisher = backend.publisher()
    assert publisher is not None
    return publisher.publish(Entry(key_of(IDENTITY), str(address), "its generation", labels={NAME: "m"}))


@pytest.mark.parametrize("other", [another_fine_tune, one_that_refuses, one_that_died])
async def test_an_entry_that_does_not_hold_the_model_keeps_nobody_waiting(
    other: Callable[[LeaseBackend], AbstractAsyncContextManager[None]],
) -> None:
    """It stays listed, under the key of the model, and this instance loads soon all the same."""
    registry = MemoryRegistry()
    began = anyio.current_time()
    published = other(LeaseBackend(registry, ttl=TTL))
    async with published, netloader.Server(host="127.0.0.1", discovery=LeaseBackend(registry, ttl=TTL)) as server:
        mine = blank(HELD)

        def load(_: Tell) -> None:
            for name, tensor in HELD.items():
                mine[name].copy_(tensor)

        report = await netloader.pull_or_load(
            mine, IDENTITY, load, server=server, discovery=LeaseBackend(registry, ttl=TTL), wait=PATIENCE
        )
    assert report is None
    assert equal(mine, HELD)
    assert anyio.current_time() - began < PATIENCE / 2


SOURCE = Source(parse_address("127.0.0.1:1"), labels={NAME: "m"}, generation="g1")


@pytest.mark.parametrize(
    ("name", "useless", "source", "counts"),
    [
        ("m", (), SOURCE, True),
        ("", (), SOURCE, True),
        ("n", (), SOURCE, False),
        ("m", ("g1",), SOURCE, False),
        ("m", (), replace(SOURCE, labels={NAME: "m", "kind": "relay"}), False),
        ("m", (), replace(SOURCE, labels={NAME: "m", "kind": "seed"}), True),
        ("m", ("127.0.0.1:1",), SOURCE, True),
        ("m", ("g1",), replace(SOURCE, generation="g2"), True),
        ("m", ("127.0.0.1:1",), replace(SOURCE, generation=""), False),
    ],
)
async def test_which_sources_hold_the_model(name: str, useless: tuple[str, ...], source: Source, counts: bool) -> None:
    class Given:
        async def watch(self) -> AsyncGenerator[SourceChange, None]:
            yield Appeared(source)
            yield Listed()

    found = [change async for change in Holders(Given(), name, useless).watch()]
    assert found == [Appeared(source) if counts else Vanished(source.address), Listed()]


def test_a_source_that_was_busy_may_be_of_use_again() -> None:
    causes = {
        "lost": PeerLost("gone"),
        "refused": RefusedError("identity", "another model"),
        **{code: RefusedError(code, "later") for code in TRANSIENT_CODES},
    }
    error = NoSourceLeft([AttemptFailed("h:1", cause, 1, name) for name, cause in causes.items()])
    assert useless_after(error) == {"lost", "refused"}
    assert useless_after(NoSourceLeft([AttemptFailed("h:1", PeerLost("gone"))])) == {"h:1"}
