"""Replicas that pull from each other: whoever joins, dies or finds whom, each one that lives gets every block.

The fleet is simulated (`benchmarks.fleet_simulation`); every replica decides as in the product. The simulation itself
fails when a replica asks another one for a block that this one does not have: then the two could wait for each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.fleet_simulation import Fleet, Result, Scenario
from netloader.core.addresses import Address
from netloader.core.block_order import BlockOrder
from netloader.core.plan import expand, mask_of, ranges_of, to_ranges
from netloader.core.pull_requests import Requests
from netloader.core.sources import Source, Sources
from netloader.errors import LocalProtocolError

FLEETS = st.builds(
    Scenario,
    replicas=st.integers(1, 9),
    blocks=st.integers(1, 14),
    seconds=st.sampled_from([0.05, 2.0]),
    seeds=st.sampled_from([(0,), (0, 0, 1)]),
    zones=st.integers(1, 2),
    joining=st.sampled_from([0.0, 1.0, 9.0]),
    dying=st.sampled_from([0.0, 0.3]),
    lost=st.sampled_from([0.0, 0.2]),
    known=st.integers(1, 9),
    far_known=st.integers(0, 2),
    gateways=st.just(9),
    stripe=st.integers(1, 4),
    fan_out=st.integers(1, 2),
    shares=st.integers(1, 4),
    one_window=st.booleans(),
    seed=st.integers(0, 99),
)


def lived(scenario: Scenario) -> Result:
    """Run a fleet, and check what has to hold in each."""
    fleet = Fleet(scenario)
    found = fleet.run()
    for one in fleet.replicas:
        assert one.pull is not None
        one.pull.ledger.check_invariants()
        assert one.pull.ledger.verified_mask == one.have
        if one.alive:
            assert one.pull.ledger.complete, one.failed
    assert (found.done, found.failed) == (scenario.replicas - found.died, 0)
    return found


A_RELAY_THAT_WAS_FOUND_AND_NAMED_DIES = Scenario(
    replicas=2,
    blocks=12,
    seconds=2.0,
    zones=2,
    joining=9.0,
    dying=0.3,
    lost=0.2,
    known=3,
    far_known=1,
    gateways=2,
    stripe=1,
    fan_out=1,
    shares=2,
    seed=35,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@example(A_RELAY_THAT_WAS_FOUND_AND_NAMED_DIES)
@given(FLEETS)
def test_each_replica_that_lives_gets_every_block(scenario: Scenario) -> None:
    lived(scenario)


def test_many_replicas_cost_little_more_than_one_and_the_seed_sends_little_more_than_once() -> None:
    alone = lived(Scenario(replicas=1, blocks=256))
    many = lived(Scenario(replicas=16, blocks=256))
    assert alone.last < 1.02
    assert many.last < 1.5
    assert many.from_seeds < 1.5
    assert many.depth <= 12


def _any_block(self: BlockOrder, session: int, pending: int) -> Any:
    return expand(ranges_of(pending)) if self.differs else None


BUGS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a relay is asked for blocks that it does not have": (BlockOrder, "order", _any_block),
    "a source that has nothing more is never left": (Requests, "leave_starved", lambda *_: iter(())),
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_a_bug_in_what_is_asked_of_whom_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = BUGS[bug]
    monkeypatch.setattr(owner, name, broken)
    hidden = Scenario(replicas=9, blocks=14, stripe=1, shares=1, known=2, far_known=0)

    def all_lived() -> None:
        for seed in range(40):
            lived(replace(hidden, seed=seed, dying=0.3))

    with pytest.raises((AssertionError, LocalProtocolError)):
        all_lived()


def test_a_server_is_not_held_back_for_a_relay_that_was_found_and_can_not_be_reached() -> None:
    """Such a relay is waited for as long as any source that was found."""
    server, relay = Address("h", 1), Address("h", 2)
    sources = Sources([Source(server), Source(relay)], tries=2, until=1e6, rng=random.Random(1))
    assert sources.take(0.0, work=True) == server
    assert sources.redirect(server, [relay], 0.0)
    assert sources.take(0.0, work=True) == relay
    sources.later(relay, 0.0)
    assert sources.take(0.0, work=True) == server


# --- the order of blocks --------------------------------------------------------------------------------------------


def order() -> BlockOrder:
    return BlockOrder(random.Random(1))


def test_the_lowest_block_comes_first_while_all_sources_hold_everything() -> None:
    made = order()
    made.begin(1, partial=False, shared=False)
    assert made.order(1, 0b1111) is None
    assert not made.differs


def test_a_relay_is_asked_for_what_it_has_and_for_the_rarest_first() -> None:
    made = order()
    for session in (1, 2, 3):
        made.begin(session, partial=True, shared=False)
        assert list(made.order(session, 0b11111) or ()) == []
    made.has(1, ((0, 4),))
    made.has(2, ((1, 4),))
    made.has(3, ((2, 3),))
    assert list(made.order(1, 0b11111) or ()) == [0, 1, 3, 2] or list(made.order(1, 0b11111) or ()) == [0, 3, 1, 2]
    assert set(made.order(2, 0b00110) or ()) == {1, 2}
    assert next(iter(made.order(4, 0b11111) or ())) == 4, "a seed is asked for what nobody has"
    made.end(2)
    made.end(2)
    assert list(made.order(1, 0b0110) or ()) == [1, 2]
    assert made.can_give(3, 0b100)
    assert not made.can_give(3, 0b011)


def test_what_a_server_has_sent_to_others_comes_last() -> None:
    made = order()
    made.begin(1, partial=False, shared=True)
    made.sent(1, ((0, 3),))
    assert next(iter(made.order(1, 0b1111) or ())) == 3
    assert set(made.order(1, 0b1111) or ()) == {0, 1, 2, 3}


@given(st.lists(st.tuples(st.integers(1, 4), st.sets(st.integers(0, 9), min_size=1), st.booleans()), max_size=12))
def test_the_order_is_that_of_a_count(steps: list[tuple[int, set[int], bool]]) -> None:
    made, has = order(), dict[int, set[int]]()
    for session, blocks, ends in steps:
        if ends:
            made.end(session)
            has.pop(session, None)
            continue
        made.begin(session, partial=True, shared=False)
        made.has(session, to_ranges(blocks))
        has.setdefault(session, set()).update(blocks)
    for session, blocks in has.items():
        given = list(made.order(session, (1 << 10) - 1) or ())
        assert set(given) == blocks
        counts = [sum(number in other for other in has.values()) for number in given]
        assert counts == sorted(counts)


@given(st.sets(st.integers(0, 200)))
def test_masks_and_ranges_are_inverse(blocks: set[int]) -> None:
    assert set(expand(ranges_of(mask_of(to_ranges(blocks))))) == blocks
