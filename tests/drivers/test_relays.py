"""Relays serve the blocks that they have while they pull the others; a client pulls from several sources at once."""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup

from netloader.client.pull import pull_from
from netloader.core import messages, pull_state, redirect_budget
from netloader.core.addresses import Address, seen_from
from netloader.core.options import PullOptions
from netloader.core.protocol import State
from netloader.core.report import Progress, PullReport
from netloader.core.sources import Source
from netloader.discovery.base import Appeared, Listed, SourceChange, SourceProvider
from netloader.discovery.fixed import FixedSources
from netloader.errors import DigestMismatch, NetloaderError, NoSourceLeft, RefusedError, RootMismatch
from netloader.server import session as server_session
from netloader.server.admission import Admission
from netloader.session.relay_progress import Supply
from netloader.tensors import destination, digest_of
from netloader.transports.base import Transport
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from tests.drivers import kit, peers

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
BLOCKS = len(HOLDING.announcement.plan.blocks)
HELD_AFTER = 7
CARRIERS = ("memory", "gloo", "tcp", "shm")
"""What carries blocks between CPUs. Tests that are not about moving blocks take the first one only."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody leaves, or passes over, relays and clients at which nothing moves: here they are held on purpose."""
    monkeypatch.setattr(Admission, "moves", lambda *_: True)
    monkeypatch.setattr(Admission, "in_use", lambda *_: True)
    monkeypatch.setattr(redirect_budget, "_SECONDS", kit.PATIENCE)
    monkeypatch.setattr(server_session, "_RELAY_DECISION", kit.PATIENCE)


@pytest.fixture
def carrier(request: pytest.FixtureRequest) -> Transport:
    """A transport for both ends, by name."""
    return kit.carrier(request.param)


@dataclass
class Replica:
    """A client with its own server that relays the blocks it pulls."""

    server: kit.WatchedServer
    transport: Transport
    into: kit.Tensors = field(default_factory=lambda: kit.blank(SOURCE))
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    report: PullReport | None = None
    error: NetloaderError | None = None
    verified: int = 0
    verified_by: dict[str, int] = field(default_factory=dict)
    """What was verified in all when a block of a source was verified last."""

    def step(self, progress: Progress) -> None:
        self.verified = self.verified_by[progress.source] = progress.verified

    async def pull(self, *sources: Address, provider: SourceProvider | None = None, **options: object) -> None:
        usual = {"timings": kit.CALM, "timeout": kit.PATIENCE, "connect_timeout": kit.PATIENCE}
        chosen = PullOptions(**{**usual, **options})  # type: ignore[arg-type]
        with self.scope:
            try:
                self.report = await pull_from(
                    destination(self.into),
                    kit.IDENTITY,
                    provider or FixedSources(sources),
                    [self.transport],
                    digest_of,
                    chosen,
                    self.step,
                    relay=self.server,
                )
            except NoSourceLeft as error:
                self.error = error

    def start(
        self, tasks: TaskGroup, *sources: Address, provider: SourceProvider | None = None, **options: object
    ) -> None:
        async def run() -> None:
            await self.pull(*sources, provider=provider, **options)

        tasks.start_soon(run)

    @property
    def address(self) -> str:
        return str(kit.at(self.server))

    def joined(self) -> bool:
        """Whether a client pulls from here."""
        return any(session.state is State.TRANSFER for session in self.server.sessions)

    def complete(self) -> bool:
        return self.report is not None and kit.contents(self.into) == kit.contents(SOURCE)

    def supply(self) -> Supply:
        """Its relay progress: what its server can serve so far."""
        (holding,) = self.server.holdings.held()
        supply = self.server.holdings.supply_of(holding)
        assert supply is not None
        return supply

    def took_from(self, source: str) -> int:
        assert self.report is not None
        return self.report.sources[source].blocks if source in self.report.sources else 0


@asynccontextmanager
async def replica(transport: Transport, *faults: Fault) -> AsyncIterator[Replica]:
    """A replica with `faults` in what its server sends, not in what its pull receives."""
    async with kit.serving(FaultyTransport(transport, Faults(faults)) if faults else transport) as server:
        yield Replica(server, transport)


