"""Two sessions of which one breaks the rules, is silent, or gives up: what that ends in and what is said about it."""

from __future__ import annotations

import dataclasses

import pytest

from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.core.ledger import Ledger
from netloader.core.options import Timings
from netloader.core.plan import expand
from netloader.core.protocol import State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.errors import (
    DigestMismatch,
    NetloaderError,
    RefusedError,
    RemoteProtocolError,
    TransferTimeout,
)
from tests.core.pair import Pair, Weights, client_terms, run, server_terms
from tests.core.stories import (
    SAME,
    code_of,
    deadline_of,
    error_of,
    go_on_until,
    in_state,
    say,
    until_transfer,
)

# --- who breaks the rules -------------------------------------------------------------------------------------------


def test_a_client_that_identifies_itself_twice_takes_one_turn() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, lambda: any(isinstance(t.effect, f.TakeTurn) for t in pair.server.tasks))
    say(pair.server, m.Identify())
    error_of(pair.server, RemoteProtocolError, "twice")
    assert len([x for x in pair.server.effects if isinstance(x, f.TakeTurn)]) == 1


def test_a_client_that_only_looks_is_not_redirected_whatever_its_options() -> None:
    for probe in (False, True):
        pair = run(Pair(client_terms(probe=probe, follow=True), server_terms()))
        identify = pair.server.session._ctx.identify
        assert identify is not None
        assert identify.follow is not probe


def test_a_probe_cannot_turn_into_a_pull() -> None:
    pair = Pair(client_terms(dataclasses.replace(SAME, identity=ModelIdentity(model="n")), probe=True), server_terms())
    go_on_until(pair, in_state(pair.server, State.PLAN))
    say(pair.server, m.Agree(plan=pair.announcement.plan.digest, transport="memory"))
    error_of(pair.server, RemoteProtocolError, "asked for a channel in a probe")


@pytest.mark.parametrize(
    ("agree", "code"),
    [
        ({"plan": "ab" * 32}, "plan"),
        ({"transport": "pigeon"}, "transport"),
        ({"transport": ""}, "transport"),
    ],
)
def test_an_agreement_to_something_else_is_refused(agree: dict[str, str], code: str) -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.server, State.PLAN))
    say(pair.server, m.Agree(**{"plan": pair.announcement.plan.digest, "transport": "memory", **agree}))
    assert code_of(pair.server) == code


def test_a_server_may_announce_and_offer_once() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, lambda: any(isinstance(said, m.Agree) for said in pair.client.said))
    (announce,) = [said for said in pair.server.said if isinstance(said, m.Announce)]
    say(pair.client, announce)
    error_of(pair.client, RemoteProtocolError, "sent Announce twice")
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, lambda: any(isinstance(x, f.ConnectChannel) for x in pair.client.effects))
    say(pair.client, m.ChannelOffer(transport="memory", offer=b"again"))
    error_of(pair.client, RemoteProtocolError, "sent ChannelOffer twice")


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ((), "names no block"),
        (((0, 5),), "there are 4 blocks"),
        (((2, 2),), "range 2..2"),
        (((3, 1),), "range 3..1"),
        (((0, 2), (1, 3)), "range 1..3"),
        (((2, 3), (0, 1)), "range 0..1"),
    ],
)
def test_invalid_ranges(ranges: tuple[tuple[int, int], ...], says: str) -> None:
    for side, message in (
        ("server", m.Want(ranges=ranges)),
        ("client", m.Grant(ranges=ranges)),
        ("client", m.Gone(ranges=ranges, reason="")),
    ):
        pair = until_transfer()
        peer = pair.server if side == "server" else pair.client
        say(peer, message)
        error_of(peer, RemoteProtocolError, says)


def test_a_client_may_not_ask_twice_or_for_too_much() -> None:
    pair = until_transfer()
    go_on_until(pair, lambda: any(isinstance(w, m.Want) for w in pair.server.heard))
    (first, *_) = [w for w in pair.server.heard if isinstance(w, m.Want)]
    say(pair.server, first)
    error_of(pair.server, RemoteProtocolError, "already waiting for")
    pair = Pair(client_terms(SAME), server_terms(max_open_blocks=1))
    pair.end()
    error_of(pair.server, RemoteProtocolError, "more than 1 blocks")


