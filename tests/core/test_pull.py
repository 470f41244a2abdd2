"""The decisions of a pull, in any fleet: sources that are slow, down, malicious, loading, busy, or redirect elsewhere.

Safety: no block counts twice, a pull ends complete and verified or failed with a reason, and it waits for nothing once
every block is verified. Liveness: while honest, reachable sources hold every block and time is left, the pull
completes, and the bytes that it fetches twice are bounded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from netloader.core import pull as pull_module
from netloader.core import pull_events as p
from netloader.core import sources as sources_module
from netloader.core.addresses import Address
from netloader.core.ledger import Ledger
from netloader.core.options import PullOptions
from netloader.core.pull import Pull
from netloader.core.pull_requests import Requests
from netloader.core.sources import Sources
from netloader.errors import DigestMismatch, DiscoveryError, NetloaderError, NoSourceLeft, PeerLost, RefusedError
from tests.core.pull_world import Source, World, announcement

SECONDS = st.sampled_from([0.0, 0.5, 3.0, 20.0])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A fleet with any kinds of sources. Sources may name others of the fleet as relays."""
    blocks = draw(st.integers(0, 12))
    count = draw(st.integers(1, 5))
    sources = []
    for number in range(count):
        source = draw(
            st.builds(
                Source,
                per_block=st.sampled_from([0.01, 0.01, 1.0, 60.0]),
                queue=SECONDS,
                ready_at=SECONDS,
                absent=st.booleans(),
                dies_after=st.none() | st.none() | st.integers(0, 5),
                dead_from=st.just(float("inf")) | st.sampled_from([0.0, 0.05, 2.0]),
                lacks=st.just(frozenset()) | st.frozensets(st.integers(0, max(0, blocks - 1)), max_size=3),
                salt=st.sampled_from([b"", b"", b"", b"other"]),
                lies_at=st.none() | st.none() | st.integers(0, 5),
                silent=st.sampled_from([False, False, False, True]),
                mute=st.sampled_from([False, False, False, True]),
                unreachable=st.sampled_from([False, False, False, False, True]),
                relays=st.just(()) | st.lists(st.integers(0, count - 1), max_size=2, unique=True).map(tuple),
                only=st.sampled_from(["", "", "plain"]),
            )
        )
        if number in source.relays or blocks == 0:
            source = Source(per_block=source.per_block, queue=source.queue)
        sources.append(source)
    given_sources = draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    found = draw(st.booleans())
    times = st.lists(SECONDS, min_size=len(given_sources), max_size=len(given_sources))
    return World(
        blocks,
        sources,
        given_sources,
        stripe=draw(st.integers(1, 4)),
        wait=draw(st.sampled_from([0.0, 30.0])),
        timeout=draw(st.sampled_from([5.0, 100_000.0, 100_000.0])),
        adopts=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        appears=draw(times) if found else (),
        vanishes=draw(st.just(()) | times.map(lambda at: [3.0 + seconds for seconds in at])) if found else (),
    )


def ready_in_time(world: World, source: Source) -> bool:
    """Whether the pull waits long enough for this source. The last attempt is made when the wait ends."""
    return source.ready_at == 0.0 or source.ready_at < world.wait - 5.0


def is_found_in_time(world: World, place: int) -> bool:
    """Whether it is there before a pull that has no source left gives up, and stays."""
    appears = world.appears[place] if world.appears else 0.0
    return not world.vanishes and (appears == 0.0 or appears < world.wait)


def live(world: World) -> None:
    world.run()
    honest = [world.sources[n] for place, n in enumerate(world.given) if is_found_in_time(world, place)]
    honest = [source for source in honest if source.reliable and ready_in_time(world, source)]
    held = set().union(*(set(range(world.blocks)) - source.lacks for source in honest)) if honest else set()
    if honest and held == set(range(world.blocks)) and world.timeout > 10_000.0:
        assert isinstance(world.outcome, p.Succeed), f"honest sources held every block: {world.outcome}"
    # Blocks are requested again only after a session failed, was ended as slow, or denied them.
    sessions = sum(world.connects.values())
    assert sum(world.asked.values()) <= world.blocks * (1 + sessions)
    if isinstance(world.outcome, p.Succeed):
        assert world.ended_at == world.last_block_at or not world.blocks