@asynccontextmanager
async def held_seed(transport: Transport, **options: Any) -> AsyncIterator[tuple[kit.WatchedServer, Faults]]:
    """A server that sends HELD_AFTER blocks of each pull and then waits until it is released."""
    faults = Faults([Fault(FaultKind.HOLD, HELD_AFTER, side=Side.SEND, times=None)])
    async with kit.serving(FaultyTransport(transport, faults), HOLDING, timings=kit.CALM, **options) as server:
        yield server, faults


def serves(server: kit.WatchedServer, clients: int) -> bool:
    return sum(session.state is State.TRANSFER for session in server.sessions) == clients


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_a_chain_forms_and_every_block_leaves_the_seed_once(carrier: Transport) -> None:
    async with (
        held_seed(carrier) as (seed, faults),
        replica(carrier) as first,
        replica(carrier) as second,
        replica(carrier) as third,
        anyio.create_task_group() as tasks,
    ):
        chain = [first, second, third]
        for place, one in enumerate(chain):
            one.start(tasks, kit.at(seed))
            if place == 0:
                await kit.until(lambda: any(s.state is State.TRANSFER for s in seed.sessions), "the seed serves")
            else:
                await kit.until(chain[place - 1].joined, f"replica {place} joins the one before it")
        assert len([s for s in seed.sessions if s.state is State.TRANSFER]) == 1
        faults.release()
        await kit.until(lambda: all(one.complete() for one in chain), "all are complete")
        assert first.took_from(str(kit.at(seed))) == BLOCKS
        assert second.took_from(first.address) == BLOCKS
        assert third.took_from(second.address) == BLOCKS
        served = [session for session in seed.ended if session.info().blocks]
        assert sum(session.info().blocks for session in served) == BLOCKS


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_when_a_relay_dies_its_clients_find_another_source_and_keep_what_they_have(carrier: Transport) -> None:
    async with (
        held_seed(carrier) as (seed, faults),
        replica(carrier) as first,
        replica(carrier) as second,
        replica(carrier) as third,
        anyio.create_task_group() as tasks,
    ):
        first.start(tasks, kit.at(seed))
        await kit.until(lambda: any(s.state is State.TRANSFER for s in seed.sessions), "the seed serves")
        second.start(tasks, kit.at(seed))
        await kit.until(first.joined, "the second joins the first")
        third.start(tasks, kit.at(seed))
        await kit.until(second.joined, "the third joins the second")
        first.scope.cancel()  # retracts what it relayed
        await kit.until(lambda: not first.joined(), "the first lets go of its clients")
        faults.release()
        await kit.until(lambda: second.complete() and third.complete(), "both are complete without the first")
        errors = [session.session.error for session in first.server.ended]
        told = [error for error in errors if isinstance(error, RefusedError) and error.code == "gone"]
        assert len(told) == 1, "the first was asked again, instead of the seed"
        assert second.took_from(str(kit.at(seed))) + second.took_from(first.address) == BLOCKS
        assert second.took_from(str(kit.at(seed))) > 0
        assert third.took_from(second.address) > 0


