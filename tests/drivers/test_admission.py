"""Turns compared with a simple model while all are in use, and their rules while some are not."""

from __future__ import annotations

import anyio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netloader.server.admission import LEAST_RATE, Admission
from tests.drivers.admission_world import Kind, World


class TurnsMachine(RuleBasedStateMachine):
    """Everybody answers at once and no time passes: turns are given in the order of arrival."""

    @initialize(total=st.integers(1, 3), queue=st.integers(0, 3))
    def start(self, total: int, queue: int) -> None:
        self.turns = Admission(total, queue)
        self.total, self.queue = total, queue
        self.served: list[int] = []
        self.waiting: list[int] = []
        self.came = 0

    @rule()
    def enter(self) -> None:
        self.came += 1
        if len(self.served) < self.total:
            self.served.append(self.came)
        elif len(self.waiting) < self.queue:
            self.waiting.append(self.came)
        else:
            assert not self.turns.enter(self.came, 0.0)
            return
        assert self.turns.enter(self.came, 0.0)
        self.answer()

    @precondition(lambda self: self.came)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.integers(1, self.came), label="who leaves, once more perhaps")
        self.turns.leave(who, 0.0)
        for place in (self.served, self.waiting):
            if who in place:
                place.remove(who)
        while self.waiting and len(self.served) < self.total:
            self.served.append(self.waiting.pop(0))
        self.answer()

    @rule()
    def look(self) -> None:
        assert not self.turns.pass_on(0.0)
        assert self.turns.overdue(0.0) is None

    def answer(self) -> None:
        for who in self.served:
            assert self.turns.holds_channel(who) or self.turns.take_channel(who, 0.0)

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "turns"):
            return
        assert (self.turns.taken, self.turns.waiting) == (len(self.served), len(self.waiting))
        assert self.turns.channels == len(self.served)
        for who in range(1, self.came + 1):
            assert self.turns.has(who) == (who in self.served)
            assert self.turns.before(who) == (self.waiting.index(who) if who in self.waiting else 0)


TestTurns = TurnsMachine.TestCase


