"""Which source is tried next, for any order of outcomes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netloader.core.addresses import Address
from netloader.core.candidate import Candidate
from netloader.core.choice import Here
from netloader.core.sources import MAX_KNOWN, Source, Sources
from netloader.errors import ConfigError

POOL = [Address("h", port) for port in range(1, 9)]
ONE, TWO, THREE, FOUR = POOL[:4]
WAIT = 30.0
TERMS: dict[str, Any] = {"tries": 2, "until": 0.0, "rng": random.Random(1)}


def offered(addresses: Iterable[Address]) -> list[Source]:
    return [Source(address) for address in addresses]


def test_the_order_given_is_the_order_tried() -> None:
    candidates = Sources(offered([TWO, ONE, TWO]), tries=2, until=0.0, rng=random.Random(1))
    assert candidates.take(0.0, work=True) == TWO
    assert candidates.take(0.0, work=True) == ONE
    assert candidates.take(0.0, work=True) is None
    assert candidates.running == 2


def test_a_source_that_is_not_ready_is_tried_for_the_last_time_when_the_wait_ends() -> None:
    candidates = Sources(offered([ONE]), tries=2, until=10.0, rng=random.Random(1))
    now = 0.0
    times = []
    while (due := candidates.next_due(now, work=False)) is not None:
        now = due
        assert candidates.take(now, work=True) == ONE
        times.append(now)
        candidates.later(ONE, now)
    assert times[0] == 0.0
    assert times[-1] == 10.0
    assert candidates.take(1e9, work=True) is None


def test_a_source_that_timed_out_this_client_is_tried_again_after_all_others() -> None:
    candidates = Sources(offered([ONE, TWO]), tries=2, until=0.0, rng=random.Random(1))
    assert candidates.take(0.0, work=True) == ONE
    candidates.again(ONE, 1.0, last=True)
    assert candidates.take(1.0, work=True) == TWO
    assert candidates.take(1.0, work=True) == ONE
    candidates.again(ONE, 2.0, last=True)
    assert candidates.take(2.0, work=True) is None


def test_a_pause_that_was_asked_for_is_kept() -> None:
    candidates = Sources(offered([ONE]), tries=2, until=100.0, rng=random.Random(1))
    candidates.take(0.0, work=True)
    candidates.later(ONE, 0.0, at_least=7.0)
    due = candidates.next_due(0.0, work=False)
    assert due is not None
    assert 7.0 <= due <= 7.0 * 1.25


def test_a_source_that_redirected_waits_until_its_relays_are_gone_and_is_told_to_avoid_them() -> None:
    candidates = Sources(offered([ONE]), tries=2, until=0.0, rng=random.Random(1))
    candidates.take(0.0, work=True)
    assert candidates.redirect(ONE, [TWO, THREE], 0.0)
    assert {candidates.take(0.0, work=True), candidates.take(0.0, work=True)} == {TWO, THREE}
    assert candidates.take(0.0, work=True) is None
    candidates.drop(TWO)
    assert candidates.take(0.0, work=True) is None
    candidates.drop(THREE)
    assert candidates.take(0.0, work=True) == ONE
    assert candidates.avoid == (TWO, THREE)
    assert not candidates.redirect(ONE, [TWO, THREE], 0.0)  # named again although they failed us


def test_sources_that_name_each_other_are_not_tried_in_an_endless_cycle() -> None:
    candidates = Sources(offered([ONE]), tries=2, until=0.0, rng=random.Random(1))
    candidates.take(0.0, work=True)
    candidates.redirect(ONE, [TWO], 0.0)
    assert candidates.take(0.0, work=True) == TWO
    assert not candidates.redirect(TWO, [ONE], 0.0)
    candidates.drop(TWO)
    assert candidates.take(0.0, work=True) == ONE


def test_a_source_that_was_too_slow_is_tried_again_when_no_other_is_left() -> None:
    candidates = Sources(offered([ONE, TWO]), tries=2, until=0.0, rng=random.Random(1))
    assert {candidates.take(0.0, work=True), candidates.take(0.0, work=True)} == {ONE, TWO}
    candidates.demote(ONE, 1.0)
    assert candidates.take(1.0, work=True) is None
    assert candidates.next_due(1.0, work=False) is None
    candidates.drop(TWO)
    assert candidates.next_due(1.0, work=False) == 1.0
    assert candidates.take(1.0, work=True) == ONE


def test_a_relay_can_be_spared_while_its_server_is_known() -> None:
    candidates = Sources(offered([ONE]), tries=2, until=0.0, rng=random.Random(1))
    candidates.take(0.0, work=True)
    candidates.redirect(ONE, [TWO], 0.0)
    assert candidates.can_be_spared(TWO)
    assert not candidates.can_be_spared(ONE)
    candidates.drop(ONE)
    assert not candidates.can_be_spared(TWO)
    assert not candidates.can_be_spared(THREE)


@pytest.mark.parametrize("end", ["rest", "demote", "again", "later", "redirect", "gone"])
def test_a_source_that_is_no_longer_offered_is_not_tried_again_however_its_session_ends(end: str) -> None:
    candidates = Sources(offered([ONE]), tries=2, until=100.0, rng=random.Random(1))
    candidates.take(0.0, work=True)
    candidates.lose(ONE)
    ends: dict[str, Callable[[], object]] = {
        "rest": lambda: candidates.rest(ONE, 1.0),
        "demote": lambda: candidates.demote(ONE, 1.0),
        "again": lambda: candidates.again(ONE, 1.0),
        "later": lambda: candidates.later(ONE, 1.0),
        "redirect": lambda: candidates.redirect(ONE, [TWO], 1.0),
        "gone": lambda: candidates.gone(ONE, [TWO], 1.0),
    }
    ends[end]()
    candidates.drop(TWO)
    assert candidates.take(50.0, work=True) is None


def test_a_resting_source_is_tried_again_only_when_blocks_are_pending() -> None:
    candidates = Sources(offered([ONE]), tries=2, until=0.0, rng=random.Random(1))
    candidates.take(0.0, work=True)
    candidates.rest(ONE, 1.0)
    assert candidates.take(1.0, work=False) is None
    assert candidates.next_due(1.0, work=False) is None
    assert candidates.take(1.0, work=True) == ONE


class AnyOutcome(RuleBasedStateMachine):
    """Whatever sources do, each given source is tried, none runs twice at a time, and the attempts end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.running: list[Address] = []
        self.tried: set[Address] = set()
        self.ours: list[Address] = []

    @initialize(ours=st.lists(st.sampled_from(POOL), min_size=1, max_size=4))
    def begin(self, ours: list[Address]) -> None:
        self.ours = ours
        self.candidates = Sources(offered(ours), tries=2, until=WAIT, rng=random.Random(1))

    @rule(work=st.booleans())
    def take(self, work: bool) -> None:
        source = self.candidates.take(self.now, work=work)
        if source is not None:
            assert source not in self.running
            self.running.append(source)
            self.tried.add(source)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["drop", "later", "again", "rest", "gone", "redirect"]))
    def ends(self, data: st.DataObject, how: str) -> None:
        source = data.draw(st.sampled_from(self.running))
        self.running.remove(source)
        match how:
            case "drop":
                self.candidates.drop(source)
            case "later":
                self.candidates.later(source, self.now, data.draw(st.none() | st.floats(0, 60)))
            case "again":
                self.candidates.again(source, self.now)
            case "rest":
                self.candidates.rest(source, self.now, last=data.draw(st.booleans()))
            case "gone":
                others = data.draw(st.lists(st.sampled_from(POOL), max_size=3))
                self.candidates.gone(source, others, self.now, data.draw(st.none() | st.floats(0, 60)))
            case _:
                relays = data.draw(st.lists(st.sampled_from(POOL), max_size=3))
                if not self.candidates.redirect(source, relays, self.now):
                    self.candidates.later(source, self.now)

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_account_agrees(self) -> None:
        if hasattr(self, "candidates"):
            assert self.candidates.running == len(self.running)
            due = self.candidates.next_due(self.now, work=False)
            assert due is None or due >= self.now
            for work in (False, True):
                kept = self.candidates._earliest(work=work), self.candidates.could_serve_instead
                self.candidates._changed()
                assert (self.candidates._earliest(work=work), self.candidates.could_serve_instead) == kept

    def teardown(self) -> None:
        """From any state, attempts end when sources only fail, and each given source was tried before."""
        if not hasattr(self, "candidates"):
            return
        for source in self.running:
            self.candidates.drop(source)
        for _ in range(1000):
            taken = self.candidates.take(self.now, work=True)
            if taken is None:
                due = self.candidates.next_due(self.now, work=False)
                if due is None:
                    break
                assert due > self.now
                self.now = due
                continue
            self.tried.add(taken)
            self.candidates.drop(taken)
        else:
            raise AssertionError("the attempts do not end")
        assert set(self.ours) <= self.tried


