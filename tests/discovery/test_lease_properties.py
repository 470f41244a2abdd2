"""Properties of sources, publishing and claims over a registry that fails in any order. The time is simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.abc
import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core.entries import Entry, Load
from netloader.discovery import Claim, Publication, Wanted
from netloader.discovery.leases import LeaseBackend
from netloader.discovery.memory import MemoryRegistry
from netloader.errors import DiscoveryError
from tests.discovery.world import Faulty, Watcher
from tests.drivers.jumping import run

TTL = 15.0
LEASES = 2 * TTL
SETTLED = 2.0
"""Seconds that a change takes to be told, if nothing fails."""

SERVERS = 3
OUTAGES = ("refused", "stuck")
METHODS = ("put", "create", "renew", "remove", "read", "changes")

seconds = st.floats(0.1, 40.0)
server = st.integers(0, SERVERS - 1)

life = st.one_of(
    st.tuples(st.just("start"), server),
    st.tuples(st.just("kill"), server),
    st.tuples(st.just("withdraw"), server),
    st.tuples(st.just("update"), server),
)
failing_together = st.one_of(
    st.tuples(st.just("down"), st.sampled_from(OUTAGES)),
    st.tuples(st.just("up"), st.just(0)),
    st.tuples(st.just("flush"), st.just(0)),
)
failing_calls = st.tuples(
    st.just("fail"),
    st.tuples(server, st.sampled_from(METHODS), st.sampled_from(("refused", "lost", "stuck")), st.integers(1, 5)),
)
waiting = st.tuples(st.just("wait"), seconds)
Step = tuple[str, object]


@dataclass
class Server:
    """One address, at which servers start and die one after the other."""

    number: int
    world: Faulty
    tasks: anyio.abc.TaskGroup
    generation: int = 0
    scope: anyio.CancelScope | None = None
    published: Publication | None = None
    killed: set[str] = field(default_factory=set)
    ended: dict[str, float] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        return Entry("key", f"10.0.0.{self.number}:1", f"{self.number}-{self.generation}")

    def start(self) -> None:
        if self.scope is None:
            self.generation += 1
            self.scope = anyio.CancelScope()
            self.tasks.start_soon(self._run, self.entry, self.scope)

    def end(self, *, killed: bool) -> None:
        if self.scope is not None:
            self.ended[self.entry.generation] = anyio.current_time()
            if killed:
                self.killed.add(self.entry.generation)
            self.scope.cancel()
            self.scope = self.published = None

    async def _run(self, entry: Entry, scope: anyio.CancelScope) -> None:
        ours = Faulty(self.world.registry)  # of this generation: once it is killed, none of its calls arrives
        ours.fault = lambda method: "refused" if entry.generation in self.killed else self.world.fault(method)
        with scope:
            async with LeaseBackend(ours, ttl=TTL).publisher().publish(entry) as published:
                self.published = published
                await anyio.sleep_forever()

    def update(self, clients: int) -> None:
        if self.published is not None:
            self.published.update(msgspec.structs.replace(self.entry, load=Load(clients=clients)))


def play(steps: Sequence[Step], *, alike: bool) -> None:
    """Play steps, and compare what two clients were told with what is alive.

    Args:
        steps: What happens.
        alike: Nothing fails but the whole registry, and for all at once. Then no client forgets a server that lives.
    """

    async def main(_: object) -> None:
        registry = MemoryRegistry()
        outage = ""
        came_up = 0.0
        worlds = [Faulty(registry) for _ in range(SERVERS + 1)]
        async with anyio.create_task_group() as tasks:
            servers = [Server(number, worlds[number], tasks) for number in range(SERVERS)]
            watchers = [Watcher(LeaseBackend(worlds[at], ttl=TTL).sources(Wanted("key"))) for at in (0, SERVERS)]
            for watcher in watchers:
                tasks.start_soon(watcher.run)

            def living() -> set[str]:
                return {server.entry.generation for server in servers if server.scope is not None}

            def check_dead() -> None:
                for watcher in watchers:
                    for source in watcher.sources.values():
                        dead = servers[int(source.generation[0])].ended.get(source.generation)
                        assert dead is None or outage or anyio.current_time() - max(dead, came_up) < LEASES, (
                            watcher.words
                        )

            for number, (what, detail) in enumerate(steps):
                match what, detail:
                    case "start", int(one):
                        servers[one].start()
                    case (("kill" | "withdraw"), int(one)):
                        servers[one].end(killed=what == "kill")
                    case "update", int(one):
                        servers[one].update(number)
                    case "down", str(fault):
                        outage = fault
                        for world in worlds:
                            world.stop()
                            world.fault = lambda _, fault=fault: fault  # type: ignore[misc]
                    case "up", _:
                        outage, came_up = "", anyio.current_time()
                        for world in worlds:
                            world.start()
                    case "flush", _:
                        registry.flush()
                    case "fail", (int(one), str(method), str(fault), int(times)):
                        if not outage:
                            worlds[one].fault = _times(method, fault, times)
                            came_up = anyio.current_time() + 3 * TTL  # until then it may fail
                    case "wait", float(pause):
                        await anyio.sleep(pause)
                check_dead()
            for world in worlds:
                world.start()
            await anyio.sleep(LEASES + SETTLED)
            for watcher in watchers:
                assert {source.generation for source in watcher.sources.values()} == living(), watcher.words
                if alike:
                    check_nobody_was_forgotten(watcher, servers)
            tasks.cancel_scope.cancel()

    run(main, alone=True)


def _times(method: str, fault: str, times: int) -> Callable[[str], str]:
    left = [times]

    def one(called: str) -> str:
        if called != method or left[0] <= 0:
            return ""
        left[0] -= 1
        return fault if method != "changes" else "refused"

    return one


def check_nobody_was_forgotten(watcher: Watcher, servers: Sequence[Server]) -> None:
    there: dict[str, str] = {}
    for when, word in watcher.history:
        if word.startswith("+"):
            address, _, generation = word[1:].partition("/")
            there[address] = generation
        elif word.startswith("-") and (generation := there.pop(word[1:], "")):
            ended = servers[int(generation[0])].ended.get(generation)
            assert ended is not None, f"{generation} lives and was forgotten: {watcher.words}"
            assert ended <= when, f"{generation} was forgotten before it ended: {watcher.words}"


@given(st.lists(st.one_of(life, failing_together, waiting), max_size=25))
@example([("start", 0), ("wait", 10.0), ("down", "refused"), ("kill", 0), ("wait", 40.0), ("up", 0), ("wait", 31.0)])
@example([("start", 0), ("wait", 1.0), ("flush", 0), ("wait", 1.0), ("down", "stuck"), ("wait", 40.0), ("up", 0)])
def test_the_dead_go_within_two_leases_and_the_living_stay(steps: list[Step]) -> None:
    play(steps, alike=True)


@given(st.lists(st.one_of(life, failing_together, failing_calls, waiting), max_size=25))
def test_whatever_fails_the_living_are_found_again_and_the_dead_are_not(steps: list[Step]) -> None:
    play(steps, alike=False)


# --- claims -----------------------------------------------------------------------------------------------------------

INSTANCES = 3

claim_steps = st.one_of(
    st.tuples(st.just("want"), st.integers(0, INSTANCES - 1)),
    st.tuples(st.just("leave"), st.integers(0, INSTANCES - 1)),
    st.tuples(st.just("kill"), st.integers(0, INSTANCES - 1)),
    st.tuples(
        st.just("fail"),
        st.tuples(
            st.integers(0, INSTANCES - 1),
            st.sampled_from((*METHODS, "")),
            st.sampled_from(("refused", "lost", "stuck")),
            st.integers(1, 30),
        ),
    ),
    st.tuples(st.just("heal"), st.just(0)),
    waiting,
)


@given(st.lists(claim_steps, max_size=25))
@example([("want", 0), ("want", 1), ("wait", 5.0), ("fail", (0, "renew", "lost", 30)), ("wait", 40.0)])
@example([("want", 0), ("want", 1), ("wait", 5.0), ("fail", (0, "", "refused", 30)), ("wait", 40.0)])
@example([("fail", (0, "create", "lost", 1)), ("want", 0), ("want", 1), ("wait", 40.0)])
@example([("want", 0), ("wait", 6.0), ("fail", (0, "", "refused", 1)), ("wait", 15.0), ("want", 1), ("wait", 1.0)])
def test_a_claim_is_held_by_at_most_one_and_goes_on_to_the_next(steps: list[Step]) -> None:
    """Calls are lost or late, instances are cut off or die. None is suspended, and the registry loses nothing."""

    async def main(_: object) -> None:
        registry = MemoryRegistry()
        worlds = [Faulty(registry) for _ in range(INSTANCES)]
        scopes: dict[int, anyio.CancelScope] = {}
        holding: dict[int, Claim] = {}

        async def instance(number: int, scope: anyio.CancelScope, world: Faulty) -> None:
            try:
                with scope:
                    async with LeaseBackend(world, ttl=TTL).claims().claim("w", within=10_000.0) as claim:
                        assert claim is not None
                        if claim.held and scopes.get(number) is scope:
                            assert [other for other, held in holding.items() if held.held] == [], f"{number} got it too"
                            holding[number] = claim
                        await anyio.sleep_forever()
            except DiscoveryError:
                pass  # it goes on without a group
            finally:
                if scopes.get(number) is scope:
                    del scopes[number]
                    holding.pop(number, None)

        async with anyio.create_task_group() as tasks:
            for what, detail in steps:
                match what, detail:
                    case "want", int(one) if one not in scopes:
                        scopes[one] = anyio.CancelScope()
                        tasks.start_soon(instance, one, scopes[one], worlds[one])
                    case (("leave" | "kill"), int(one)) if one in scopes:
                        if what == "kill":
                            worlds[one].stop()
                            worlds[one] = Faulty(registry)
                        scopes.pop(one).cancel()
                        holding.pop(one, None)
                    case "fail", (int(one), str(method), str(fault), int(times)):
                        if method:
                            worlds[one].fault = _times(method, fault, times)
                        else:
                            worlds[one].stop()
                    case "heal", _:
                        for world in worlds:
                            world.start()
                    case "wait", float(pause):
                        await anyio.sleep(pause)
            for world in worlds:
                world.start()
            await anyio.sleep(LEASES + TTL)
            if scopes and not any(claim.held for claim in holding.values()):
                lost = [number for number, claim in holding.items() if not claim.held]
                assert sorted(scopes) == sorted(lost), "somebody waits, and nobody holds it"
            tasks.cancel_scope.cancel()

    run(main, alone=True)
