"""Limits of connections, and who has to go: properties over any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netloader.core.options import ServeOptions
from netloader.server.budgets import Connections, Limits, Stage, limits_for

EVICTABLE = (Stage.SILENT, Stage.STRANGER, Stage.PROBE, Stage.ASIDE)


@given(
    descriptors=st.integers(16, 1 << 21),
    clients=st.integers(1, 1000),
    queue=st.integers(0, 5000),
    strangers=st.integers(1, 5000),
)
def test_at_least_half_of_the_descriptors_stay_free(descriptors: int, clients: int, queue: int, strangers: int) -> None:
    limits = limits_for(ServeOptions(max_clients=clients, max_queue=queue, max_strangers=strangers), descriptors)
    # A channel needs 8 at most; the least limits need 12 with any number of descriptors.
    assert limits.connections + 8 * limits.channels <= max(12, descriptors // 2)
    assert 1 <= limits.turns <= limits.channels <= 2 * limits.turns or limits.channels == 1
    assert limits.strangers >= 1
    assert limits.probes >= 1
    assert limits.queue <= queue
    # Not even with a full queue are newcomers locked out.
    assert limits.queue + limits.channels < limits.connections or limits.connections == 4


def test_with_many_descriptors_the_options_are_the_limits() -> None:
    limits = limits_for(ServeOptions(), 1 << 16)
    assert (limits.turns, limits.channels, limits.queue, limits.strangers) == (8, 16, 256, 128)


@pytest.mark.parametrize("descriptors", [40, 256, 1024])
def test_with_few_descriptors_all_limits_are_smaller(descriptors: int) -> None:
    few, many = limits_for(ServeOptions(), descriptors), limits_for(ServeOptions(), 1 << 16)
    assert few.connections < many.connections
    assert few.strangers < many.strangers
    assert few.queue < many.queue


class ConnectionsMachine(RuleBasedStateMachine):
    @initialize(connections=st.integers(4, 12), strangers=st.integers(2, 6), queue=st.integers(1, 3))
    def start(self, connections: int, strangers: int, queue: int) -> None:
        self.limits = Limits(connections, strangers, queue, 2, 2, 3)
        self.accounts = Connections(self.limits)
        self.known: dict[int, tuple[str, Stage]] = {}  # oldest in its stage first
        self.came = 0

    @rule(address=st.sampled_from("abc"), stage=st.sampled_from([Stage.SILENT, Stage.STRANGER]))
    def enter(self, address: str, stage: Stage) -> None:
        self.came += 1
        self.accounts.enter(self.came, address, stage)
        self.known[self.came] = (address, stage)
        self.make_room()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(self.known)))
        stage = data.draw(st.sampled_from([Stage.PROBE, Stage.ASIDE]))
        if self.number(Stage.QUEUED) < self.limits.queue:
            stage = data.draw(st.sampled_from([stage, Stage.QUEUED]))
        address, before = self.known[who]
        self.accounts.move(who, stage)
        if stage is not before:
            del self.known[who]
            self.known[who] = (address, stage)
        self.make_room()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted(self.known)))
        del self.known[who]
        self.accounts.leave(who)
        self.accounts.leave(who)

    def number(self, stage: Stage) -> int:
        return sum(one is stage for _, one in self.known.values())

    def make_room(self) -> None:
        while (who := self.accounts.surplus()) is not None:
            assert isinstance(who, int)
            address, stage = self.known[who]
            assert stage in EVICTABLE, "a client that waits or is served does not go"
            if stage in (Stage.SILENT, Stage.STRANGER):
                other = Stage.STRANGER if stage is Stage.SILENT else Stage.SILENT
                assert self.number(stage) >= self.number(other), "neither kind takes the places of the other"
            equals = [(key, one) for key, (one, its) in self.known.items() if its is stage]
            crowd = sum(one == address for _, one in equals)
            assert all(crowd >= sum(one == other for _, one in equals) for _, other in equals)
            assert who == next(key for key, one in equals if one == address), "the oldest of its address goes"
            self.accounts.move(who, Stage.ENDING)
            self.accounts.leave(who)
            del self.known[who]

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "came"):
            return
        assert len(self.accounts) == len(self.known) <= self.limits.connections
        for stage in Stage:
            assert self.accounts.count(stage) == self.number(stage)
        assert self.number(Stage.SILENT) + self.number(Stage.STRANGER) <= self.limits.strangers
        assert self.number(Stage.PROBE) <= self.limits.probes
        assert self.number(Stage.ASIDE) <= self.limits.queue


TestConnections = ConnectionsMachine.TestCase


def test_a_connection_that_is_being_closed_is_not_chosen_again() -> None:
    accounts = Connections(Limits(4, 1, 1, 1, 1, 1))
    accounts.enter("first", "a")
    accounts.enter("second", "a")
    assert accounts.surplus() == "first"
    accounts.move("first", Stage.ENDING)
    accounts.move("first", Stage.QUEUED)
    assert accounts.count(Stage.ENDING) == 1
    assert accounts.surplus() is None


def test_the_newest_stranger_of_an_address_with_few_stays_while_another_address_floods() -> None:
    accounts = Connections(Limits(40, 8, 8, 8, 8, 8))
    accounts.enter("honest", "a")
    for number in range(1000):
        accounts.enter(number, "b")
        while (who := accounts.surplus()) is not None:
            assert who != "honest"
            accounts.leave(who)


def test_silent_connections_and_ones_that_spoke_have_half_of_the_places_each_when_both_flood() -> None:
    accounts = Connections(Limits(40, 8, 8, 8, 8, 8))
    accounts.enter("silent", "a", Stage.SILENT)
    for number in range(1000):
        accounts.enter(number, "a")
        while (who := accounts.surplus()) is not None:
            accounts.leave(who)
    assert (accounts.count(Stage.SILENT), accounts.count(Stage.STRANGER)) == (1, 7)
    for number in range(1000, 2000):
        accounts.enter(number, "a", Stage.SILENT)
        while (who := accounts.surplus()) is not None:
            accounts.leave(who)
    assert (accounts.count(Stage.SILENT), accounts.count(Stage.STRANGER)) == (4, 4)
