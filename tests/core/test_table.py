"""The table of legal moves: every pair of state and event is in it or ends in FAILED, with the reason."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core import messages as m
from netloader.core.protocol import FINAL, TABLE, Session, Side, State, finalize
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.table import LATE
from netloader.errors import LocalProtocolError, NetloaderError, PeerLost, RemoteProtocolError, TransportError
from tests.core.pair import Pair, Weights, client_terms, server_terms, snapshots
from tests.core.strategies import codes, message_strategies, ranges, short_text, sources

LOCAL_KINDS, CLIENT_KINDS = get_args(e.LocalEvent), get_args(m.ClientMessage)
SERVER_KINDS = get_args(m.ServerMessage)
HEARD = {Side.SERVER: CLIENT_KINDS, Side.CLIENT: SERVER_KINDS}

KINDS: tuple[type, ...] = tuple(dict.fromkeys((*LOCAL_KINDS, *CLIENT_KINDS, *SERVER_KINDS)))

blocks = ranges(5, min_size=1)
signals = st.binary(max_size=4)

local_strategies: dict[type, st.SearchStrategy[Any]] = {
    e.Connected: st.builds(e.Connected, st.sampled_from([b"s" * 16, b""])),
    e.ConnectionLost: st.builds(e.ConnectionLost, short_text),
    e.Failed: st.builds(e.Failed, st.sampled_from([RemoteProtocolError("noise"), NetloaderError("a fault")])),
    e.WorkFailed: st.builds(
        e.WorkFailed,
        st.sampled_from([NetloaderError("no memory"), TransportError("broken"), PeerLost("gone")]),
    ),
    e.TimedOut: st.just(e.TimedOut()),
    e.Cancelled: st.builds(e.Cancelled, short_text, codes | st.just("done")),
    e.Held: st.builds(e.Held, st.sampled_from([Weights(), Weights(0), Weights(2, b"x")]).map(Weights.announcement)),
    e.NotHeld: st.builds(e.NotHeld, codes, short_text, short_text, st.none() | st.floats(-1, 1e9), sources),
    e.Queued: st.builds(e.Queued, short_text | st.just("x" * 10_000), st.integers(0, 9)),
    e.TurnTaken: st.builds(e.TurnTaken, st.just(""), st.just(())),
    e.UpstreamChanged: st.builds(e.UpstreamChanged, st.just(("ab",))),
    e.BlocksOffered: st.builds(e.BlocksOffered, blocks, blocks),
    e.Examined: st.builds(e.Examined, st.just(Weights(3).announcement())),
    e.Pinned: st.just(e.Pinned()),
    e.ChannelOffered: st.builds(e.ChannelOffered, signals),
    e.SignalPosted: st.builds(e.SignalPosted, signals),
    e.ChannelOpened: st.just(e.ChannelOpened()),
    e.ChannelDown: st.just(e.ChannelDown()),
    e.BlocksReady: st.builds(e.BlocksReady, blocks),
    e.BlocksGone: st.builds(e.BlocksGone, blocks, short_text | st.just("x" * 10_000), sources),
    e.BlocksSent: st.builds(e.BlocksSent, blocks),
    e.BlocksWanted: st.builds(e.BlocksWanted, blocks),
    e.BlocksReceived: st.builds(e.BlocksReceived, blocks),
    e.Finished: st.builds(e.Finished, st.sampled_from(get_args(m.Outcome)), st.integers(0, 9)),
}

strategies: dict[type, st.SearchStrategy[Any]] = {**local_strategies, **message_strategies}


@cache
def moments() -> tuple[Session, ...]:
    """Sessions at every moment of a few conversations that go well."""
    conversations = [
        Pair(client_terms(Weights(3)), server_terms(), Weights(3), examines_late=True),
        Pair(client_terms(token=b"t"), server_terms(token=b"t"), Weights(1)),
        Pair(client_terms(probe=True), server_terms()),
    ]
    fresh = [Session(Side.SERVER, server=server_terms()), Session(Side.CLIENT, client=client_terms())]
    taken: dict[tuple[int, Side, int], Session] = {}
    for number, pair in enumerate(conversations):
        for side, session in snapshots(pair):
            moves = len(session.story)
            if (number, side, moves) not in taken:
                taken[number, side, moves] = copy.deepcopy(session)
    return (*fresh, *taken.values(), *(peer.session for pair in conversations for peer in pair.peers))


def allowed(row: tuple[Side, State, type]) -> set[State]:
    """Where a row may lead: any row may fail for a reason."""
    return {TABLE[row][1], State.FAILED} if row in TABLE else {State.FAILED}


def check(session: Session, event: Any) -> None:
    """Feed `event` to a copy of `session` and check what must follow."""
    session = copy.deepcopy(session)
    before = session.state
    row = (session.side, before, type(event))
    effects = session.handle(event)
    session.check_invariants()
    if before in FINAL:
        assert (effects, session.state) == ((), before)
        return
    assert session.state in allowed(row)
    assert session.story[-1] == f"{before.name} + {type(event).__name__} -> {session.state.name}"
    closes = [effect for effect in effects if isinstance(effect, f.Close)]
    assert len(closes) == (session.state in FINAL)
    assert session.state not in FINAL or isinstance(effects[-1], f.Close), "Close is the last word"
    error = session.error
    assert (error is not None) == (session.state is State.FAILED)
    if error is None:
        return
    assert error.hint
    assert error.story == session.story
    assert error.message or isinstance(event, e.NotHeld), "the reason of our own side is its own business"
    if row not in TABLE:
        assert type(event).__name__ in error.message
        assert isinstance(error, RemoteProtocolError if isinstance(event, m.Wire) else LocalProtocolError)
    if isinstance(event, m.Wire) and session._ctx.nonce:
        assert not isinstance(error, LocalProtocolError), "a peer's message is never our own mistake"


def test_every_event_and_message_has_a_strategy() -> None:
    assert set(local_strategies) == set(LOCAL_KINDS)
    assert set(KINDS) == set(strategies)


def test_every_state_has_snapshots() -> None:
    seen = {(session.side, session.state) for session in moments()}
    assert seen == {(side, state) for side in Side for state in State if state is not State.FAILED}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_pair_is_legal_or_fails_with_the_reason(kind: type, data: st.DataObject) -> None:
    check(data.draw(st.sampled_from(moments())), data.draw(strategies[kind]))


def test_every_event_in_every_snapshot() -> None:
    """The same without chance, with one event of each kind."""
    for kind in KINDS:
        event = EXAMPLES[kind]
        for session in moments():
            check(session, event)


@given(session=st.sampled_from(moments()), data=st.data())
@example(session=moments()[0], data=None)
def test_any_sequence_of_events_keeps_to_the_table(session: Session, data: st.DataObject | None) -> None:
    session = copy.deepcopy(session)
    kinds = [] if data is None else data.draw(st.lists(st.sampled_from(KINDS), max_size=12))
    for kind in kinds:
        assert data is not None
        event = data.draw(strategies[kind])
        if session.state in FINAL:
            assert session.handle(event) == ()
            continue
        check(session, event)
        session.handle(event)


def test_only_late_events_are_ignored_in_finalize() -> None:
    for side in Side:
        rows = {
            (state, kind) for (s, state, kind), (handler, _) in TABLE.items() if s is side and handler is finalize.late
        }
        assert rows == {(State.FINALIZE, kind) for kind in LATE[side]}


@pytest.mark.parametrize("error", [NetloaderError("no memory"), TransportError("broken")])
def test_failed_work_matters_until_finalize_and_any_other_failure_in_every_state(error: NetloaderError) -> None:
    for session in moments():
        if session.state in FINAL:
            continue
        for event in (e.WorkFailed(error), e.Failed(error)):
            copied = copy.deepcopy(session)
            copied.handle(event)
            late = session.state is State.FINALIZE and isinstance(event, e.WorkFailed)
            assert copied.error is (None if late else error)


def test_final_states_have_no_rows() -> None:
    assert not [row for row in TABLE if row[1] in FINAL]


def test_every_state_is_reachable_on_either_side() -> None:
    for side in Side:
        reached = {State.LISTEN}
        while (
            more := {after for (s, state, _), (_, after) in TABLE.items() if s is side and state in reached} - reached
        ):
            reached |= more
        assert reached == set(State)


def test_no_row_handles_a_message_that_its_side_never_receives() -> None:
    heard = [(side, kind) for side, _, kind in TABLE if issubclass(kind, m.Wire)]
    assert all(kind in HEARD[side] for side, kind in heard)
    for side, kinds in HEARD.items():
        assert {kind for s, kind in heard if s is side} == set(kinds), "each message is legal somewhere"


def test_every_local_event_is_legal_somewhere() -> None:
    assert {kind for _, _, kind in TABLE if not issubclass(kind, m.Wire)} == set(LOCAL_KINDS)


def test_whatever_the_state_a_session_can_be_ended() -> None:
    for side in Side:
        for state in State:
            for kind in (e.ConnectionLost, e.TimedOut, e.Cancelled, e.Failed):
                assert state in FINAL or (side, state, kind) in TABLE


def test_states_only_move_forward() -> None:
    order = list(State)
    assert all(order.index(before) <= order.index(after) for (_, before, _), (_, after) in TABLE.items())


def test_every_row_is_reached() -> None:
    """Each row is taken at some moment of some conversation, to the state that it names."""
    taken: set[tuple[Side, State, type]] = set()
    for session in moments():
        for kind in KINDS:
            row = (session.side, session.state, kind)
            if row in TABLE and row not in taken:
                for event in (EXAMPLES[kind], *variants(session, kind)):
                    copied = copy.deepcopy(session)
                    copied.handle(event)
                    if copied.state is TABLE[row][1] and (copied.state is not State.FAILED or copied.error):
                        taken.add(row)
    assert [f"{s.value} {b.name} {k.__name__}" for s, b, k in TABLE if (s, b, k) not in taken] == []


def variants(session: Session, kind: type) -> list[Any]:
    """Events of `kind` that suit the session, where any other one would be refused."""
    known = session.announcement or Weights(3).announcement()
    open_blocks = sorted(session._ctx.open_blocks)
    granted = sorted(session._ctx.granted)
    asked = tuple((n, n + 1) for n in open_blocks if n not in granted)
    moving = tuple((n, n + 1) for n in granted)
    fresh = tuple((n, n + 1) for n in range(len(known.plan.blocks)) if n not in {*open_blocks, *granted})
    suited: dict[type, list[Any]] = {
        m.Hello: [m.Hello(protocol=1, nonce=b"c" * 16)],
        m.Welcome: [m.Welcome(protocol=1, nonce=b"s" * 16)],
        m.Identify: [m.Identify(layouts=("raw",))],
        m.Accepted: [m.Accepted(identity=known.identity)],
        m.Announce: [
            m.Announce(
                manifest=known.manifest,
                block_bytes=known.plan.block_bytes,
                algorithm=known.algorithm,
                digests=known.digests,
                root=known.root,
                plan=known.plan.digest,
            )
        ],
        m.Agree: [m.Agree(plan=known.plan.digest, transport="memory")],
        m.ChannelOffer: [m.ChannelOffer(transport="memory", offer=b"")],
        m.Want: [m.Want(ranges=fresh)],
        m.Grant: [m.Grant(ranges=asked)],
        m.Gone: [m.Gone(ranges=asked, reason="")],
        e.BlocksReady: [e.BlocksReady(asked)],
        e.BlocksGone: [e.BlocksGone(asked, "")],
        e.BlocksSent: [e.BlocksSent(moving)],
        e.BlocksWanted: [e.BlocksWanted(fresh)],
        e.BlocksReceived: [e.BlocksReceived(moving)],
    }
    return suited.get(kind, [])


EXAMPLES: dict[type, Any] = {
    e.Connected: e.Connected(b"s" * 16),
    e.ConnectionLost: e.ConnectionLost("cut"),
    e.Failed: e.Failed(RemoteProtocolError("noise")),
    e.WorkFailed: e.WorkFailed(PeerLost("gone")),
    e.TimedOut: e.TimedOut(),
    e.Cancelled: e.Cancelled("stopping"),
    e.Held: e.Held(Weights(3).announcement()),
    e.NotHeld: e.NotHeld("gone", "freed"),
    e.Queued: e.Queued("others", 1),
    e.TurnTaken: e.TurnTaken(),
    e.UpstreamChanged: e.UpstreamChanged(("ab",)),
    e.BlocksOffered: e.BlocksOffered(((0, 1),)),
    e.Examined: e.Examined(Weights(3).announcement()),
    e.Pinned: e.Pinned(),
    e.ChannelOffered: e.ChannelOffered(b""),
    e.SignalPosted: e.SignalPosted(b""),
    e.ChannelOpened: e.ChannelOpened(),
    e.ChannelDown: e.ChannelDown(),
    e.BlocksReady: e.BlocksReady(((0, 1),)),
    e.BlocksGone: e.BlocksGone(((0, 1),), "freed"),
    e.BlocksSent: e.BlocksSent(((0, 1),)),
    e.BlocksWanted: e.BlocksWanted(((0, 1),)),
    e.BlocksReceived: e.BlocksReceived(((0, 1),)),
    e.Finished: e.Finished("partial"),
    m.Hello: m.Hello(protocol=1, nonce=b"c" * 16),
    m.Welcome: m.Welcome(protocol=1, nonce=b"s" * 16),
    m.Identify: m.Identify(),
    m.Waiting: m.Waiting(reason="others"),
    m.Accepted: m.Accepted(identity=Weights().identity),
    m.Announce: m.Announce(block_bytes=1024, algorithm="", digests=b"", root="", plan=""),
    m.Agree: m.Agree(plan="", transport=""),
    m.ChannelOffer: m.ChannelOffer(transport="", offer=b""),
    m.Signal: m.Signal(data=b""),
    m.Want: m.Want(ranges=()),
    m.Grant: m.Grant(ranges=()),
    m.Gone: m.Gone(ranges=(), reason=""),
    m.Upstream: m.Upstream(),
    m.Progress: m.Progress(has=((0, 1),)),
    m.Verdict: m.Verdict(outcome="partial"),
    m.Refusal: m.Refusal(code="gone", message=""),
    m.Goodbye: m.Goodbye(),
}