async def test_a_change_of_upstream_is_passed_down_the_chain_and_breaks_a_cycle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client whose upstream chain contains itself would wait for its own blocks: it leaves the source.

    In protocol 1 only: since protocol 2 a relay is asked for no block that it does not have.
    """
    monkeypatch.setattr(messages, "PROTOCOL", 1)
    hub = kit.Hub()
    async with (
        held_seed(hub.transport) as (seed, faults),
        replica(hub.transport) as first,
        replica(hub.transport) as second,
        replica(hub.transport) as third,
        anyio.create_task_group() as tasks,
    ):
        first.start(tasks, kit.at(seed))
        await kit.until(partial(serves, seed, 1), "the seed serves")
        second.start(tasks, kit.at(seed))
        await kit.until(first.joined, "the second joins the first")
        third.start(tasks, kit.at(seed))
        await kit.until(second.joined, "the third joins the second")
        await kit.until(lambda: all(r.server.holdings.held() for r in (first, second, third)), "each has a block")
        one, two, three = (replica.supply() for replica in (first, second, third))
        assert three.chain == (two.node, one.node)
        one.feeds("another source", ("ab" * 8,))
        await kit.until(lambda: "ab" * 8 in three.chain, "the third knows what the first lives on")
        assert second.joined(), "which is no reason to leave"
        one.feeds("another source", (three.node,))
        await kit.until(lambda: not second.joined(), "the third leaves")
        one.ended("another source")
        faults.release()
        await kit.until(lambda: all(replica.complete() for replica in (first, second, third)))
        assert third.report is not None
        assert any("gets its blocks from us" in attempt.message for attempt in third.report.attempts)


class Registry:
    """A provider that finds sources when it is told to."""

    def __init__(self, *sources: Address) -> None:
        self._sources = list(sources)
        self._changed = anyio.Event()

    def add(self, source: Address) -> None:
        self._sources.append(source)
        self._changed.set()

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        known = 0
        while True:
            self._changed = anyio.Event()
            for source in self._sources[known:]:
                yield Appeared(Source(source))
            known = len(self._sources)
            yield Listed()
            await self._changed.wait()


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_two_replicas_pull_from_each_other_what_each_lacks(carrier: Transport) -> None:
    """Each has a seed of its own that stops; each finds the other one as a relay. One seed is enough for both."""
    async with (
        held_seed(carrier) as (one, one_goes_on),
        held_seed(carrier) as (two, _),
        replica(carrier) as first,
        replica(carrier) as second,
        anyio.create_task_group() as tasks,
    ):
        of_first, of_second = Registry(kit.at(one)), Registry(kit.at(two))
        first.start(tasks, provider=of_first)
        second.start(tasks, provider=of_second)
        await kit.until(lambda: all(each.server.holdings.held() for each in (first, second)), "each has a block")
        of_first.add(kit.at(second.server))
        of_second.add(kit.at(first.server))
        await kit.until(lambda: first.joined() and second.joined(), "each pulls from the other one")
        assert first.supply().chain == second.supply().chain == (), "nobody waits for what the other one lacks"
        one_goes_on.release()
        await kit.until(lambda: first.complete() and second.complete(), "one seed is enough for both")
        assert second.took_from(first.address) > 0


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_a_relay_that_corrupts_blocks_is_detected_and_left(carrier: Transport) -> None:
    harm = Fault(FaultKind.CORRUPT, 2, side=Side.SEND, byte=5)
    async with (
        held_seed(carrier) as (seed, faults),
        replica(carrier, harm) as liar,
        replica(carrier) as second,
        anyio.create_task_group() as tasks,
    ):
        liar.start(tasks, kit.at(seed))
        await kit.until(lambda: any(s.state is State.TRANSFER for s in seed.sessions), "the seed serves")
        second.start(tasks, kit.at(seed))
        await kit.until(lambda: any(s.session.error is not None for s in liar.server.ended), "the liar is left")
        faults.release()
        await kit.until(second.complete, "the honest seed gives the rest")
        assert second.report is not None
        causes = [attempt.cause for attempt in second.report.attempts]
        assert any(isinstance(cause, DigestMismatch) and cause.block == 2 for cause in causes)
        assert second.took_from(str(kit.at(seed))) > 0


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_a_relay_whose_own_pull_fails_frees_its_memory_at_once(carrier: Transport) -> None:
    async with replica(carrier) as first, replica(carrier) as second, anyio.create_task_group() as tasks:
        async with held_seed(carrier) as (seed, _):
            at = kit.at(seed)
            first.start(tasks, at)
            await kit.until(lambda: any(s.state is State.TRANSFER for s in seed.sessions), "the seed serves")
            second.start(tasks, at)
            await kit.until(first.joined, "the second joins the first")
        # The seed has stopped. No source has the other blocks.
        await kit.until(lambda: first.error is not None, "the first gives up")
        assert first.server.sessions == ()
        await kit.until(lambda: second.error is not None, "the second gives up")
        assert "own pull failed" in str(second.error) or "lost its own source" in str(second.error)


async def test_a_server_that_serves_others_costs_the_relaying_and_not_the_pull(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it serves stays served, too."""
    hub, others = kit.Hub(), kit.held(kit.weights(1))
    into = kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING) as seed, kit.serving(hub.transport, others) as server:
        filled, sources = destination(into), FixedSources([kit.at(seed)])
        await pull_from(filled, kit.IDENTITY, sources, [hub.transport], digest_of, PullOptions(), relay=server)
        assert server.holdings.held() == (others,)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert "not relayed: raw tensors are already served for role 'target'" in caplog.text


