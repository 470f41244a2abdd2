"""The ledger compared with a simple model, for any order of assignments, losses and wrong digests."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from netloader.core import ledger as ledger_module
from netloader.core.ledger import BlockState, Ledger
from netloader.core.manifest import DIGEST_BYTES, Manifest, TensorSpec, compute_root
from netloader.core.plan import Plan, expand, make_plan, to_ranges
from netloader.errors import DigestMismatch, LocalProtocolError, RootMismatch

BLOCK = 1024


def plan_of(blocks: int, *, short_tail: bool = False) -> Plan:
    return make_plan(Manifest((TensorSpec("w", "uint8", (blocks * BLOCK - (BLOCK - 7 if short_tail else 0),)),)), BLOCK)


def digest_of(number: int) -> bytes:
    return number.to_bytes(DIGEST_BYTES, "big")


def digests_for(plan: Plan) -> bytes:
    return b"".join(digest_of(block.number) for block in plan.blocks)


def pinned(blocks: int) -> Ledger:
    plan, ledger = plan_of(blocks), Ledger()
    ledger.pin("aa", plan, digests_for(plan), "first")
    return ledger


class AnyOrder(RuleBasedStateMachine):
    """Several sessions that do legal steps in any order, and some illegal ones."""

    sessions: Bundle[str] = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.names = (f"session {i}" for i in itertools.count())
        # The model: the state of each block, the session that has it, and the sessions that were denied it.
        self.where: list[tuple[BlockState, str | None]] = []
        self.denied: dict[str, set[int]] = {}
        self.alive: set[str] = set()
        self.times_verified: list[int] = []

    @initialize(blocks=st.integers(0, 12), short_tail=st.booleans(), expected=st.booleans())
    def begin(self, blocks: int, short_tail: bool, expected: bool) -> None:
        self.plan = plan_of(blocks, short_tail=short_tail and blocks > 0)
        self.digests = digests_for(self.plan)
        self.root = compute_root(self.plan.manifest, BLOCK, "test", self.digests)
        self.ledger = Ledger(self.root, "EXPECT_ROOT") if expected else Ledger()
        self.pinned_by = "EXPECT_ROOT" if expected else ""
        self.pinned = False

    # --- sources ----------------------------------------------------------------------------------------------------

    @rule(target=sessions)
    def source_accepted(self) -> str:
        name = next(self.names)
        self.ledger.pin(self.root, self.plan, self.digests, name)
        if not self.pinned:
            self.pinned = True
            self.pinned_by = self.pinned_by or name
            self.where = [(BlockState.PENDING, None) for _ in self.plan.blocks]
            self.times_verified = [0 for _ in self.plan.blocks]
        self.alive.add(name)
        self.denied[name] = set()
        return name

    @rule()
    def source_with_other_weights(self) -> None:
        if not self.ledger.root:
            return
        with pytest.raises(RootMismatch, match=self.pinned_by) as caught:
            self.ledger.pin("ff" * 32, self.plan, self.digests, "stranger")
        assert caught.value.expected == self.root

    @precondition(lambda self: self.pinned)
    @rule()
    def source_with_the_root_but_another_plan(self) -> None:
        with pytest.raises(LocalProtocolError, match="another plan"):
            self.ledger.pin(self.root, plan_of(13), digests_for(plan_of(13)), "liar")

    # --- blocks -----------------------------------------------------------------------------------------------------

    def mine(self, session: str, *states: BlockState) -> list[int]:
        return [n for n, (state, owner) in enumerate(self.where) if owner == session and state in states]

    def allowed(self, session: str) -> list[int]:
        pending = [n for n, (state, _) in enumerate(self.where) if state is BlockState.PENDING]
        return [n for n in pending if n not in self.denied[session]]

    @rule(session=sessions, max_bytes=st.integers(0, 6 * BLOCK))
    def assign(self, session: str, max_bytes: int) -> None:
        if session not in self.alive:
            return
        allowed = self.allowed(session)
        assert self.ledger.has_work_for(session) == bool(allowed)
        given = expand(self.ledger.assign(session, max_bytes))
        expected: list[int] = []
        for number in allowed:  # the lowest ones, as many as fit, one in any case
            size = sum(self.plan.blocks[n].nbytes for n in [*expected, number])
            if expected and size > max_bytes:
                break
            expected.append(number)
        assert list(given) == expected
        for number in given:
            self.where[number] = (BlockState.IN_FLIGHT, session)

    @rule(session=sessions, pick=st.integers(0, 99))
    def receive(self, session: str, pick: int) -> None:
        flying = self.mine(session, BlockState.IN_FLIGHT)
        if not flying:
            return
        number = flying[pick % len(flying)]
        self.ledger.received(session, number)
        self.where[number] = (BlockState.RECEIVED, session)

    @rule(session=sessions, pick=st.integers(0, 99), truthful=st.booleans())
    def verify(self, session: str, pick: int, truthful: bool) -> None:
        received = self.mine(session, BlockState.RECEIVED)
        if not received:
            return
        number = received[pick % len(received)]
        if truthful:
            self.ledger.verify(session, number, digest_of(number))
            self.where[number] = (BlockState.VERIFIED, None)
            self.times_verified[number] += 1
            return
        with pytest.raises(DigestMismatch) as caught:
            self.ledger.verify(session, number, digest_of(number + 1))
        assert (caught.value.block, caught.value.tensors) == (number, ("w",))
        self.where[number] = (BlockState.PENDING, None)

    @rule(session=sessions, picks=st.sets(st.integers(0, 99), max_size=4))
    def give_back(self, session: str, picks: set[int]) -> None:
        flying = self.mine(session, BlockState.IN_FLIGHT)
        if not flying:
            return
        numbers = {flying[pick % len(flying)] for pick in picks}
        self.ledger.give_back(session, to_ranges(numbers))
        for number in numbers:
            self.where[number] = (BlockState.PENDING, None)
        self.denied[session] |= numbers

    @rule(session=consumes(sessions))
    def lose(self, session: str) -> None:
        had = self.mine(session, BlockState.IN_FLIGHT, BlockState.RECEIVED)
        assert self.ledger.lose(session) == to_ranges(had)
        for number in had:
            self.where[number] = (BlockState.PENDING, None)
        self.alive.discard(session)

    # --- illegal steps ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.where)
    @rule(session=sessions, pick=st.integers(0, 99))
    def misreport(self, session: str, pick: int) -> None:
        number = pick % len(self.where)
        state, owner = self.where[number]
        if (state, owner) != (BlockState.IN_FLIGHT, session):
            with pytest.raises(LocalProtocolError):
                self.ledger.received(session, number)
            with pytest.raises(LocalProtocolError):
                self.ledger.give_back(session, ((number, number + 1),))
        if (state, owner) != (BlockState.RECEIVED, session):
            with pytest.raises(LocalProtocolError):
                self.ledger.verify(session, number, digest_of(number))

    # --- invariants -------------------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.ledger.check_invariants()
        assert [self.ledger.state(n) for n in range(len(self.where))] == [state for state, _ in self.where]
        for session in self.alive:
            mine = self.mine(session, BlockState.IN_FLIGHT, BlockState.RECEIVED)
            assert self.ledger.in_flight(session) == frozenset(mine)
            assert self.ledger.has_work_for(session) == bool(self.allowed(session))
        verified = [n for n, (state, _) in enumerate(self.where) if state is BlockState.VERIFIED]
        assert self.ledger.verified_blocks == len(verified)
        assert self.ledger.verified_bytes == sum(self.plan.blocks[n].nbytes for n in verified)
        assert self.ledger.idle == any(state is BlockState.PENDING for state, _ in self.where)
        assert self.ledger.complete == (self.pinned and len(verified) == len(self.plan.blocks))
        assert all(times <= 1 for times in self.times_verified), "no block counts twice"
        assert self.ledger.pinned_by == self.pinned_by

    def teardown(self) -> None:
        """From any state, all sessions can end, and one honest source can complete the pull."""
        if not hasattr(self, "ledger"):
            return
        for session in self.alive:
            self.ledger.lose(session)
        self.ledger.pin(self.root, self.plan, self.digests, "last")
        while ranges := self.ledger.assign("last", 3 * BLOCK):
            for number in expand(ranges):
                self.ledger.received("last", number)
                self.ledger.verify("last", number, digest_of(number))
        self.ledger.check_invariants()
        assert self.ledger.complete
        assert self.ledger.verified_bytes == self.ledger.total_bytes


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=3 * settings().max_examples, stateful_step_count=40)


def test_nothing_can_be_done_before_a_plan_is_known() -> None:
    ledger = Ledger()
    assert not ledger.complete
    assert not ledger.has_work_for("a")
    assert ledger.total_bytes is None
    with pytest.raises(LocalProtocolError, match="no plan"):
        ledger.assign("a", 1)
    with pytest.raises(LocalProtocolError, match="no root"):
        ledger.pin("", plan_of(1), digests_for(plan_of(1)), "a")
    with pytest.raises(LocalProtocolError, match="bytes of digests"):
        ledger.pin("aa", plan_of(2), digests_for(plan_of(1)), "a")
    ledger.check_invariants()


def test_a_pull_of_nothing_is_complete_once_it_is_pinned() -> None:
    ledger = pinned(0)
    assert ledger.complete
    assert not ledger.has_work_for("a")


def test_a_block_with_another_digest_is_pending_again_and_not_counted() -> None:
    ledger = pinned(2)
    ledger.assign("a", BLOCK)
    ledger.received("a", 0)
    with pytest.raises(DigestMismatch, match=r"block 0 \(w\)"):
        ledger.verify("a", 0, digest_of(1))
    assert (ledger.state(0), ledger.verified_blocks, ledger.verified_bytes) == (BlockState.PENDING, 0, 0)
    assert ledger.assign("b", BLOCK) == ((0, 1),)
    ledger.received("b", 0)
    ledger.verify("b", 0, digest_of(0))
    assert (ledger.verified_blocks, ledger.verified_bytes) == (1, BLOCK)


def test_denied_blocks_are_never_assigned_to_the_same_session_again() -> None:
    ledger = pinned(3)
    assert ledger.assign("a", 2 * BLOCK) == ((0, 2),)
    ledger.give_back("a", ((0, 1),))
    assert ledger.assign("a", 9 * BLOCK) == ((2, 3),)
    assert ledger.assign("b", 9 * BLOCK) == ((0, 1),)
    ledger.lose("b")
    assert not ledger.has_work_for("a")
    ledger.lose("a")
    assert ledger.assign("a", 9 * BLOCK) == ((0, 3),), "a new session of that name starts afresh"


def test_giving_back_overlapping_ranges_counts_once() -> None:
    ledger = pinned(3)
    ledger.assign("a", 3 * BLOCK)
    ledger.give_back("a", ((0, 2), (1, 3)))
    ledger.check_invariants()
    assert ledger.assign("b", 9 * BLOCK) == ((0, 3),)


def test_denied_blocks_are_not_skipped_again_at_each_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pops = 0

    class CountingQueue(ledger_module._Queue):
        def pop(self) -> None:
            nonlocal pops
            pops += 1
            super().pop()

    monkeypatch.setattr(ledger_module, "_Queue", CountingQueue)
    blocks = 3_000
    ledger = pinned(blocks)
    while ledger.has_work_for("relay"):  # it has nothing yet, and says so block by block
        ledger.give_back("relay", ledger.assign("relay", 1))
    while ledger.has_work_for("seed"):
        for number in expand(ledger.assign("seed", BLOCK)):
            ledger.received("seed", number)
            ledger.verify("seed", number, digest_of(number))
        assert not ledger.has_work_for("relay")
    assert ledger.complete
    assert blocks <= pops < 4 * blocks
