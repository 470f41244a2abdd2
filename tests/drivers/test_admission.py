"""Turns compared with a simple model: two lists."""

from __future__ import annotations

import anyio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netloader.server.admission import Admission


class TurnsMachine(RuleBasedStateMachine):
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
            assert not self.turns.enter(self.came)
            return
        assert self.turns.enter(self.came)

    @precondition(lambda self: self.came)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.integers(1, self.came), label="who leaves, once more perhaps")
        self.turns.leave(who)
        for place in (self.served, self.waiting):
            if who in place:
                place.remove(who)
        while self.waiting and len(self.served) < self.total:
            self.served.append(self.waiting.pop(0))

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "turns"):
            return
        assert (self.turns.taken, self.turns.waiting) == (len(self.served), len(self.waiting))
        for who in range(1, self.came + 1):
            assert self.turns.has(who) == (who in self.served)
            assert self.turns.before(who) == (self.waiting.index(who) if who in self.waiting else 0)


TestTurns = TurnsMachine.TestCase


async def test_a_queued_client_is_woken_when_it_gets_its_turn() -> None:
    turns = Admission(1, 1)
    assert turns.enter("first")
    assert turns.enter("second")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turns.wait, "second")
        await anyio.wait_all_tasks_blocked()
        turns.leave("first")
    assert turns.has("second")
    await turns.wait("second")  # returns at once for a client that has a turn