FIRST_IS_BUSY = World(6, [Source(queue=20.0), Source()], [0, 1])
LOADING = World(6, [Source(ready_at=20.0)], [0], wait=30.0)
SLOW_AND_FAST = World(8, [Source(per_block=60.0), Source()], [0, 1])
A_RELAY_DIES = World(6, [Source(relays=(1,)), Source(dies_after=2)], [0])
EACH_HAS_A_PART = World(6, [Source(lacks=frozenset({0, 1})), Source(lacks=frozenset({5}))], [0, 1])
TWO_NAME_EACH_OTHER = World(4, [Source(relays=(1,)), Source(relays=(0,)), Source()], [0, 1, 2])
ANOTHER_TRANSPORT = World(4, [Source(only="plain")], [0])
APPEARS_LATE = World(4, [Source(), Source(salt=b"other")], [1, 0], wait=30.0, appears=[0.0, 20.0])
BREAKS_OFF_ONCE = World(4, [Source(dies_after=3)], [0])
FAST_IS_A_LIAR = World(9, [Source(per_block=60.0), Source(lies_at=0, ready_at=3.0)], [0, 1], wait=30.0, timeout=1e5)
ONE_LACKS_A_BLOCK = World(4, [Source(lacks=frozenset({0}))], [0])
COMPLETE = (
    *(FIRST_IS_BUSY, LOADING, SLOW_AND_FAST, A_RELAY_DIES, EACH_HAS_A_PART, TWO_NAME_EACH_OTHER),
    *(ANOTHER_TRANSPORT, BREAKS_OFF_ONCE, FAST_IS_A_LIAR, APPEARS_LATE),
)


