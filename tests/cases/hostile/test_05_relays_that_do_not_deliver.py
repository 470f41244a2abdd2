"""Relays that only cost time: a pull that was redirected begins at the seed within one budget, whatever they do."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import pytest
from anyio.abc import SocketAttribute

import netloader.client.pull
import netloader.client.session
import netloader.session.driver
import netloader.session.phase_clock
from netloader.client.probe import relay_at
from netloader.core import messages as m
from netloader.core import pull_events as p
from netloader.core import redirect_budget
from netloader.core.addresses import Address
from netloader.core.options import PullOptions, Timings
from netloader.core.pull import Pull
from netloader.core.redirect_budget import RedirectBudget
from netloader.core.report import Progress
from netloader.core.sources import Source, Sources
from netloader.errors import NetloaderError, PeerLost, RefusedError
from netloader.server import session as server_session
from netloader.server.relay_check import RelayCheck
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from tests.core.pull_world import Source as Simulated
from tests.core.pull_world import World, announcement
from tests.drivers import jumping, kit
from tests.drivers.test_relays import Replica, held_seed, replica

WEIGHTS = kit.weights()
HOLDING = kit.held(WEIGHTS)
HUB = kit.Hub()
BUDGET = 5.0
FIRST = 0.75
PATIENT = Timings(hello=1e3, validate=1e3, plan=1e3, stall=1e3, finalize=1e3)
Wire = kit.Wire[m.ClientMessage]
CLOCKED = (netloader.client.pull, netloader.client.session, netloader.session.driver, netloader.session.phase_clock)


def test_the_budget_is_the_one_that_these_tests_assume() -> None:
    assert redirect_budget._SECONDS == BUDGET
    assert redirect_budget._FIRST_SECONDS == FIRST


async def _welcomed(wire: Wire) -> None:
    await wire.hear_until(m.Hello)
    await wire.say(kit.welcome(HUB.transport))
    await wire.hear_until(m.Identify)


async def waits_for_ever(wire: Wire) -> None:
    await _welcomed(wire)
    while True:
        await wire.say(m.Waiting(reason="others come first", position=3))
        await anyio.sleep(5.0)


async def drips(wire: Wire) -> None:
    await _welcomed(wire)
    for byte in b"\0\0\1\0" + b"x" * 256:
        await wire.raw(bytes([byte]))
        await anyio.sleep(5.0)


async def welcomes_and_is_silent(wire: Wire) -> None:
    await _welcomed(wire)
    await wire.closed()


async def says_nothing(wire: Wire) -> None:
    await wire.closed()


async def is_never_ready(wire: Wire) -> None:
    await _welcomed(wire)
    await wire.say(m.Refusal(code="not-ready", message="soon", retry_after=1.0))


async def refuses(wire: Wire) -> None:
    await _welcomed(wire)
    await wire.say(m.Refusal(code="not-held", message="never heard of it"))


async def announces_and_is_silent(wire: Wire) -> None:
    await _welcomed(wire)
    await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(HOLDING))
    await wire.closed()


async def announces_other_weights_and_is_silent(wire: Wire) -> None:
    await _welcomed(wire)
    await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(kit.held(kit.weights(seed=1))))
    await wire.closed()


SCRIPTS: tuple[Callable[[Wire], Awaitable[None]], ...] = (
    *(waits_for_ever, drips, welcomes_and_is_silent, says_nothing, is_never_ready, refuses, announces_and_is_silent),
    announces_other_weights_and_is_silent,
)


@asynccontextmanager
async def fakes(script: Callable[[Wire], Awaitable[None]], count: int) -> AsyncIterator[list[Address]]:
    """Fake relays. With more than one, the first names the others."""
    async with AsyncExitStack() as stack:
        others = [await stack.enter_async_context(kit.fake_server(script)) for _ in range(count - 1)]

        async def names_others(wire: Wire) -> None:
            await _welcomed(wire)
            named = tuple(str(fake.address) for fake in others)
            await wire.say(m.Refusal(code="busy", message="others pass it on", retry_after=0.1, sources=named))

        first = await stack.enter_async_context(kit.fake_server(names_others if others else script))
        yield [first.address]


@asynccontextmanager
async def held_back(hub: kit.Hub) -> AsyncIterator[list[Address]]:
    """A relay that opens the channel and sends no byte."""
    never = FaultyTransport(hub.transport, Faults([Fault(FaultKind.HOLD, 0, side=Side.SEND, times=None)]))
    async with kit.serving(never, HOLDING, timings=PATIENT) as server:
        yield [kit.at(server)]


@asynccontextmanager
async def nobody() -> AsyncIterator[list[Address]]:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    await listener.aclose()
    yield [Address("127.0.0.1", port)]


Relays = Callable[[], AbstractAsyncContextManager[list[Address]]]

KINDS: dict[str, Relays] = {
    **{script.__name__: partial(fakes, script, 1) for script in SCRIPTS},
    "names 40 silent ones": partial(fakes, says_nothing, 41),
    "opens a channel and sends no byte": partial(held_back, HUB),
    "is not there": nobody,
}


@pytest.mark.parametrize("stripe", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_that_was_redirected_begins_at_the_seed_within_the_budget(kind: str, stripe: int) -> None:
    async def story(clock: jumping.Clock) -> float:
        async with KINDS[kind]() as relays, kit.serving(HUB.transport, HOLDING, timings=PATIENT) as seed:
            for session, relay in enumerate(relays):  # as if these had answered the seed
                seed._relays.join(session, HOLDING, relay.host, relay.port)
                seed._relays.confirm(session)
            first: list[float] = []

            def progress(step: Progress) -> None:
                if step.source == str(kit.at(seed)):
                    first.append(clock.now)

            into, began = kit.blank(WEIGHTS), clock.now
            await kit.pull(
                into,
                [kit.at(seed)],
                HUB.transport,
                progress=progress,
                stripe=stripe,
                timeout=3600,
                wait=3600,
                timings=PATIENT,
            )
            assert kit.contents(into) == kit.contents(WEIGHTS)
            return first[0] - began

    assert jumping.run(story, *CLOCKED) <= BUDGET + 1.5


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_time_of_all_relays_is_counted_together_and_blocks_earn_it_back_up_to_the_budget() -> None:
    mib = 1 << 20
    budget = RedirectBudget()
    budget.run(running=True, now=10.0)
    assert budget.ends_at == 15.0
    budget.run(running=False, now=12.0)
    assert not budget.used_up(1000.0)
    budget.run(running=True, now=100.0)
    assert budget.ends_at == 103.0
    budget.earn(100 * mib, mib)  # never more than at first: a relay that was fast can't be slow for long
    budget.run(running=True, now=100.0)
    assert budget.ends_at == 105.0
    now = 100.0
    for _ in range(100):  # as fast as the least rate
        now += 1.0
        budget.run(running=True, now=now)
        assert not budget.used_up(now)
        budget.earn(mib, mib)
    now += 5.0
    budget.run(running=True, now=now)
    assert budget.used_up(now)
    assert not budget.used_up(now)  # said once
    assert budget.ends_at is None


def test_the_first_block_of_a_relay_has_a_shorter_time_which_larger_blocks_lengthen() -> None:
    mib = 1 << 20
    budget = RedirectBudget()
    budget.run(running=True, now=10.0)
    budget.asked(mib, 11.0)
    assert budget.ends_at == 11.0 + FIRST
    budget.asked(mib, 11.5)  # by another relay: they share the time
    assert budget.ends_at == 11.0 + FIRST
    assert not budget.used_up(11.0)
    assert budget.used_up(11.0 + FIRST)
    assert not budget.used_up(20.0)  # said once
    large = RedirectBudget()
    large.run(running=True, now=10.0)
    large.asked(16 * mib, 10.0)
    assert large.ends_at == 14.0
    large.begun()  # from the first block on only the budget counts
    large.earn(16 * mib, 16 * mib)
    assert large.ends_at == 30.0


@pytest.mark.parametrize("stripe", [1, 3])
@pytest.mark.parametrize("relay", [Simulated(per_block=60.0), Simulated(mute=True)])
def test_a_relay_that_opens_its_channel_and_delivers_nothing_is_left_for_the_seed_in_time_for_a_begin_within_2_s(
    relay: Simulated, stripe: int
) -> None:
    world = World(12, [Simulated(relays=(1,)), relay], [0], stripe=stripe)
    world.run()
    assert isinstance(world.outcome, p.Succeed)
    assert world.ended_at <= FIRST + 0.5


def test_relays_that_deliver_are_not_left_at_that_time() -> None:
    world = World(8, [Simulated(relays=(1,)), Simulated(per_block=0.5)], [0], stripe=1)
    world.run()
    assert isinstance(world.outcome, p.Succeed)
    assert world.connects == {0: 1, 1: 1}


@pytest.mark.parametrize("stripe", [1, 3])
@pytest.mark.parametrize("relay", [Simulated(per_block=60.0), Simulated(mute=True), Simulated(unreachable=True)])
def test_a_relay_that_drips_or_does_not_answer_is_left_for_the_seed_at_the_end_of_the_budget(
    relay: Simulated, stripe: int
) -> None:
    world = World(12, [Simulated(relays=(1,)), relay], [0], stripe=stripe)
    world.run()
    assert isinstance(world.outcome, p.Succeed)
    assert world.ended_at <= BUDGET + 1.0


def _pull(*sources: Address, **options: object) -> tuple[Pull, list[p.Command]]:
    pull = Pull([Source(one) for one in sources], PullOptions(**options), random.Random(1))  # type: ignore[arg-type]
    return pull, pull.begin(0.0)


def _connects(commands: list[p.Command]) -> Iterator[p.Connect]:
    return (command for command in commands if isinstance(command, p.Connect))


def test_of_the_relays_that_a_relay_names_few_are_tried_and_a_chain_has_an_end() -> None:
    seed = Address("seed", 1)
    sources = Sources([Source(seed)], tries=2, until=0.0, rng=random.Random(1), max_hops=2)
    relay = sources.take(0.0, work=True)
    for depth in range(3):
        assert relay is not None
        before = len(sources._known)
        assert sources.redirect(relay, [Address(f"h{depth}", port) for port in range(1, 41)], 0.0)
        assert len(sources._known) - before == (40 if relay == seed else 4)
        relay = sources.take(0.0, work=True)
        assert relay is not None
        assert relay.host == f"h{depth}"
    assert relay is not None
    assert not sources.redirect(relay, [Address("further", 1)], 0.0)


def test_when_the_budget_is_used_up_servers_are_told_not_to_redirect_any_more() -> None:
    seed, relay = Address("seed", 1), Address("relay", 1)
    pull, _ = _pull(seed, stripe=1)
    refusal = RefusedError("busy", "others pass it on", retry_after=5.0, sources=(str(relay),))
    (connect,) = _connects(pull.handle(p.SessionEnded(1, refusal), 0.0))
    assert (connect.source, connect.follow) == (relay, True)
    assert pull.wake_at(0.0) == BUDGET
    commands = pull.handle(p.TimerFired(), BUDGET)
    assert [c.session for c in commands if isinstance(c, p.LeaveSource)] == [2]
    (connect,) = _connects(commands)
    assert (connect.source, connect.follow) == (seed, False)
    assert connect.avoid == ()
    # The relay's connection comes up only now, and is ended at once.
    assert [type(c) for c in pull.handle(p.SessionStarted(2), 6.0)] == [p.LeaveSource]
    pull.handle(p.HoldingAnnounced(3, known := announcement(2)), 6.0)
    assert pull.ledger.root == known.root
    assert not list(_connects(pull.handle(p.SessionEnded(2, PeerLost("gone")), 6.1)))


# --- the server -------------------------------------------------------------------------------------------------------


async def test_a_client_is_named_as_a_relay_only_when_it_answers_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that names a port where nothing, or somebody else, listens is served, and nobody is sent there."""
    monkeypatch.setattr(server_session, "_RELAY_DECISION", kit.PATIENCE)
    monkeypatch.setattr("netloader.server.relay_check._PAUSES", (0.0,))
    async with (
        held_seed(HUB.transport) as (seed, faults),
        kit.serving(HUB.transport, HOLDING) as other,
        replica(HUB.transport) as liar,
        replica(HUB.transport) as newcomer,
        anyio.create_task_group() as tasks,
    ):
        claimed = Replica(liar.server, HUB.transport, into=liar.into)
        monkeypatch.setattr(type(liar.server), "port", property(lambda s: other._port if s is liar.server else s._port))
        claimed.start(tasks, kit.at(seed))
        await kit.until(lambda: len(seed.sessions) == 1 and seed.sessions[0].transport, "the liar is served")
        newcomer.start(tasks, kit.at(seed))
        await kit.until(lambda: sum(bool(s.transport) for s in seed.sessions) == 2, "the newcomer is served directly")
        faults.release()
        await kit.until(newcomer.complete)
        assert newcomer.took_from(str(kit.at(seed))) > 0
        assert newcomer.report is not None
        assert list(newcomer.report.sources) == [str(kit.at(seed))]


