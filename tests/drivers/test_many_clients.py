"""Several complete clients that pull from seeds and from each other, while sources corrupt, stall, disconnect and die.

Servers, pulls, ledgers and control connections are real, blocks go over the memory transport with faults; only time is
simulated (:mod:`tests.drivers.jumping`). In any case: every client ends complete with the right bytes, or fails with a
reason; no block counts twice; there is no cycle of clients that wait for each other; and a client with a reliable seed
completes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace

import anyio
import torch
from anyio.abc import TaskGroup, TaskStatus
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from netloader.client import pull as client_module
from netloader.client import session as client_session_module
from netloader.client.pull import pull_from
from netloader.core.addresses import Address
from netloader.core.options import PullOptions, Timings
from netloader.core.protocol import State
from netloader.core.report import Progress, PullReport
from netloader.discovery.fixed import FixedSources
from netloader.errors import NoSourceLeft
from netloader.server.server import HoldingServer
from netloader.session import driver as driver_module
from netloader.session import phase_clock as clock_module
from netloader.session.holding import Holding
from netloader.session.relay_progress import Supply
from netloader.tensors import destination, digest_of
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from tests.drivers import jumping, kit

SOURCE = kit.weights(rows=6)
OTHERS = kit.weights(seed=1, rows=6)
GOOD, OTHER = kit.held(SOURCE), kit.held(OTHERS)
RIGHT = {GOOD.announcement.root: kit.contents(SOURCE), OTHER.announcement.root: kit.contents(OTHERS)}
BLOCKS = len(GOOD.announcement.plan.blocks)

FOREVER = 1e6
NEVER_SO_LONG = 2000.0
"""Seconds within which every client has to have ended."""
PATIENT = Timings(hello=FOREVER, validate=FOREVER, plan=FOREVER, stall=FOREVER, finalize=FOREVER)
"""Where no fault is one of silence, nothing ends by a deadline: a wait without an end is found."""
WATCHFUL = Timings(hello=20.0, validate=20.0, plan=20.0, stall=5.0, finalize=20.0)

SILENT = (FaultKind.STALL, FaultKind.DROP, FaultKind.TRUNCATE)
"""What only a deadline ends."""


def _stale() -> Holding:
    """A holding with right digests and wrong bytes in some blocks."""
    tensors = {name: tensor.clone() for name, tensor in SOURCE.items() if name != "tied"}
    tensors["tied"] = tensors["half"]
    holding = kit.held(tensors)
    tensors["half"].view(torch.uint8).bitwise_not_()
    return holding


@dataclass(frozen=True)
class _Forged:
    """A holding with the root of the right weights, and digests that contradict it."""

    announcement = replace(GOOD.announcement, digests=GOOD.announcement.digests[::-1])
    memory = GOOD.memory
    device = GOOD.device


KINDS: dict[str, Holding] = {"honest": GOOD, "stale": _stale(), "other": OTHER, "forged": _Forged()}


@dataclass(frozen=True)
class Place:
    """A process: the faults of its sends, how slow it is, when it ends (0: never) and how it serves."""

    faults: tuple[Fault, ...] = ()
    pace: int = 0
    ends: int = 0
    fan_out: int = 1
    max_clients: int = 8


@dataclass(frozen=True)
class SeedPlace(Place):
    """A seed that has the weights `ready` seconds after the start."""

    kind: str = "honest"
    ready: int = 0

    @property
    def reliable(self) -> bool:
        return self.kind == "honest" and not (self.faults or self.ends or self.ready)


@dataclass(frozen=True)
class ClientPlace(Place):
    """A client that starts after `comes` seconds and pulls from `sources`: numbers of seeds, then of clients."""

    comes: int = 0
    sources: tuple[int, ...] = ()
    stripe: int = 1
    follow: bool = True
    relays: bool = True
    max_hops: int = 32
    wait: int = 0
    losses: tuple[Fault, ...] = ()


def _faults(side: Side) -> st.SearchStrategy[tuple[Fault, ...]]:
    kinds = [FaultKind.CUT, FaultKind.CORRUPT, FaultKind.DELAY]
    if side is Side.SEND:
        kinds += [FaultKind.STALL, FaultKind.DROP, FaultKind.TRUNCATE]
    blocks = st.integers(0, BLOCKS - 1)
    one = st.builds(
        Fault,
        kind=st.sampled_from(kinds),
        block=blocks,
        side=st.just(side),
        byte=st.integers(0, 3),
        seconds=st.sampled_from([0.1, 3.0, 7.0]),
        times=st.sampled_from([1, 2, None]),
    )
    return st.lists(one, max_size=3).map(tuple)


_sometimes = st.sampled_from([0, 0, 1, 2, 5, 12])
_places = {
    "faults": st.just(()) | _faults(Side.SEND),
    "pace": st.integers(0, 2),
    "ends": _sometimes,
    "fan_out": st.sampled_from([1, 1, 2, 0]),
    "max_clients": st.sampled_from([8, 1]),
}
_seeds = st.builds(
    SeedPlace, kind=st.sampled_from(["honest", "honest", "honest", *KINDS]), ready=_sometimes, **_places
) | st.builds(SeedPlace, pace=st.integers(0, 2), fan_out=st.sampled_from([1, 2, 0]))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[tuple[SeedPlace, ...], tuple[ClientPlace, ...]]:
    seeds = tuple(draw(st.lists(_seeds, min_size=1, max_size=2)))
    count = draw(st.integers(1, 4))
    everybody = len(seeds) + count
    client = st.builds(
        ClientPlace,
        comes=st.integers(0, 4),
        sources=st.lists(st.integers(0, everybody - 1), min_size=1, max_size=4, unique=True).map(tuple) | st.just((0,)),
        stripe=st.sampled_from([1, 1, 3]),
        follow=st.sampled_from([True, True, False]),
        relays=st.sampled_from([True, True, False]),
        max_hops=st.sampled_from([32, 32, 1, 0]),
        wait=st.sampled_from([0, 20]),
        losses=st.just(()) | _faults(Side.RECV),
        **_places,
    )
    return seeds, tuple(draw(st.lists(client, min_size=count, max_size=count)))


@dataclass(eq=False)
class Client:
    """One client, and what the test observes of it."""

    place: ClientPlace
    server: HoldingServer
    into: kit.Tensors = field(default_factory=lambda: kit.blank(SOURCE))
    report: PullReport | None = None
    error: NoSourceLeft | None = None
    verified: int = 0
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    @property
    def supply(self) -> Supply | None:
        held = self.server.holdings.held()
        return self.server.holdings.supply_of(held[0]) if held else None

    def step(self, progress: Progress) -> None:
        assert self.verified <= progress.verified <= progress.total == GOOD.announcement.plan.nbytes
        self.verified = progress.verified

    def check(self) -> None:
        """Check that it is complete, or failed with a reason."""
        if self.report is not None:
            assert kit.contents(self.into) == RIGHT[self.report.root]
            assert self.report.blocks == BLOCKS == sum(share.blocks for share in self.report.sources.values())
            assert self.report.nbytes == sum(share.nbytes for share in self.report.sources.values())
            event("a client is complete")
        elif self.error is not None:
            assert self.error.attempts
            assert all(attempt.message for attempt in self.error.attempts)
            assert self.error.verified == self.verified
            event("a client failed")
        else:
            assert self.place.ends, "it was not killed, it did not fail, it is not complete"
            event("a client was killed")


class World:
    """All seeds and clients, from the first start to the last end."""

    def __init__(self, seeds: Sequence[SeedPlace], clients: Sequence[ClientPlace], clock: jumping.Clock) -> None:
        self._seeds = seeds
        self._clients = clients
        self._clock = clock
        self._hub = kit.Hub()
        faults = [fault for place in (*seeds, *clients) for fault in place.faults]
        faults += [fault for place in clients for fault in place.losses]
        self._timings = WATCHFUL if any(fault.kind in SILENT for fault in faults) else PATIENT
        self.clients: list[Client] = []
        self.circles: list[str] = []
        clock.watching = self._look_for_cycles

    async def run(self) -> None:
        """Run all of it; return when every client has ended."""
        with anyio.fail_after(NEVER_SO_LONG):
            async with AsyncExitStack() as stack:
                tasks = await stack.enter_async_context(anyio.create_task_group())
                addresses = [kit.at(await tasks.start(self._seed, place)) for place in self._seeds]
                for place in self._clients:
                    server = await stack.enter_async_context(self._serving(place))
                    addresses.append(kit.at(server))
                    self.clients.append(Client(place, server))
                async with anyio.create_task_group() as pulls:
                    for client in self.clients:
                        pulls.start_soon(self._pull, client, addresses, tasks)
                tasks.cancel_scope.cancel()

    def _serving(self, place: Place) -> AbstractAsyncContextManager[kit.WatchedServer]:
        pace = [Fault(FaultKind.DELAY, number, seconds=place.pace / 10, times=None) for number in range(BLOCKS)]
        transport = FaultyTransport(self._hub.transport, Faults((*place.faults, *(pace if place.pace else ()))))
        return kit.serving(
            transport, timings=self._timings, fan_out=place.fan_out, max_clients=place.max_clients, stop_within=1.0
        )

    async def _seed(self, place: SeedPlace, *, task_status: TaskStatus[HoldingServer]) -> None:
        async with self._serving(place) as server:
            server.expect(reason="still loading")
            if not place.ready:
                server.add(KINDS[place.kind])
            task_status.started(server)
            with anyio.move_on_after(place.ends or None):
                if place.ready:
                    await anyio.sleep(place.ready)
                    server.add(KINDS[place.kind])
                await anyio.sleep_forever()

    async def _pull(self, client: Client, addresses: Sequence[Address], tasks: TaskGroup) -> None:
        place = client.place
        await anyio.sleep(place.comes)

        async def kill() -> None:
            await anyio.sleep(place.ends)
            client.scope.cancel()

        if place.ends:
            tasks.start_soon(kill)
        options = PullOptions(
            timeout=FOREVER,
            wait=place.wait,
            stripe=place.stripe,
            follow=place.follow,
            max_hops=place.max_hops,
            timings=self._timings,
        )
        with client.scope:
            try:
                client.report = await pull_from(
                    destination(client.into),
                    kit.IDENTITY,
                    FixedSources(addresses[number] for number in place.sources),
                    [FaultyTransport(self._hub.transport, Faults(place.losses))],
                    digest_of,
                    options,
                    client.step,
                    client.server if place.relays else None,
                )
            except NoSourceLeft as error:
                client.error = error

    def _look_for_cycles(self) -> bool:
        """Called while no message is in flight: whether clients wait for each other. It counts the second time."""
        supplies = {supply.node: supply for client in self.clients if (supply := client.supply) is not None}
        for supply in supplies.values():
            supply._ledger.check_invariants()
        feeds: dict[str, set[str]] = {node: set() for node in supplies}
        for client in self.clients:
            supply = client.supply
            for session in client.server._sessions if supply is not None and not supply.complete else ():
                identify = session.session.identify
                if supply is not None and identify is not None and session.session.state is State.TRANSFER:
                    child = supplies.get(identify.node)
                    if child is not None and not child.complete:
                        feeds[child.node].add(supply.node)
        for start, first in feeds.items():
            seen: set[str] = set()
            todo = list(first)
            while todo:
                node = todo.pop()
                if node == start:
                    self.circles.append(f"{start} waits for itself: {feeds}")
                    return True
                if node not in seen:
                    seen.add(node)
                    todo += feeds.get(node, ())
        self.circles.clear()
        return False

    def check(self) -> None:
        """Check what has to hold for every client in the end."""
        assert not self.circles, self.circles[0]
        for client in self.clients:
            client.check()
            sources = [self._seeds[number] for number in client.place.sources if number < len(self._seeds)]
            harmless = not client.place.ends and not client.place.losses
            if harmless and any(s.reliable for s in sources) and all(s.kind != "other" for s in self._seeds):
                assert client.report is not None, f"it has a seed that does what it should: {client.error}"
                event("a client has a reliable seed")


TOWARDS_A_CIRCLE = (
    (SeedPlace(pace=10), SeedPlace(pace=10, ready=1)),
    (ClientPlace(sources=(0, 1), stripe=3, wait=20), ClientPlace(sources=(0, 1), stripe=3, wait=20, comes=2)),
)
"""The second client pulls from the first one when the second seed sends the first one to it."""

A_CHAIN = (
    (SeedPlace(pace=3),),
    (ClientPlace(sources=(0,)), ClientPlace(sources=(0,), comes=1), ClientPlace(sources=(0,), comes=2, ends=3)),
)
"""Each is sent on to the one before it, which has but a part; the last one is killed."""

TAKES_OVER = (
    (SeedPlace(pace=1, faults=(Fault(FaultKind.CUT, 5, times=None),)), SeedPlace()),
    (ClientPlace(sources=(0, 1), stripe=3), ClientPlace(sources=(0,), comes=1), ClientPlace(sources=(2,), comes=1)),
)
"""A session that has nothing to do is given what another one lost."""

LIES = (
    (SeedPlace(kind="stale"), SeedPlace(kind="forged"), SeedPlace(pace=1)),
    (
        ClientPlace(sources=(0, 1, 2), faults=(Fault(FaultKind.CORRUPT, 2, byte=1, times=None),)),
        ClientPlace(sources=(1, 2, 0), stripe=3, losses=(Fault(FaultKind.CORRUPT, 3, byte=1, side=Side.RECV),)),
    ),
)
"""Wrong digests, wrong bytes, and bytes that change on their way."""


@settings(
    max_examples=min(settings().max_examples // 2, 1000),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(worlds())
@example(A_CHAIN)
@example(TOWARDS_A_CIRCLE)
@example(TAKES_OVER)
@example(LIES)
def test_every_client_ends_complete_or_fails_with_a_reason(
    places: tuple[tuple[SeedPlace, ...], tuple[ClientPlace, ...]],
) -> None:
    async def live(clock: jumping.Clock) -> World:
        world = World(*places, clock)
        await world.run()
        return world

    modules = (client_module, client_session_module, driver_module, clock_module)
    jumping.run(live, *modules).check()