@pytest.mark.parametrize("carrier", CARRIERS[1:], indirect=True)
async def test_the_client_of_a_relay_process_that_is_killed_reconnects_and_completes(carrier: Transport) -> None:
    async with (
        held_seed(carrier) as (seed, faults),
        replica(carrier) as client,
        peers.peer("relay", ports=[seed.port], transport=carrier.name) as relay,
        anyio.create_task_group() as tasks,
    ):
        port = (await relay.hear())["port"]
        await kit.until(partial(serves, seed, 1), "the seed serves the relay")
        client.start(tasks, kit.at(seed))
        seen = await relay.until(lambda seen: client.verified)
        assert seen["sessions"] == ["TRANSFER"]
        assert not seen["complete"]
        of_relay = {session.peer for session in seed.sessions}
        relay.send(signal.SIGKILL)
        await kit.until(
            lambda: any(s.state is State.TRANSFER and s.peer not in of_relay for s in seed.sessions),
            "the client is at the seed now",
        )
        faults.release()
        await kit.until(client.complete, "the seed gives the rest")
        assert client.report is not None
        at_relay = str(Address("127.0.0.1", port))
        by_relay = client.report.sources[at_relay]
        # Not the number verified now: the seed holds back blocks after its eighth, and the client has that one.
        assert by_relay.nbytes == client.verified_by[at_relay] > 0
        assert client.took_from(str(kit.at(seed))) == BLOCKS - by_relay.blocks


async def test_a_client_that_does_not_follow_redirects_is_served_by_the_seed() -> None:
    hub = kit.Hub()
    async with (
        held_seed(hub.transport) as (seed, faults),
        replica(hub.transport) as first,
        replica(hub.transport) as second,
        anyio.create_task_group() as tasks,
    ):
        first.start(tasks, kit.at(seed))
        await kit.until(lambda: any(s.state is State.TRANSFER for s in seed.sessions), "the seed serves")
        second.start(tasks, kit.at(seed), follow=False)
        await kit.until(lambda: len([s for s in seed.sessions if s.state is State.TRANSFER]) == 2, "both are served")
        faults.release()
        await kit.until(lambda: first.complete() and second.complete())
        assert second.took_from(str(kit.at(seed))) == BLOCKS


@pytest.mark.parametrize(("fan_out", "direct"), [(0, 3), (2, 2)])
async def test_the_fan_out_limits_how_many_clients_a_seed_serves_directly(fan_out: int, direct: int) -> None:
    hub = kit.Hub()
    async with (
        held_seed(hub.transport, fan_out=fan_out) as (seed, faults),
        replica(hub.transport) as first,
        replica(hub.transport) as second,
        replica(hub.transport) as third,
        anyio.create_task_group() as tasks,
    ):
        replicas = [first, second, third]
        for count, one in enumerate(replicas, start=1):
            one.start(tasks, kit.at(seed))
            expected = min(count, direct)
            await kit.until(partial(serves, seed, expected))
        if direct < len(replicas):
            await kit.until(lambda: first.joined() or second.joined(), "the third was sent on")
        faults.release()
        await kit.until(lambda: all(one.complete() for one in replicas))
        assert sum(one.took_from(str(kit.at(seed))) == BLOCKS for one in replicas) == direct