@pytest.mark.parametrize("answer", ["another name", "an error", "silence"])
async def test_the_check_of_a_relay_ends_in_time_and_believes_its_own_name_only(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netloader.server.relay_check._PAUSES", (0.0, 0.0))
    monkeypatch.setattr("netloader.server.relay_check._SECONDS", 0.05)

    async def ask(address: Address, known: object) -> str:
        del address, known
        if answer == "an error":
            raise NetloaderError("nothing is held")
        if answer == "silence":
            await anyio.sleep_forever()
        return "ab"

    check, at = RelayCheck(ask), Address("h", 1)
    assert await check.is_relay(at, "cd", HOLDING.announcement, "session 1") is False
    assert await check.is_relay(at, "", HOLDING.announcement, "session 1") is False
    assert await check.is_relay(at, "ab", HOLDING.announcement, "session 1") is (answer == "another name")


async def test_a_relay_is_asked_with_a_probe_that_carries_its_root() -> None:
    options = PullOptions(timings=kit.CALM)
    async with kit.serving(HUB.transport, HOLDING) as server:
        assert await relay_at(kit.at(server), HOLDING.announcement, options) == ""
        with pytest.raises(NetloaderError, match="root"):
            await relay_at(kit.at(server), kit.held(kit.weights(seed=1)).announcement, options)
