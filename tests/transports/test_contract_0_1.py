"""A transport written for release 0.1 still works wherever it is passed, and its author gets a warning."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import EntryPoint
from typing import Any, cast

import pytest
import torch

import netloader
from netloader.errors import TransportError
from netloader.transports import registry
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup, Transport, depth_of
from netloader.transports.conformance import CHECKS, Check, Failed, check_transport, pair_maker
from netloader.transports.contract_0_1 import adapted
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from netloader.transports.memory import MemoryHub, MemoryTransport
from tests.transports.line_0_1 import LineChannel, LineTransport
from tests.transports.pairs import opened, setup_for, signals


def of_0_1() -> Transport:
    return cast("Transport", LineTransport())


def written_for_0_1() -> Any:
    return pytest.warns(DeprecationWarning, match=r"'line' \(LineTransport\) is written for netloader 0\.1")


@pytest.fixture
def line() -> Transport:
    with written_for_0_1() as told:
        made = adapted(of_0_1())
    assert [warning.filename for warning in told] == [__file__]
    return made


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check) -> None:
    with written_for_0_1():
        maker = pair_maker(of_0_1())
    await check_transport(maker, [check])


async def test_a_pull_through_objects_that_were_handed_over() -> None:
    held = {"weight": torch.arange(100_000, dtype=torch.int32)}
    into = {"weight": torch.zeros(100_000, dtype=torch.int32)}
    with written_for_0_1() as told:
        server = netloader.Server(held, host="127.0.0.1", transport=of_0_1())
    assert [warning.filename for warning in told] == [__file__]
    async with server:
        with written_for_0_1() as told:
            report = await netloader.pull(into, sources=[server.address], transport=of_0_1())
    assert [warning.filename for warning in told] == [__file__]
    assert torch.equal(into["weight"], held["weight"])
    assert [share.transport for share in report.sources.values()] == ["line"]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entry = EntryPoint(name="line", value=f"{LineTransport.__module__}:LineTransport", group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    for cached in (registry._entries, registry.load):
        cached.cache_clear()
    yield
    for cached in (registry._entries, registry.load):
        cached.cache_clear()


async def test_a_transport_of_0_1_is_found_by_its_name(registered: None) -> None:
    with written_for_0_1():
        (found,) = registry.available("cpu", "line").transports
    assert found.name == "line"
    assert registry.load("line") is found, "nobody is told twice"
    async with opened(found) as (server, client):
        assert (server.depth, client.depth, client.whole_blocks) == (1, 1, False)


async def test_faults_can_wrap_a_transport_of_0_1() -> None:
    with written_for_0_1():
        faulty = FaultyTransport(of_0_1(), Faults([Fault(FaultKind.CUT, 0, side=Side.RECV)]))
    async with opened(faulty) as (_, client):
        with pytest.raises(netloader.PeerLost, match="injected fault"):
            await client.recv([cast("BlockView", type("Block", (), {"number": 0, "nbytes": 1}))])


async def test_attributes_of_a_channel_of_0_1_are_kept(monkeypatch: pytest.MonkeyPatch, line: Transport) -> None:
    monkeypatch.setattr(LineChannel, "depth", 3, raising=False)
    monkeypatch.setattr(LineChannel, "whole_blocks", True, raising=False)
    async with opened(line) as (server, client):
        assert isinstance(server, LineChannel)
        assert (client.depth, client.whole_blocks) == (3, True)


async def test_an_offer_that_is_given_up_is_freed(line: Transport, no_leaked_descriptors: None) -> None:
    ours, theirs = signals()
    pending = await line.offer(setup_for(ours))
    assert len(pending.offer) == 34
    await pending.aclose()
    with pytest.raises(netloader.PeerLost, match="not there"):
        await line.connect(pending.offer, setup_for(theirs))
    ours.close()
    theirs.close()


def test_a_transport_of_the_present_contract_is_not_wrapped() -> None:
    memory = MemoryTransport()
    assert adapted(memory) is memory


class Half(MemoryTransport):
    """Its `offer` is that of the present contract, but it also has the method of 0.1."""

    async def accept(self, pending: Pending) -> Channel:
        raise AssertionError("not reached")


async def test_half_of_either_contract_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="'memory'"):
        half = adapted(Half(hub := MemoryHub()))
    ours, theirs = signals()
    with pytest.raises(TransportError, match=r"offer returns _MemoryPending.*the transport itself must not have it"):
        await half.offer(setup_for(ours))
    assert hub.open_offers == 0
    ours.close()
    theirs.close()


# --- other new parts of the contract ----------------------------------------------------------------------------------


class Bare:
    """A channel without `depth`."""

    def __init__(self, inner: Channel) -> None:
        self._inner = inner

    async def send(self, blocks: Sequence[BlockView]) -> None:
        await self._inner.send(blocks)

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        await self._inner.recv(blocks, landed)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Forgetful(MemoryTransport):
    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        return cast("Channel", Bare(await super().connect(offer, setup)))


class Tuples(MemoryTransport):
    async def offer(self, setup: Setup) -> Pending:
        pending = await super().offer(setup)
        return cast("Pending", (pending.offer, pending))


class Boundless(MemoryTransport):
    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        channel = await super().connect(offer, setup)
        channel.depth = 0
        return channel


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Forgetful, "connect returns no Channel, but Bare"),
        (Tuples, "offer returns no Pending, but tuple"),
        (Boundless, "both_ends_say_what_they_take: depth is 0"),
    ],
)
async def test_a_transport_that_lacks_a_part_of_the_contract_fails_the_checks(
    kind: type[MemoryTransport], why: str
) -> None:
    with pytest.raises(Failed, match=why):
        await check_transport(pair_maker(kind()))


async def test_the_conformance_suite_takes_channels_of_0_1_from_a_custom_pair_factory() -> None:
    @asynccontextmanager
    async def make_pair(*, stall: float = 20.0) -> AsyncIterator[tuple[Channel, Channel]]:
        async with opened(MemoryTransport(), stall=stall) as (server, client):
            yield cast("Channel", Bare(server)), cast("Channel", Bare(client))

    with pytest.warns(DeprecationWarning, match=r"Bare is a channel of netloader 0\.1"):
        await check_transport(make_pair)


async def test_depth_of_warns_and_names_its_replacement() -> None:
    async with opened(MemoryTransport()) as (_, client):
        for channel in (client, cast("Channel", Bare(client))):
            with pytest.warns(DeprecationWarning, match="channel.depth now"):
                assert depth_of(channel) == 1