async def test_too_long_a_chain_is_refused_and_the_seed_serves_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = kit.Hub()
    async with (
        held_seed(hub.transport) as (seed, faults),
        replica(hub.transport) as first,
        replica(hub.transport) as second,
        anyio.create_task_group() as tasks,
    ):
        first.start(tasks, kit.at(seed))
        await kit.until(lambda: any(s.state is State.TRANSFER for s in seed.sessions), "the seed serves")
        second.start(tasks, kit.at(seed), max_hops=0)
        await kit.until(lambda: len([s for s in seed.sessions if s.state is State.TRANSFER]) == 2, "both are served")
        faults.release()
        await kit.until(lambda: first.complete() and second.complete())
        assert second.report is not None
        assert any("relays away from its seed" in attempt.message for attempt in second.report.attempts)
        assert (
            f"source {first.address}: this relay is 1 relays away from its seed, at most 0 are accepted" in caplog.text
        )


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_one_client_pulls_from_three_sources_at_once(carrier: Transport) -> None:
    async with (
        held_seed(carrier) as (one, a),
        held_seed(carrier) as (two, b),
        held_seed(carrier) as (three, c),
        replica(carrier) as client,
        anyio.create_task_group() as tasks,
    ):
        seeds = [one, two, three]
        client.start(tasks, *map(kit.at, seeds))
        await kit.until(lambda: all(any(s.state is State.TRANSFER for s in seed.sessions) for seed in seeds))
        for faults in (a, b, c):
            faults.release()
        await kit.until(client.complete)
        shares = [client.took_from(str(kit.at(seed))) for seed in seeds]
        assert sum(shares) == BLOCKS


@pytest.mark.parametrize("carrier", CARRIERS, indirect=True)
async def test_a_source_that_dies_loses_only_its_own_blocks(carrier: Transport) -> None:
    cut = Faults([Fault(FaultKind.CUT, number, side=Side.SEND) for number in range(BLOCKS)])
    async with (
        kit.serving(carrier, HOLDING) as good,
        kit.serving(FaultyTransport(carrier, cut), HOLDING) as bad,
        replica(carrier) as client,
    ):
        await client.pull(kit.at(bad), kit.at(good))
        assert client.complete()
        assert client.took_from(str(kit.at(good))) == BLOCKS - client.took_from(str(kit.at(bad)))


async def test_a_source_that_hangs_is_left_when_other_sources_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_state, "_IMPATIENCE", 0.1)
    hub = kit.Hub()
    async with (
        held_seed(hub.transport) as (stuck, _),
        kit.serving(hub.transport, HOLDING) as good,
        replica(hub.transport) as client,
    ):
        await client.pull(kit.at(stuck), kit.at(good))
        assert client.complete()
        assert client.took_from(str(kit.at(good))) > 0
        assert client.report is not None
        assert any("taken over by faster sources" in attempt.message for attempt in client.report.attempts)


async def test_a_source_with_other_weights_is_refused_by_its_root() -> None:
    hub = kit.Hub()
    other = kit.held(kit.weights(seed=1))
    async with (
        held_seed(hub.transport) as (seed, faults),
        kit.serving(hub.transport, other) as wrong,
        replica(hub.transport) as client,
        anyio.create_task_group() as tasks,
    ):
        client.start(tasks, kit.at(seed), kit.at(wrong))
        await kit.until(lambda: any(s.session.error is not None for s in wrong.ended), "the wrong one is refused")
        faults.release()
        await kit.until(client.complete)
        assert client.took_from(str(kit.at(wrong))) == 0
        assert client.report is not None
        (attempt,) = client.report.attempts
        assert isinstance(attempt.cause, RootMismatch) or "root" in attempt.message