class UnusedTurnsMachine(RuleBasedStateMachine):
    """Time passes, and clients answer, move blocks, or do not."""

    @initialize(total=st.integers(1, 3), queue=st.integers(1, 4))
    def start(self, total: int, queue: int) -> None:
        self.turns, self.total, self.queue = Admission(total, queue), total, queue
        self.now, self.came = 0.0, 0

    @rule(seconds=st.floats(0.01, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def enter(self) -> None:
        self.came += 1
        self.turns.enter(self.came, self.now, "ab"[self.came % 2])

    @precondition(lambda self: self.came)
    @rule(data=st.data(), nbytes=st.sampled_from([1, 4 << 20]))
    def move(self, data: st.DataObject, nbytes: int) -> None:
        who = data.draw(st.integers(1, self.came))
        if self.turns.holds_channel(who):
            self.turns.call_began(who, nbytes, self.now)
            self.turns.call_ended(who, nbytes, self.now)
        elif self.turns.has(who):
            self.turns.take_channel(who, self.now)

    @precondition(lambda self: self.came)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.turns.leave(data.draw(st.integers(1, self.came)), self.now)

    @rule()
    def pass_on(self) -> None:
        in_use = {who for who in range(1, self.came + 1) if self.turns.in_use(who, self.now)}
        assert in_use.isdisjoint(self.turns.pass_on(self.now)), "a turn that is used is not passed on"
        assert self.turns.overdue(self.now) not in in_use

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "turns"):
            return
        assert self.turns.channels <= 2 * self.total
        assert self.turns.taken <= 2 * self.total
        # Nobody waits while there is a turn for it.
        waiting = [who for who in range(1, self.came + 1) if self.turns.queued(who)]
        new = [who for who in waiting if not self.turns.holds_channel(who)]
        assert not new or self.turns.taken >= self.total or self.turns.channels == 2 * self.total


TestUnusedTurns = UnusedTurnsMachine.TestCase


def test_turns_that_come_back_are_bounded() -> None:
    """Two clients that were put aside answer, while a third one has the only turn."""
    turns = Admission(1, 1)
    assert all(turns.enter(number, 0.0) for number in (1, 2, 3))
    assert turns.pass_on(1.0) == [1]
    assert turns.pass_on(2.0) == [3], "the newest one was next"
    assert turns.has(2)
    assert turns.take_channel(1, 2.0)
    assert turns.take_channel(3, 2.0)
    assert turns.taken == 2
    turns.call_ended(3, 4 << 20, 2.0)
    assert (turns.taken, turns.aside(3), turns.channels) == (2, True, 2)


async def test_a_queued_client_is_woken_when_it_gets_its_turn() -> None:
    turns = Admission(1, 1)
    assert turns.enter("first", 0.0)
    assert turns.enter("second", 0.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turns.wait, "second")
        await anyio.wait_all_tasks_blocked()
        turns.leave("first", 0.0)
    assert turns.has("second")
    await turns.wait("second")  # returns at once for a client that has a turn


def test_a_client_that_is_slow_to_answer_has_its_turn_back_when_it_does() -> None:
    turns = Admission(1, 8)
    assert turns.enter("slow", 0.0)
    assert turns.enter("quick", 0.0)
    assert turns.pass_on(0.4) == []
    assert turns.pass_on(0.6) == ["slow"]
    assert turns.take_channel("quick", 0.7)
    assert turns.take_channel("slow", 5.0)
    assert not turns.aside("slow")


def test_a_large_announcement_gives_more_time_to_answer() -> None:
    turns = Admission(1, 8)
    turns.enter("large", 0.0)
    turns.answer_takes("large", 10 * LEAST_RATE)
    turns.enter("other", 0.0)
    assert turns.pass_on(10.4) == []
    assert turns.pass_on(10.6) == ["large"]


def test_blocks_of_a_byte_do_not_keep_a_turn() -> None:
    turns = Admission(1, 8)
    turns.enter("drips", 0.0)
    assert turns.take_channel("drips", 0.0)
    turns.enter("waits", 0.0)
    for tick in range(1, 30):
        turns.call_began("drips", 1, tick / 10)
        turns.call_ended("drips", 1, tick / 10)
    assert turns.pass_on(3.0) == ["drips"]
    assert turns.has("waits")


def test_a_client_that_waits_for_this_server_is_not_ended() -> None:
    turns = Admission(1, 8, 1)
    turns.enter("relayed", 0.0)
    assert turns.take_channel("relayed", 0.0)
    turns.enter("waits", 0.0)
    turns.excuse("relayed", 0.0, excused=True)
    assert turns.overdue(100.0) is None
    turns.excuse("relayed", 100.0, excused=False)
    assert turns.overdue(111.0) is None
    assert turns.overdue(113.0) == "relayed"


@given(
    seed=st.integers(0, 1 << 30),
    strangers=st.lists(st.tuples(st.sampled_from([Kind.SILENT, Kind.HALF, Kind.SLOW]), st.integers(1, 30)), max_size=2),
    honest=st.integers(1, 6),
    slow=st.floats(0, 4),
    rate=st.sampled_from([2.0, 20.0, 400.0]),
)
def test_honest_clients_always_finish(
    seed: int, strangers: list[tuple[Kind, int]], honest: int, slow: float, rate: float
) -> None:
    """Strangers who come back at once whenever they are turned away do not keep them out, whatever the strangers do."""
    world = World(seed, turns=4, queue=64)
    for kind, count in strangers:
        world.add_strangers(kind, count)
    for _ in range(honest):
        world.add_honest(answers_after=slow, rate=rate * LEAST_RATE, nbytes=16 << 20)
    world.run_until_honest_are_done(within=900.0)


def test_a_client_among_silent_ones_begins_within_a_second() -> None:
    world = World(0, turns=8, queue=256)
    world.add_strangers(Kind.SILENT, 264)
    world.run(0.2)
    client = world.add_honest(answers_after=0.05, rate=100 * LEAST_RATE, nbytes=64 << 20)
    world.run_until_honest_are_done(within=30.0)
    assert client.began is not None
    assert client.began - client.came < 1.0


def test_a_client_among_slow_readers_begins_within_a_second() -> None:
    world = World(0, turns=8, queue=256)
    world.add_strangers(Kind.SLOW, 8)
    world.run(3.0)
    client = world.add_honest(answers_after=0.05, rate=100 * LEAST_RATE, nbytes=64 << 20)
    world.run_until_honest_are_done(within=30.0)
    assert client.began is not None
    assert client.began - client.came < 1.0
