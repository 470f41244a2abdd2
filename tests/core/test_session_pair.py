"""Two sessions under any interleaving: every cut, every failure, and every lie that a peer could tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.core.ledger import Ledger
from netloader.core.messages import Ability
from netloader.core.protocol import ClientTerms, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from tests.core.pair import BLOCK, Pair, Peer, Weights, client_terms, server_terms
from tests.core.strategies import any_message

SIZES = st.sampled_from([1, 2, 5, 40, 300, 1 << 20])
SIDES = st.sampled_from(["server", "client"])
TOKENS = st.just((b"same", b"same")) | st.sampled_from(
    [(None, None), (b"one", b"other"), (None, b"only"), (b"only", None)]
)


def clients(weights: Weights) -> dict[str, ClientTerms]:
    """Every kind of client that may come to a server of `weights`, the ones that fit first."""
    return {
        "fills the same": client_terms(weights),
        "takes what comes": client_terms(),
        "expects this root": client_terms(weights, root=weights.announcement().root, pinned_by="EXPECT_ROOT"),
        "looks": client_terms(probe=True),
        "looks, as another model": client_terms(
            dataclasses.replace(weights, identity=ModelIdentity(model="n")), probe=True
        ),
        "fills another model": client_terms(dataclasses.replace(weights, identity=ModelIdentity(model="n"))),
        "fills other tensors": client_terms(Weights(weights.blocks + 1)),
        "expects another root": client_terms(weights, root="ab" * 32, pinned_by="EXPECT_ROOT"),
        "takes little": client_terms(max_bytes=1),
        "has no transport": client_terms(weights, abilities=(Ability("carrier pigeon"),)),
    }


FITTING = 5


def alive(machine: Conversations) -> bool:
    return not all(peer.ended for peer in machine.pair.peers)


def can_fail(*kinds: type) -> Callable[[Conversations], bool]:
    """Whether such a task could be finished now."""
    return lambda machine: any(isinstance(t.effect, kinds) for p in machine.pair.peers for t in p.ready())


KINDS = st.just(0) | st.integers(0, 9)
VERSIONS = st.none() | st.none() | st.sampled_from([(9, 8), (9, 1)])
HEAD_START = st.integers(0, 56)


class Conversations(RuleBasedStateMachine):
    """One source after the other; each conversation is delivered, disturbed and lied into in any order."""

    pair: Pair

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.memory: dict[int, bytes] = {}
        self.other_source = object()

    def begin(
        self,
        blocks: int,
        kind: int,
        tokens: tuple[bytes | None, bytes | None],
        speaks: tuple[int, int] | None,
        steps: int,
    ) -> None:
        self.weights = Weights(blocks)
        self.kind = list(clients(self.weights))[kind]
        self.connect(self.weights, tokens, speaks)
        self.go_on_for_a_while(steps)

    def connect(
        self, weights: Weights, tokens: tuple[bytes | None, bytes | None], speaks: tuple[int, int] | None
    ) -> None:
        if self.ledger.complete:  # that pull is over: begin another
            self.ledger, self.memory = Ledger(), {}
        terms = clients(self.weights)[self.kind]
        client_token, server_token = tokens
        root = self.ledger.root or terms.root
        options = dataclasses.replace(terms.options, token=client_token)
        self.pair = Pair(
            dataclasses.replace(terms, options=options, root=root, pinned_by="the first source", node="aa"),
            server_terms(token=server_token),
            weights,
            ledger=self.ledger,
            memory=self.memory,
            speaks=speaks,
            upstream=("bb", ("cc",)),
            examines_late=True,
        )
        self.fits = list(clients(self.weights)).index(self.kind) < FITTING
        self.proven = client_token is None if server_token is None else client_token == server_token
        self.fits = self.fits and self.proven and speaks != (9, 8) and root in ("", weights.announcement().root)
        self.disturbed = self.lied_to = self.had_enough = False

    def peer(self, side: str) -> Peer:
        return self.pair.server if side == "server" else self.pair.client

    # --- how it goes when nothing is wrong --------------------------------------------------------------------------

    @precondition(alive)
    @rule(side=SIDES, nbytes=SIZES)
    def deliver(self, side: str, nbytes: int) -> None:
        self.pair.deliver(self.peer(side), nbytes)

    @precondition(alive)
    @rule(side=SIDES, pick=st.integers(0, 9))
    def finish_a_task(self, side: str, pick: int) -> None:
        tasks = self.peer(side).ready()
        if tasks:
            self.peer(side).finish(tasks[pick % len(tasks)])

    @precondition(alive)
    @rule(steps=HEAD_START)
    def go_on_for_a_while(self, steps: int) -> None:
        """Hear, work, hear, work: one side and then the other, stopping anywhere between."""
        for step in range(steps):
            peer = self.pair.peers[step // 2 % 2]
            if step % 2 == 0:
                self.pair.deliver(peer, 1 << 20)
            for task in peer.ready()[: step % 2]:
                peer.finish(task)

    @precondition(alive)
    @rule(side=SIDES, data=st.binary(max_size=4))
    def signal(self, side: str, data: bytes) -> None:
        self.pair.post_signal(self.peer(side), data)

    @precondition(lambda self: self.pair.client.session.state in (State.PLAN, State.TRANSFER))
    @rule()
    def enough(self) -> None:
        """The pull needs nothing more from this source, whatever is under way: no reason for any to fail."""
        self.had_enough = True
        self.pair.client.feed(e.Finished("partial"))

    # --- what may go wrong ------------------------------------------------------------------------------------------

    def fail(self, *kinds: type, pick: int = 0, chosen: frozenset[int] = frozenset()) -> None:
        self.disturbed = True
        found = [(p, t) for p in self.pair.peers for t in p.ready() if isinstance(t.effect, kinds)]
        peer, task = found[pick % len(found)]
        peer.finish(task, ok=False, subset=chosen.__contains__)

    @precondition(can_fail(f.LookUp, f.TakeTurn))
    @rule()
    def turn_away(self) -> None:
        self.fail(f.LookUp, f.TakeTurn)

    @precondition(can_fail(f.Pin))
    @rule()
    def run_out_of_memory(self) -> None:
        self.fail(f.Pin)

    @precondition(can_fail(f.AcceptChannel, f.ConnectChannel, f.SendBlocks))
    @rule(pick=st.integers(0, 1))
    def fail_the_channel(self, pick: int) -> None:
        self.fail(f.AcceptChannel, f.ConnectChannel, f.SendBlocks, pick=pick)

    @precondition(can_fail(f.CheckBlocks))
    @rule(gone=st.frozensets(st.integers(0, 5)))
    def free_blocks(self, gone: frozenset[int]) -> None:
        self.fail(f.CheckBlocks, chosen=frozenset(range(6)) - gone)

    @precondition(can_fail(f.ReceiveBlocks))
    @rule()
    def corrupt_a_block(self) -> None:
        self.fail(f.ReceiveBlocks)

    @precondition(alive)
    @rule(side=SIDES)
    def time_out(self, side: str) -> None:
        self.disturbed = True
        self.pair.time_out(self.peer(side))

    @precondition(alive)
    @rule(side=SIDES)
    def cancel(self, side: str) -> None:
        self.disturbed = True
        self.peer(side).feed(e.Cancelled("stopping", code="gone"))

    @precondition(alive)
    @rule(chain=st.sampled_from([(), ("bb",), ("bb", "aa"), ("cc",) * 40]))
    def change_upstream(self, chain: tuple[str, ...]) -> None:
        self.disturbed = True
        self.pair.change_upstream(chain)

    @precondition(alive)
    @rule()
    def retract(self) -> None:
        self.disturbed = True
        self.pair.server.feed(e.NotHeld("gone", "the weights are being reloaded"))

    @precondition(alive)
    @rule()
    def cut(self) -> None:
        self.disturbed = True
        self.pair.cut()

    @precondition(alive)
    @rule()
    def break_the_channel(self) -> None:
        self.disturbed = True
        self.pair.broken = True

    # --- lies -------------------------------------------------------------------------------------------------------

    def tell(self, to: str, message: Any) -> None:
        """A lie of the peer itself, whose frames are authentic."""
        self.lie(to, encode_frame(message), sealed=True)

    def lie(self, to: str, data: bytes, *, sealed: bool = False) -> None:
        self.disturbed = self.lied_to = True
        # Between two frames, or it would be mere noise.
        pipe = self.peer(to).other.pipe
        self.pair.deliver(self.peer(to), len(pipe))
        data = self.peer(to).other.sealed(data) if sealed else data
        self.peer(to).other.pipe += data
        self.pair.deliver(self.peer(to), len(data))

    @precondition(alive)
    @rule(to=SIDES, message=any_message)
    def say_anything(self, to: str, message: Any) -> None:
        self.tell(to, message)

    @precondition(alive)
    @rule(to=SIDES, said_by=SIDES, pick=st.integers(0, 99))
    def say_again(self, to: str, said_by: str, pick: int) -> None:
        said = self.peer(said_by).said
        if said:
            self.tell(to, said[pick % len(said)])

    @precondition(alive)
    @rule(to=SIDES, ranges=st.sets(st.integers(0, 6), min_size=1, max_size=3), kind=st.sampled_from(["want", "rest"]))
    def name_blocks(self, to: str, ranges: set[int], kind: str) -> None:
        named = tuple((n, n + 1) for n in sorted(ranges))
        if to == "server":
            self.tell(to, m.Want(ranges=named))
        else:
            self.tell(to, m.Grant(ranges=named) if kind == "want" else m.Gone(ranges=named, reason=""))

    @precondition(alive)
    @rule(to=SIDES, message=any_message)
    def inject(self, to: str, message: Any) -> None:
        """Somebody in between says anything."""
        ended = self.peer(to).ended
        keys = self.peer(to).session._ctx.keys
        self.lie(to, encode_frame(message))
        # After noise it may be a part of a frame that is not complete yet.
        if keys is not None and not ended and not self.peer(to).decoder.pending:
            assert self.peer(to).ended, "a frame that is not authentic was obeyed"

    @precondition(alive)
    @rule(to=SIDES, noise=st.binary(min_size=1, max_size=9))
    def noise(self, to: str, noise: bytes) -> None:
        self.lie(to, noise)

    @precondition(lambda self: any(peer.pipe for peer in self.pair.peers))
    @rule(side=SIDES, place=st.integers(0, 4000), bit=st.integers(0, 7))
    def flip_a_bit(self, side: str, place: int, bit: int) -> None:
        pipe = self.peer(side).pipe
        if pipe:
            self.disturbed = self.lied_to = True
            pipe[place % len(pipe)] ^= 1 << bit

    # --- other sources ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.ledger.plan is not None)
    @rule(verifies=st.booleans())
    def another_source_works(self, verifies: bool) -> None:
        taken = self.ledger.in_flight(self.other_source)
        if not taken:
            self.ledger.assign(self.other_source, BLOCK)
            return
        for number in taken if verifies else ():
            self.memory[number] = content = self.truth().content(number)
            self.ledger.received(self.other_source, number)
            self.ledger.verify(self.other_source, number, self.truth().announcement().digests[number * 16 :][:16])
            assert content
        self.ledger.lose(self.other_source)

    def truth(self) -> Weights:
        """The weights that the ledger is pinned to."""
        return next(w for w in self.all_weights() if w.announcement().root == self.ledger.root)

    def all_weights(self) -> list[Weights]:
        return [self.weights, dataclasses.replace(self.weights, salt=b"fine-tuned ")]

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.pair.check()
        for peer in self.pair.peers:
            posted = peer.other.signals_posted
            if not self.lied_to:
                assert peer.signals_delivered == posted[: len(peer.signals_delivered)], "in order, nothing lost"
        if not self.proven:
            assert self.pair.client.session.announcement is None
            assert self.pair.states() != (State.DONE, State.DONE)

    def teardown(self) -> None:
        """However it was left: both sides end, and undisturbed it ends well."""
        if not hasattr(self, "pair"):
            return
        self.ledger.lose(self.other_source)
        complete_before = self.ledger.complete
        self.pair.end()
        self.holds()
        if self.disturbed:
            return
        if self.fits:
            assert self.pair.states() == (State.DONE, State.DONE), [peer.session.error for peer in self.pair.peers]
            excused = self.had_enough or self.pair.client.session.probing or complete_before
            assert self.ledger.complete or excused
        elif not self.pair.client.session.probing and not self.had_enough:
            assert self.pair.states() == (State.FAILED, State.FAILED)


class Welcome(Conversations):
    """Clients that fit and know the token, so that most of it happens late in the conversation."""

    @initialize(blocks=st.integers(1, 5), kind=st.integers(0, 2), token=st.none() | st.just(b"same"), steps=HEAD_START)
    def first_source(self, blocks: int, kind: int, token: bytes | None, steps: int) -> None:
        self.begin(blocks, kind, (token, token), None, steps)

    @precondition(lambda self: not alive(self))
    @rule(steps=HEAD_START)
    def next_source(self, steps: int) -> None:
        self.connect(self.weights, (None, None), None)
        self.go_on_for_a_while(steps)


class Strangers(Conversations):
    """Clients and servers that need not fit, know the token, hold the same weights, or speak the same version."""

    @initialize(blocks=st.integers(1, 5), kind=KINDS, tokens=TOKENS, speaks=VERSIONS, steps=HEAD_START)
    def first_source(
        self,
        blocks: int,
        kind: int,
        tokens: tuple[bytes | None, bytes | None],
        speaks: tuple[int, int] | None,
        steps: int,
    ) -> None:
        self.begin(blocks, kind, tokens, speaks, steps)

    @precondition(lambda self: not alive(self))
    @rule(same=st.booleans(), tokens=TOKENS, steps=HEAD_START)
    def next_source(self, same: bool, tokens: tuple[bytes | None, bytes | None], steps: int) -> None:
        self.connect(self.all_weights()[0 if same else 1], tokens, None)
        self.go_on_for_a_while(steps)


TestWelcome = Welcome.TestCase
TestWelcome.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=60)

TestStrangers = Strangers.TestCase
TestStrangers.settings = settings(stateful_step_count=30)