TestAnyOutcome = AnyOutcome.TestCase


def test_a_relay_that_stopped_is_dropped_and_the_sources_that_it_names_are_tried_at_once() -> None:
    seed, relay, parent = Address("s", 1), Address("r", 1), Address("p", 1)
    candidates = Sources(offered([seed]), tries=2, until=0.0, rng=random.Random(1))
    assert candidates.take(1.0, work=True) == seed
    assert candidates.redirect(seed, [relay], 1.0)
    assert candidates.take(1.0, work=True) == relay
    candidates.gone(relay, [parent, seed, relay], 1.0)
    assert candidates.avoid == (relay,)
    assert candidates.take(1.0, work=True) == parent
    candidates.gone(parent, [relay, seed], 1.0)  # a relay too: it ends at the seed, without going round
    assert candidates.take(1.0, work=True) == seed
    assert set(candidates.avoid) == {relay, parent}
    candidates.gone(seed, [], 1.0)
    assert candidates.take(1.0, work=True) is None
    assert candidates.next_due(1.0, work=False) is None


def test_of_equal_sources_the_one_with_the_least_load_is_first_and_loads_change() -> None:
    candidates = Sources([Source(ONE, load=3.0), Source(TWO, load=1.0), Source(THREE, load=3.0)], **TERMS)
    candidates.add([Source(THREE, load=0.5)])
    assert [candidates.take(0.0, work=True) for _ in range(3)] == [THREE, TWO, ONE]