def test_a_server_may_only_answer_what_was_asked() -> None:
    for answer in (m.Grant(ranges=((3, 4),)), m.Gone(ranges=((3, 4),), reason="")):
        pair = until_transfer()
        say(pair.client, answer)
        error_of(pair.client, RemoteProtocolError, "not requested: [3]")


def test_a_signal_before_a_transport_is_chosen_is_refused() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.server, State.PLAN))
    say(pair.server, m.Signal(data=b"x"))
    error_of(pair.server, RemoteProtocolError, "before a transport was chosen")


def test_a_corrupted_block_ends_the_session_and_names_block_and_tensor() -> None:
    pair = until_transfer()
    go_on_until(pair, lambda: any(isinstance(t.effect, f.ReceiveBlocks) for t in pair.client.ready()))
    (task,) = [t for t in pair.client.ready() if isinstance(t.effect, f.ReceiveBlocks)]
    pair.client.finish(task, ok=False)
    error = error_of(pair.client, DigestMismatch, "block 0 (w)")
    assert error.story
    pair.end()
    assert pair.server.session.state is State.FAILED


@pytest.mark.parametrize("side", ["server", "client"])
def test_invalid_bytes_end_the_session_and_the_peer_is_told(side: str) -> None:
    pair = until_transfer()
    peer = pair.server if side == "server" else pair.client
    pair.deliver(peer, 1 << 20)
    peer.other.pipe += b"\x00\x00\x00\x01\xc1"
    pair.deliver(peer, 1 << 20)
    error_of(peer, RemoteProtocolError, "no valid message")
    pair.end()
    assert code_of(peer.other) == "protocol"


# --- deadlines, losses, giving up -----------------------------------------------------------------------------------


def test_each_timeout_names_the_deadline_and_the_last_transition() -> None:
    timings = Timings(hello=1, validate=2, plan=3, stall=4, finalize=5)
    pair = Pair(client_terms(SAME, timings=timings), server_terms(timings=timings))
    pair.time_out(pair.server)
    error_of(
        pair.server, TransferTimeout, "did not answer within 1 s; the last transition was LISTEN + Connected -> LISTEN"
    )
    pair.end()
    assert code_of(pair.client) == "timeout"


def test_a_client_that_waits_for_other_sessions_has_no_deadline() -> None:
    ledger = Ledger()
    pair = Pair(client_terms(SAME), server_terms(), ledger=ledger)
    go_on_until(pair, lambda: ledger.plan is not None)
    ledger.assign("another session", 1 << 20)
    pair.drain()
    assert pair.client.session.state is State.TRANSFER
    assert pair.client.deadline is None
    ledger.lose("another session")
    pair.end()
    assert pair.states() == (State.DONE, State.DONE)


def test_a_client_whose_requests_were_all_declined_has_no_deadline() -> None:
    pair = until_transfer()
    go_on_until(pair, lambda: any(isinstance(t.effect, f.CheckBlocks) for t in pair.server.tasks))
    pair.ledger.assign("another session", 1 << 20)
    while checks := [t for t in pair.server.tasks if isinstance(t.effect, f.CheckBlocks)]:
        pair.server.finish(checks[0], ok=False, subset=lambda _: False)
    assert pair.client.deadline == Timings().stall
    pair.deliver(pair.client, 1 << 20)
    assert any(isinstance(x, f.ReturnBlocks) for x in pair.client.effects)
    assert pair.client.session.state is State.TRANSFER
    assert pair.client.deadline is None


def test_a_client_that_holds_a_turn_and_asks_for_nothing_has_a_deadline() -> None:
    ledger = Ledger()
    pair = Pair(client_terms(SAME), server_terms(), ledger=ledger)
    go_on_until(pair, lambda: ledger.plan is not None)
    ledger.assign("another session", 1 << 20)
    pair.drain()
    assert pair.server.deadline == Timings().stall
    ledger.lose("another session")
    go_on_until(pair, lambda: any(isinstance(x, f.SendBlocks) for x in pair.server.effects))
    assert deadline_of(pair.server) is None, "while blocks move, the channel watches"
    for task in [t for t in pair.server.ready() if isinstance(t.effect, f.SendBlocks)]:
        pair.server.finish(task)
    assert deadline_of(pair.server) == Timings().stall
    pair.time_out(pair.server)
    error_of(pair.server, TransferTimeout, "30 s")


