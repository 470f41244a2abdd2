"""Servers and pulls of the library that find each other in a registry, without an address typed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import pytest
import torch

import netloader
from netloader.core.choice import BOOT, HOST, NAME, ZONE
from netloader.core.entries import Entry, decode_entry
from netloader.core.model_key import key_of
from netloader.discovery import Publication, place
from netloader.discovery.leases.backend import LeaseBackend
from netloader.discovery.leases.publisher import LeasePublisher
from netloader.discovery.memory import MemoryRegistry
from netloader.errors import ConfigError, DiscoveryError, NoSourceLeft
from netloader.observe.events import Event, SourceChosen
from netloader.server import publishing
from tests.discovery.world import Faulty
from tests.drivers.kit import until

PATIENCE = 60.0
IDENTITY = netloader.ModelIdentity(model="m", architecture="A", dtype="float32")


def weights(seed: int = 0, rows: int = 64) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"layer.{n}.weight": torch.randn(rows, 64, generator=made) for n in range(8)}


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def entries(registry: MemoryRegistry) -> list[Entry]:
    found = []
    for value, _ in registry.names.values():
        try:
            found.append(decode_entry(value))
        except DiscoveryError:
            continue  # a mark that an entry was withdrawn
    return sorted(found, key=lambda entry: entry.address)


@asynccontextmanager
async def serving(
    backend: object, tensors: dict[str, torch.Tensor], identity: netloader.ModelIdentity = IDENTITY, **options: object
) -> AsyncIterator[netloader.Server]:
    async with netloader.Server(tensors, identity, host="127.0.0.1", discovery=backend, **options) as server:  # type: ignore[arg-type]
        yield server


async def test_a_server_is_found_without_an_address_and_withdraws_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NETLOADER_ZONE", "zone-a")
    registry, held = MemoryRegistry(), weights()
    backend = LeaseBackend(registry)
    async with serving(backend, held) as server:
        into = blank(held)
        with anyio.fail_after(PATIENCE):
            report = await netloader.pull(into, IDENTITY, discovery=backend, wait=PATIENCE)
        assert equal(into, held)
        assert list(report.sources) == [str(server.address)]
        (entry,) = entries(registry)
        assert (entry.key, entry.address, entry.root) == (key_of(IDENTITY), str(server.address), report.root)
        assert (entry.kind, entry.rank, entry.role, entry.layout) == ("seed", 0, "target", "raw")
        assert entry.labels[ZONE] == "zone-a"
        assert entry.labels[NAME] == "m"
        assert entry.labels.keys() >= {HOST, BOOT}
        assert (entry.load.waiting, entry.load.cap) == (0, 8)
    assert entries(registry) == []


async def test_what_is_retracted_is_withdrawn_and_what_is_held_anew_is_another_generation() -> None:
    registry, held = MemoryRegistry(), weights()
    async with serving(LeaseBackend(registry), held) as server:
        await until(lambda: entries(registry))
        (first,) = entries(registry)
        await server.retract(reason="the weights change")
        await until(lambda: not entries(registry))
        other = weights(1)
        root = await server.hold(other, IDENTITY)
        await until(lambda: entries(registry))
        (second,) = entries(registry)
    assert second.root == root != first.root
    assert second.generation != first.generation


async def test_a_client_prefers_its_zone_and_given_sources_before_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = (f"host-{number}" for number in itertools.count())
    monkeypatch.setattr(place, "_BOOT_ID", Path("/nowhere"))  # each of them on a host of its own
    monkeypatch.setattr("socket.gethostname", lambda: next(hosts))
    registry, held = MemoryRegistry(), weights()
    backend = LeaseBackend(registry)
    async with AsyncExitStack() as stack:
        zones = ["far", "near", "far", "far"]
        servers = [await stack.enter_async_context(serving(backend, held, zone=zone)) for zone in zones]
        given = await stack.enter_async_context(serving(None, held))
        await until(lambda: len(entries(registry)) == len(zones))
        for sources, expected in (([], servers[1]), ([str(given.address)], given)):
            for _ in range(4):
                chosen: list[str] = []

                def note(event: Event, chosen: list[str] = chosen) -> None:
                    if isinstance(event, SourceChosen):
                        chosen.append(event.source)

                into = blank(held)
                with anyio.fail_after(PATIENCE):
                    await netloader.pull(
                        into, IDENTITY, sources=sources, discovery=backend, zone="near", observers=[note]
                    )
                assert equal(into, held)
                assert chosen[0] == str(expected.address)


async def test_a_server_that_appears_during_the_pull_joins_it() -> None:
    registry, held = MemoryRegistry(), weights(rows=1024)
    backend = LeaseBackend(registry)
    into = blank(held)
    reports = []

    async def pull() -> None:
        reports.append(await netloader.pull(into, IDENTITY, discovery=backend, wait=PATIENCE))

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pull)
            await anyio.wait_all_tasks_blocked()
            server = await stack_server(backend, held, tasks)
            await until(lambda: reports)
            tasks.cancel_scope.cancel()
    assert equal(into, held)
    assert list(reports[0].sources) == [server]


async def stack_server(backend: object, held: dict[str, torch.Tensor], tasks: anyio.abc.TaskGroup) -> str:
    async def serve(*, task_status: anyio.abc.TaskStatus[str] = anyio.TASK_STATUS_IGNORED) -> None:
        async with serving(backend, held) as server:
            task_status.started(str(server.address))
            await anyio.sleep_forever()

    address: str = await tasks.start(serve)
    return address


async def test_a_pull_that_relays_is_published_as_a_relay_and_then_as_a_seed_and_does_not_find_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "UPDATE_EVERY", 0.05)
    registry, held = MemoryRegistry(), weights(rows=1024)
    backend = LeaseBackend(registry, ttl=1.0)
    kinds: list[str] = []
    async with (
        serving(backend, held),
        netloader.Server(host="127.0.0.1", discovery=backend) as relay,
    ):
        into = blank(held)

        def look(progress: netloader.Progress) -> None:
            kinds.extend(e.kind for e in entries(registry) if e.address == str(relay.address))

        with anyio.fail_after(PATIENCE):
            report = await netloader.pull(into, IDENTITY, discovery=backend, relay=relay, wait=PATIENCE, progress=look)
        assert equal(into, held)
        assert str(relay.address) not in report.sources

        def of_relay() -> list[Entry]:
            return [e for e in entries(registry) if e.address == str(relay.address)]

        await until(lambda: [e.kind for e in of_relay()] == ["seed"])
        assert of_relay()[0].root == report.root
        assert set(kinds) <= {"relay", "seed"}


async def test_a_registry_that_is_down_affects_neither_serving_nor_given_sources(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "netloader")
    faulty, held = Faulty(), weights()
    faulty.stop()
    backend = LeaseBackend(faulty, ttl=1.0, name="fleet")
    async with serving(backend, held) as server:
        for _ in range(2):
            into = blank(held)
            with anyio.fail_after(PATIENCE):
                await netloader.pull(into, IDENTITY, sources=[str(server.address)], discovery=backend)
            assert equal(into, held)
        await anyio.sleep(2.0)  # two leases
        said = [r.getMessage() for r in caplog.records if "publishing" in r.getMessage()]
        assert len(said) == 1, said
        faulty.start()
        await until(lambda: entries(faulty.registry))
        into = blank(held)
        with anyio.fail_after(PATIENCE):
            await netloader.pull(into, IDENTITY, discovery=backend)
        assert equal(into, held)


@pytest.mark.parametrize("error", [DiscoveryError("too long"), RuntimeError("a fault")])
async def test_a_publisher_that_raises_is_tried_again_and_nobody_waits_for_it(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publishing, "_PAUSE", (0.1, 0.2))
    registry, held = MemoryRegistry(), weights()
    failing, tries = True, 0
    publish = LeasePublisher.publish

    def flaky(self: LeasePublisher, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        nonlocal tries
        tries += 1
        if failing:
            raise error
        return publish(self, entry)

    monkeypatch.setattr(LeasePublisher, "publish", flaky)
    async with serving(LeaseBackend(registry), held) as server:
        assert await server.until_published(within=PATIENCE)
        await until(lambda: tries > 3)
        assert not entries(registry)
        failing = False
        await until(lambda: entries(registry))
    assert not entries(registry)
    assert len([record for record in caplog.records if "not published" in record.getMessage()]) == 1


async def test_servers_of_another_model_are_not_found_and_a_pull_has_to_say_what_it_wants() -> None:
    registry, held = MemoryRegistry(), weights()
    backend = LeaseBackend(registry)
    other = netloader.ModelIdentity(model="m", architecture="B", dtype="float32")
    async with serving(backend, held, other) as server:
        await until(lambda: entries(registry))
        with pytest.raises(NoSourceLeft, match="no source"):
            await netloader.pull(blank(held), IDENTITY, discovery=backend)
        with pytest.raises(ConfigError, match="identity"):
            await netloader.pull(blank(held), discovery=backend)
        with pytest.raises(ConfigError, match="identity"):
            await netloader.pull_new(discovery=backend)
        for unnamed in (netloader.ModelIdentity(), netloader.ModelIdentity(architecture="B", dtype="float32")):
            with pytest.raises(ConfigError, match="a name or a fingerprint"):
                await netloader.pull(blank(held), unnamed, discovery=backend)
        with pytest.raises(ConfigError, match="sources"):
            await netloader.pull_new()
        tensors, _ = await netloader.pull_new(identity=other, discovery=backend)
        assert equal(dict(tensors), held)
        with pytest.raises(NoSourceLeft, match="architecture"):
            await netloader.pull_new(identity=IDENTITY, sources=[str(server.address)])


async def test_two_fine_tunes_of_one_architecture_have_one_key_and_are_not_mixed_up() -> None:
    registry, ours, theirs = MemoryRegistry(), weights(1), weights(2)
    backend = LeaseBackend(registry)
    mine = netloader.ModelIdentity(model="mine", architecture="A", dtype="float32")
    async with serving(backend, theirs, IDENTITY), serving(backend, ours, mine):
        await until(lambda: len(entries(registry)) == 2)
        assert len({entry.key for entry in entries(registry)}) == 1
        into = blank(ours)
        with anyio.fail_after(PATIENCE):
            report = await netloader.pull(into, mine, discovery=backend)
    assert equal(into, ours)
    assert report.attempts == (), "the one with this name is tried first"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"discovery": "nothing"}, "discovery"),
        ({"discovery": []}, "discovery"),
        ({"discovery": ["x://", 7]}, r"discovery\[0\].*\n.*discovery\[1\]"),
        ({"zone": "no zone"}, "zone"),
    ],
)
async def test_wrong_arguments_are_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        netloader.Server(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=named):
        await netloader.pull({}, IDENTITY, sources=[], **options)  # type: ignore[arg-type]


async def test_a_zone_in_the_environment_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLOADER_ZONE", "a b")
    with pytest.raises(ConfigError, match="NETLOADER_ZONE"):
        netloader.Server()
    netloader.Server(zone="given")