def test_no_load_puts_a_source_before_relays_or_before_those_that_did_not_give_us_up() -> None:
    candidates = Sources([Source(ONE), Source(TWO, load=5.0)], **TERMS)
    assert candidates.take(0.0, work=True) == ONE
    candidates.again(ONE, 1.0, last=True)
    assert candidates.take(1.0, work=True) == TWO
    candidates.redirect(TWO, [THREE], 1.0)
    assert [candidates.take(1.0, work=True) for _ in range(2)] == [THREE, ONE]


def test_what_was_no_use_is_not_tried_again_until_it_vanished_and_appeared_anew() -> None:
    candidates = Sources(offered([ONE]), **TERMS)
    assert candidates.take(0.0, work=True) == ONE
    candidates.drop(ONE)
    candidates.add([Source(ONE, load=1.0)])
    assert candidates.take(1.0, work=True) is None
    candidates.lose(ONE)
    candidates.add([Source(ONE)])
    assert candidates.take(2.0, work=True) == ONE


def test_what_is_remembered_is_bounded() -> None:
    candidates = Sources([], **TERMS)
    for port in range(1, MAX_KNOWN + 10):
        candidates.add([Source(Address("h", port))])
        assert candidates.take(0.0, work=True) == Address("h", port)
        candidates.drop(Address("h", port))
    assert len(candidates._useless) == MAX_KNOWN
    flood = offered(Address("g", port) for port in range(1, MAX_KNOWN + 10))
    assert candidates.add(flood) == 9
    candidates.lose(Address("g", 1))
    assert candidates.add(flood) == 9


@pytest.mark.parametrize("load", [-1.0, float("nan"), float("inf")])
def test_a_load_is_a_number_from_0_on(load: float) -> None:
    with pytest.raises(ConfigError, match="load"):
        Source(ONE, load=load)


# --- one of many ----------------------------------------------------------------------------------------------------


def found(address: Address, generation: str = "", load: float = 0.0, **labels: str) -> Source:
    return Source(address, labels, load, generation, one_of_many=True)


def test_given_sources_are_tried_before_those_of_a_registry_in_their_order_and_the_nearest_of_those_first() -> None:
    here = Here(client="c", boot="b", zone="z")
    many = [found(ONE, zone="y"), found(TWO, zone="z"), found(THREE, boot="b", load=9.0)]
    candidates = Sources(many, **TERMS, here=here)
    candidates.add([Source(FOUR, load=5.0), Source(POOL[4])])
    taken = [candidates.take(0.0, work=True) for _ in range(5)]
    assert taken == [POOL[4], FOUR, THREE, TWO, ONE]


def test_clients_have_different_orders_of_equal_sources() -> None:
    def first(client: str) -> Address | None:
        many = [found(address, str(address)) for address in POOL]
        return Sources(many, **TERMS, here=Here(client=client)).take(0.0, work=True)

    assert len({first(str(number)) for number in range(50)}) > len(POOL) // 2
    assert first("one") == first("one")