@settings(max_examples=max(300, settings().max_examples), suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_a_pull_is_safe_and_live(world: World) -> None:
    live(fresh(world))


@pytest.mark.parametrize("number", range(len(COMPLETE)))
def test_a_pull_that_can_complete_does(number: int) -> None:
    live(world := fresh(COMPLETE[number]))
    assert isinstance(world.outcome, p.Succeed)


def fresh(world: World) -> World:
    """A copy of the world before its run, because an example is run more than once."""
    return World(
        world.blocks,
        world.sources,
        world.given,
        stripe=world.stripe,
        wait=world.wait,
        timeout=world.timeout,
        adopts=world.adopts,
        seed=world.seed,
        appears=world.appears,
        vanishes=world.vanishes,
    )


# --- seeded bugs ----------------------------------------------------------------------------------------------------


def _waits_for_sessions(self: Pull) -> Iterator[p.Command]:
    if not self._sessions:
        yield from _complete(self)


def _always_parks(self: Requests, session: Any, now: float) -> Iterator[p.Command]:
    asked = list(self.request(session)) if session.open and not session.finished else []
    yield from asked
    session.parked = not asked


def _keeps_lost_blocks_in_flight(self: Ledger, session: int) -> tuple[()]:
    self._in_flight_bytes.pop(session, None)
    return ()


def _never_waits_for_first(self: Pull) -> bool:
    return False


def _drops_redirecting_source(self: Sources, source: Address, relays: Any, now: float) -> bool:
    led = _redirect(self, source, relays, now)
    if led:
        self.drop(source)
    return led


def _drops_at_once(self: Sources, source: Address, now: float, *, last: bool = False) -> None:
    self.drop(source)


def _retries_without_pause(self: Sources, source: Address, *_: object, **__: object) -> None:
    self._known[source].running = False


_complete, _redirect, _gone = Pull._complete, Sources.redirect, Sources.gone

BUGS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "a complete pull waits for its sessions": (Pull, "_complete", _waits_for_sessions),
    "sessions park although nothing can come back": (Requests, "give_work", _always_parks),
    "parked sessions get no work": (Pull, "_feed_parked", lambda self, now: ()),
    "blocks of a lost session stay in flight": (Ledger, "lose", _keeps_lost_blocks_in_flight),
    "a source that redirected is dropped": (Sources, "redirect", _drops_redirecting_source),
    "a source that broke off is dropped": (Sources, "again", _drops_at_once),
    "sources are retried without a pause": (Sources, "later", _retries_without_pause),
    "no transport but the first is tried": (Pull, "_other_transport_may_work", staticmethod(lambda event: False)),
    "denied blocks are requested from the same source again": (
        Ledger,
        "_queue_of",
        lambda self, session: (self._queue, frozenset()),
    ),
    "a second source is never connected": (Pull, "_full", lambda self: bool(self._session_count)),
    "a transient refusal is final": (
        pull_module,
        "next_step",
        lambda error, *, progressed: "again" if progressed else "drop",
    ),
    "more sources at once than allowed": (Pull, "_full", lambda self: False),
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_a_bug_in_a_decision_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = BUGS[bug]
    monkeypatch.setattr(owner, name, broken)

    @settings(
        max_examples=500,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(worlds())
    def lived(world: World) -> None:
        live(fresh(world))

    def tried() -> None:
        for known in COMPLETE:
            live(world := fresh(known))
            assert isinstance(world.outcome, p.Succeed)
        live(fresh(ONE_LACKS_A_BLOCK))
        lived()

    with pytest.raises((AssertionError, NetloaderError)):
        tried()


# --- single decisions -------------------------------------------------------------------------------------------------

ONE, TWO, THREE = (Address("h", port) for port in (1, 2, 3))


def begun(
    *sources: Address, adopts: bool = False, listing: float | None = None, **options: Any
) -> tuple[Pull, list[p.Command]]:
    known = [sources_module.Source(one) for one in sources]
    pull = Pull(known, PullOptions(**options), random.Random(1), adopts=adopts, listing=listing)
    return pull, pull.begin(0.0)


def test_no_second_source_is_tried_until_the_first_is_accepted_or_queues_the_client() -> None:
    pull, commands = begun(ONE, TWO)
    assert [c.source for c in commands if isinstance(c, p.Connect)] == [ONE]
    (second,) = pull.handle(p.SessionQueued(1), 1.0)
    assert isinstance(second, p.Connect)
    assert second.source == TWO


def test_the_next_source_is_told_the_pinned_root_and_the_failed_relays() -> None:
    pull, _ = begun(ONE, TWO, stripe=2)
    known = announcement(3)
    commands = pull.handle(p.HoldingAnnounced(1, known), 0.1)
    accepted, connect = commands
    assert isinstance(accepted, p.Accept)
    assert isinstance(connect, p.Connect)
    assert (connect.root, connect.pinned_by) == (known.root, str(ONE))


def test_memory_is_allocated_for_one_source_and_the_next_has_to_hold_the_same_tensors() -> None:
    pull, _ = begun(ONE, TWO, adopts=True)
    pull.handle(p.SessionQueued(1), 0.0)
    (allocate,) = pull.handle(p.HoldingAnnounced(1, announcement(3)), 0.1)
    assert isinstance(allocate, p.Allocate)
    assert pull.handle(p.HoldingAnnounced(2, announcement(4)), 0.2) == []
    accepted, refused = pull.handle(p.MemoryAllocated(1), 0.4)
    assert accepted == p.Accept(1)
    assert isinstance(refused, p.Reject)
    assert refused.session == 2
    assert "other tensors" in str(refused.error)


def test_memory_whose_source_has_gone_meanwhile_is_freed_and_allocated_for_the_next_one() -> None:
    pull, _ = begun(ONE, TWO, adopts=True)
    pull.handle(p.SessionQueued(1), 0.0)
    pull.handle(p.HoldingAnnounced(1, announcement(3)), 0.1)
    pull.handle(p.HoldingAnnounced(2, other := announcement(4)), 0.2)
    pull.handle(p.SessionEnded(1, PeerLost("gone")), 0.3)
    assert pull.handle(p.MemoryAllocated(1), 0.4) == [p.FreeMemory(), p.Allocate(2, other.manifest)]


def test_a_slow_source_that_sent_wrong_bytes_is_dropped_and_not_kept_as_a_last_resort() -> None:
    pull, _ = begun(ONE, TWO, stripe=2)
    for number in (1, 2):
        pull.handle(p.HoldingAnnounced(number, announcement(3)), 0.0)
        pull.handle(p.SessionReady(number), 0.0)
        pull.handle(p.SessionIdle(number), 0.0)
    late = pull.wake_at(0.0)
    assert late is not None
    assert [c.session for c in pull.handle(p.TimerFired(), late) if isinstance(c, p.LeaveSource)] == [1]
    pull.handle(p.SessionEnded(1, DigestMismatch(0, ("w",), "aa", "bb")), late)
    commands = pull.handle(p.SessionEnded(2, RefusedError("identity", "another model")), late)
    assert [type(c) for c in commands if isinstance(c, p.Connect | p.Fail)] == [p.Fail]


def test_a_source_that_served_others_first_after_it_delivered_blocks_is_waited_for_anew() -> None:
    """A slow client is sent away when all channels are taken. Its WAIT has usually passed by then."""
    known = announcement(3)
    pull, _ = begun(ONE, wait=0.0)
    pull.handle(p.HoldingAnnounced(1, known), 0.0)
    pull.handle(p.SessionReady(1), 0.0)
    pull.handle(p.SessionIdle(1), 0.0)
    pull.handle(p.BlocksArrived(1, [(0, known.digests[:16])]), 100.0)
    busy = RefusedError("busy", "others wait", retry_after=1.0)
    assert not failed(pull.handle(p.SessionEnded(1, busy), 100.0))
    due = pull.wake_at(100.0)
    assert due is not None
    (again,) = pull.handle(p.TimerFired(), due)
    assert isinstance(again, p.Connect)
    assert "others wait" in failed(pull.handle(p.SessionEnded(2, busy), due + 100.0)), (
        "it is not waited for without end"
    )


def test_failures_are_counted_by_source_and_kind() -> None:
    pull, _ = begun(ONE, wait=100.0)
    now = 0.0
    for number in range(1, 6):
        pull.handle(p.SessionEnded(number, RefusedError("not-ready", f"{number} of 9 parts are loaded")), now)
        now = pull.wake_at(now) or now
        pull.handle(p.TimerFired(), now)
    (attempt,) = pull.attempts
    assert (attempt.times, pull.retries) == (5, 5)
    (failed,) = [c for c in pull.handle(p.DeadlinePassed(7.0), now) if isinstance(c, p.Fail)]
    assert "5 of 9 parts are loaded (5 times)" in str(failed.error)
    assert "within 7 s" in str(failed.error)
    assert isinstance(failed.error, NoSourceLeft)


def test_sources_may_appear_and_vanish() -> None:
    pull, _ = begun(ONE, stripe=3)
    pull.handle(p.HoldingAnnounced(1, announcement(3)), 0.0)
    (connect,) = pull.handle(p.SourcesFound([sources_module.Source(TWO), sources_module.Source(ONE)]), 0.1)
    assert isinstance(connect, p.Connect)
    assert connect.source == TWO
    assert pull.handle(p.SourceLost(TWO), 0.2) == []
    again = pull.handle(p.SessionEnded(2, PeerLost("broke")), 0.3)
    assert not [c for c in again if isinstance(c, p.Connect)]
    assert pull.wake_at(0.3) is None


def found(pull: Pull, now: float, *sources: Address, load: float = 0.0) -> list[Address]:
    """Whom it connects to when these are found."""
    commands = pull.handle(p.SourcesFound([sources_module.Source(one, load=load) for one in sources]), now)
    return [c.source for c in commands if isinstance(c, p.Connect)]


def failed(commands: list[p.Command]) -> str:
    """Why it failed; empty when it goes on."""
    return "".join(str(c.error) for c in commands if isinstance(c, p.Fail))


def test_a_pull_without_a_source_waits_until_the_first_listing_is_complete() -> None:
    pull, commands = begun(listing=10.0)
    assert commands == []
    assert pull.wake_at(0.0) == 10.0
    assert "no source appeared within 1 s" in failed(pull.handle(p.Listed(), 1.0))


def test_a_search_that_ends_without_a_source_ends_the_pull() -> None:
    pull, _ = begun(listing=10.0, wait=30.0)
    assert "no source was given" in failed(pull.handle(p.SearchEnded(), 1.0))


def test_a_listing_that_is_never_complete_is_not_waited_for_without_end() -> None:
    pull, _ = begun(listing=10.0)
    assert failed(pull.handle(p.TimerFired(), 9.9)) == ""
    assert "discovery: no source appeared within 10 s" in failed(pull.handle(p.TimerFired(), 10.0))


@pytest.mark.parametrize("listed", [False, True])
def test_the_wait_is_for_sources_that_appear_too(listed: bool) -> None:
    pull, _ = begun(listing=10.0, wait=30.0)
    if listed:
        assert pull.handle(p.Listed(), 1.0) == []
    assert found(pull, 2.0, ONE) == [ONE]
    assert failed(pull.handle(p.SessionEnded(1, RefusedError("identity", "another model")), 3.0)) == ""
    assert pull.wake_at(3.0) == 30.0
    assert found(pull, 4.0, ONE) == []  # told again, with another load, say: it is no use as before
    assert found(pull, 5.0, TWO) == [TWO]
    assert "another model" in failed(pull.handle(p.SessionEnded(2, RefusedError("identity", "a third model")), 31.0))


def test_a_search_that_ends_leaves_what_it_found() -> None:
    pull, _ = begun(listing=10.0, wait=30.0)
    assert found(pull, 0.0, ONE, TWO) == [ONE]
    (line,) = pull.handle(p.SearchEnded(DiscoveryError("Names failed: no name server")), 0.5)
    assert line == p.Log("warning", "discovery: Names failed: no name server")
    (_, connect) = pull.handle(p.SessionEnded(1, RefusedError("identity", "another model")), 1.0)
    assert isinstance(connect, p.Connect)
    assert connect.source == TWO
    why = failed(pull.handle(p.SessionEnded(2, RefusedError("identity", "a third model")), 2.0))
    assert "discovery: Names failed: no name server" in why
    assert "another model" in why


def test_a_source_says_where_it_was_found_or_who_named_it() -> None:
    pull, _ = begun(listing=10.0)
    (first,) = pull.handle(p.SourcesFound([sources_module.Source(ONE, {"zone": "a"}, load=2.0)]), 0.0)
    assert isinstance(first, p.Connect)
    assert (first.labels, first.named_by) == ({"zone": "a"}, None)
    commands = pull.handle(p.SessionEnded(1, RefusedError("busy", "others pass it on", sources=(str(TWO),))), 0.1)
    (second,) = [c for c in commands if isinstance(c, p.Connect)]
    assert (second.source, second.labels, second.named_by) == (TWO, {}, ONE)


def test_sources_beyond_the_bound_are_left_out_and_that_is_said_once() -> None:
    pull, _ = begun(listing=10.0)
    flood = [sources_module.Source(Address("h", port)) for port in range(1, sources_module.MAX_KNOWN + 3)]
    said = [
        c
        for c in pull.handle(p.SourcesFound(flood), 0.0) + pull.handle(p.SourcesFound(flood), 0.0)
        if isinstance(c, p.Log)
    ]
    assert [line.text for line in said] == ["4096 sources are known: more are left out until some are gone"]