@pytest.mark.parametrize("grace", [0.0, kit.PATIENCE])
async def test_a_relay_that_ends_sends_its_clients_to_its_own_source(grace: float) -> None:
    hub = kit.Hub()
    harm = Fault(FaultKind.HOLD, HELD_AFTER, side=Side.SEND, times=None)
    slow = Faults([harm])
    async with (
        held_seed(hub.transport) as (seed, faults),
        kit.serving(FaultyTransport(hub.transport, slow)) as server,
        replica(hub.transport) as second,
        anyio.create_task_group() as tasks,
    ):
        at, first = kit.at(seed), Replica(server, hub.transport)
        first.start(tasks, at)
        await kit.until(partial(serves, seed, 1), "the seed serves")
        second.start(tasks, at)
        await kit.until(first.joined, "the second joins the first")
        faults.release()
        await kit.until(first.complete, "the first is done, the second is held by it")
        assert not second.complete()
        if grace:
            slow.release()
            assert await server.drained(within=grace)
            await kit.until(second.complete)
        await server.retract(reason="post-processing", within=0.05, sources=(str(at),))
        assert server.sessions == ()
        for tensor in first.into.values():
            tensor.zero_()  # as post-processing may do
        await kit.until(second.complete, "the second is done")
        assert second.report is not None
        if grace:
            assert second.took_from(first.address) == BLOCKS
        else:
            assert second.took_from(str(at)) > 0
            assert second.took_from(first.address) + second.took_from(str(at)) == BLOCKS
            causes = [attempt.cause for attempt in second.report.attempts]
            assert [(c.code, c.sources) for c in causes if isinstance(c, RefusedError)] == [("gone", (str(at),))]


async def test_a_client_that_waits_at_a_relay_without_a_source_is_sent_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_session, "_ORPHAN_WAIT", 0.2)
    carrier = kit.carrier("memory")
    async with replica(carrier) as first, replica(carrier) as second, anyio.create_task_group() as tasks:
        async with held_seed(carrier) as (seed, _):
            first.start(tasks, kit.at(seed), wait=kit.PATIENCE)
            await kit.until(lambda: first.server.holdings.held() and first.verified, "it has some")
            second.start(tasks, kit.at(first.server))
            await kit.until(lambda: second.verified, "it has some of them")
        await kit.until(lambda: second.error is not None, "the relay says that it gets no more")
        assert isinstance(second.error, NoSourceLeft)
        assert "lost its own source" in str(second.error)
        first.scope.cancel()


async def test_the_source_of_a_relay_is_a_new_source_for_its_client() -> None:
    """The client got the relay's address only."""
    hub = kit.Hub()
    async with (
        held_seed(hub.transport) as (seed, faults),
        replica(hub.transport) as first,
        replica(hub.transport) as second,
        anyio.create_task_group() as tasks,
    ):
        first.start(tasks, kit.at(seed))
        await kit.until(partial(serves, seed, 1), "the seed serves")
        second.start(tasks, kit.at(first.server))
        await kit.until(first.joined, "the second joins the first")
        await first.server.retract(reason="post-processing", within=0.05, sources=(str(kit.at(seed)),))
        faults.release()
        await kit.until(second.complete, "the seed gives the rest")
        assert second.took_from(str(kit.at(seed))) > 0


async def test_a_relay_announces_its_own_identity_completed_with_facts_of_its_source() -> None:
    hub = kit.Hub()
    theirs = kit.variant(load_state={"has_own_lm_head": True}, tied=False, engine="a 1", fingerprint="f" * 64)
    mine = kit.variant(engine="b 2")
    async with kit.serving(hub.transport, kit.held(SOURCE, theirs)) as seed, replica(hub.transport) as first:
        await pull_from(
            destination(first.into),
            mine,
            FixedSources([kit.at(seed)]),
            [hub.transport],
            digest_of,
            PullOptions(timings=kit.CALM, timeout=kit.PATIENCE),
            relay=first.server,
        )
        (held,) = first.server.holdings.held()
        said = held.announcement.identity
        assert (said.engine, said.tied, said.load_state) == ("b 2", False, {"has_own_lm_head": True})
        assert said.fingerprint == "f" * 64


async def test_a_relay_on_loopback_is_named_by_an_address_that_the_client_can_reach() -> None:
    assert seen_from("127.0.0.1:7000", "10.0.0.9", "10.0.0.1") == "10.0.0.1:7000"
    assert seen_from("127.0.0.1:7000", "127.0.0.1", "127.0.0.1") == "127.0.0.1:7000"
    assert seen_from("10.0.0.3:7000", "10.0.0.9", "10.0.0.1") == "10.0.0.3:7000"