def test_a_refusal_or_a_goodbye_is_not_answered() -> None:
    for last in (m.Refusal(code="gone", message="freed"), m.Goodbye(code="gone", reason="freed")):
        pair = until_transfer()
        before = len(pair.client.said)
        say(pair.client, last)
        assert code_of(pair.client) == "gone"
        assert pair.client.said[before:] == []


def test_a_session_with_a_silent_server_is_ended() -> None:
    pair = until_transfer()
    go_on_until(pair, lambda: any(isinstance(w, m.Want) for w in pair.client.said))
    assert pair.client.deadline is not None
    pair.time_out(pair.client)
    error_of(pair.client, TransferTimeout, "30 s")


def test_the_code_that_the_peer_gets_when_this_side_stops() -> None:
    pair = until_transfer()
    pair.server.feed(e.Cancelled("the server is stopping", code="gone"))
    pair.end()
    assert code_of(pair.client) == "gone"
    assert "the server is stopping" in str(pair.client.session.error)


def test_retracting_names_other_sources_and_a_pause() -> None:
    pair = until_transfer()
    pair.server.feed(e.NotHeld("gone", "reloading", retry_after=1e9, sources=("h:1", "x" * 1000)))
    (refusal,) = [said for said in pair.server.said if isinstance(said, m.Refusal)]
    assert (refusal.retry_after, refusal.sources) == (m.MAX_SECONDS, ("h:1",))
    pair.end()
    error = error_of(pair.client, RefusedError, "reloading")
    assert isinstance(error, RefusedError)
    assert error.retry_after == m.MAX_SECONDS


def test_a_verdict_before_the_servers_end_of_the_channel_is_open_drops_early_requests() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    go_on_until(pair, in_state(pair.client, State.TRANSFER))
    assert pair.states() == (State.PLAN, State.TRANSFER)
    for task in [t for t in pair.client.tasks if isinstance(t.effect, f.AskForWork)]:
        pair.client.finish(task)
    pair.deliver(pair.server, 1 << 20)
    pair.client.feed(e.Finished("partial"))
    pair.deliver(pair.server, 1 << 20)
    assert pair.states() == (State.FINALIZE, State.FINALIZE)
    pair.end()
    assert pair.states() == (State.DONE, State.DONE)


def test_many_ranges_are_cut_into_messages_that_fit() -> None:
    blocks = 3 * m.MAX_RANGES
    weights = Weights(blocks)
    pair = Pair(client_terms(weights), server_terms(), weights)
    go_on_until(pair, lambda: pair.states() == (State.TRANSFER, State.TRANSFER))
    pair.client.tasks.clear()
    pair.server.tasks.clear()
    every_second = tuple((n, n + 1) for n in range(0, blocks, 2))
    pair.ledger.assign(pair.client.session, 1 << 40)
    pair.client.feed(e.BlocksWanted(every_second))
    wants = [said for said in pair.client.said if isinstance(said, m.Want)]
    assert [len(w.ranges) for w in wants] == [m.MAX_RANGES, m.MAX_RANGES // 2]
    pair.deliver(pair.server, 1 << 30)
    pair.server.feed(e.BlocksGone(every_second[:5000], "x" * 10_000))
    pair.server.feed(e.BlocksReady(every_second[5000:]))
    pair.deliver(pair.client, 1 << 30)
    assert pair.client.session.error is None
    assert sum(len(expand(r.ranges)) for r in pair.client.effects if isinstance(r, f.ReturnBlocks)) == 5000


def test_every_error_reaches_the_peer_as_text_that_fits() -> None:
    pair = until_transfer()
    pair.client.feed(e.WorkFailed(NetloaderError("half \udcff" + "x" * 100_000)))
    (goodbye,) = [said for said in pair.client.said if isinstance(said, m.Goodbye)]
    assert len(goodbye.reason) <= m.MAX_TEXT
    pair.end()
    assert pair.server.session.state is State.FAILED


def test_a_refusal_without_a_reason_is_still_explained() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    say(pair.client, m.Refusal(code="busy", message=""))
    assert "refused (busy)" in error_of(pair.client).message


def test_secrets_are_in_no_repr() -> None:
    assert "hush" not in repr(client_terms(token=b"hush"))
    assert "hush" not in repr(server_terms(token=b"hush"))