def test_a_generation_that_was_dropped_is_not_tried_again_and_another_one_at_its_address_is() -> None:
    candidates = Sources([found(ONE, "g1")], **TERMS)
    assert candidates.take(0.0, work=True) == ONE
    candidates.drop(ONE)
    for again in (found(ONE, "g1"), found(ONE, "g1", load=3.0)):
        candidates.add([again])
        assert candidates.take(1.0, work=True) is None
    candidates.lose(ONE)
    candidates.add([found(ONE, "g1")])
    assert candidates.take(1.0, work=True) is None, "also when it vanished and appeared anew"
    candidates.add([found(ONE, "g2")])
    assert candidates.take(1.0, work=True) == ONE


def test_an_entry_that_copies_the_generation_of_a_server_does_not_make_that_server_unusable() -> None:
    """Whoever can write to a registry can copy what it reads there."""
    candidates = Sources([found(TWO, "g1")], **TERMS)
    assert candidates.take(0.0, work=True) == TWO
    candidates.drop(TWO)
    candidates.add([found(ONE, "g1")])
    assert candidates.take(1.0, work=True) == ONE
    candidates.add([found(TWO, "g1")])
    assert candidates.take(1.0, work=True) is None


def test_another_generation_at_an_address_does_not_wait_for_the_pause_of_the_earlier_one() -> None:
    candidates = Sources([found(ONE, "g1")], tries=2, until=1e9, rng=random.Random(1))
    candidates.take(0.0, work=True)
    candidates.later(ONE, 0.0, at_least=100.0)
    assert candidates.take(1.0, work=True) is None
    candidates.add([found(ONE, "g2")])
    assert candidates.take(1.0, work=True) == ONE


def test_another_generation_is_tried_when_the_session_with_the_earlier_one_has_failed() -> None:
    candidates = Sources([found(ONE, "g1")], **TERMS)
    candidates.take(0.0, work=True)
    candidates.add([found(ONE, "g2")])
    assert candidates.take(0.0, work=True) is None
    candidates.drop(ONE)
    assert candidates.take(0.0, work=True) == ONE
    candidates.drop(ONE)
    candidates.add([found(ONE, "g1"), found(ONE, "g2")])
    assert candidates.take(0.0, work=True) is None


def test_a_source_that_vanished_from_a_registry_that_lost_its_data_may_be_found_again() -> None:
    candidates = Sources([found(ONE, "g1")], **TERMS)
    candidates.take(0.0, work=True)
    candidates.lose(ONE)  # the session goes on
    candidates.rest(ONE, 1.0)
    assert candidates.take(0.0, work=True) is None
    candidates.add([found(ONE, "g1")])
    assert candidates.take(0.0, work=True) == ONE


def test_a_source_with_another_name_is_tried_only_when_nothing_else_is_left() -> None:
    here = Here(client="c", name="m")
    candidates = Sources([found(ONE, name="other"), found(TWO, name="m")], **TERMS, here=here)
    assert candidates.take(0.0, work=True) == TWO
    assert candidates.take(0.0, work=True) is None
    candidates.drop(TWO)
    assert candidates.take(0.0, work=True) == ONE


def test_one_of_many_that_was_not_ready_is_tried_again_behind_the_others() -> None:
    """Without a generation nobody knows whether it comes back. Others of them may be there."""
    candidates = Sources([], tries=2, until=60.0, rng=random.Random(1))
    candidates.add([Source(address, one_of_many=True) for address in POOL])
    first = candidates.take(0.0, work=True)
    assert first is not None
    candidates.later(first, 0.0)
    taken = [candidates.take(50.0, work=True) for _ in POOL]
    assert sorted(taken[:-1], key=str) == sorted(set(POOL) - {first})
    assert taken[-1] == first


def test_asking_again_without_a_change_does_not_look_at_each_source_again() -> None:
    """A pull asks at each event, and thousands of sources may be known."""

    class Counting(Sources):
        looks = 0

        def _held_back(self, candidate: Candidate) -> bool:
            self.looks += 1
            return super()._held_back(candidate)

    candidates = Counting(
        offered(Address("h", port) for port in range(1, 1001)), tries=2, until=1e9, rng=random.Random(1)
    )
    while (taken := candidates.take(0.0, work=True)) is not None:
        candidates.later(taken, 0.0, at_least=100.0)
    assert candidates.next_due(0.0, work=False) is not None
    candidates.looks = 0
    for now in range(90):
        assert candidates.take(float(now), work=True) is None
        assert candidates.next_due(float(now), work=False) is not None
    assert candidates.looks == 0
    assert candidates.take(200.0, work=True) is not None
