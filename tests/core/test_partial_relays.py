"""Relays that have some blocks: how long they wait for their clients, and what they may tell them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from netloader.core import messages as m
from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.ledger import Ledger
from netloader.core.options import PullOptions, Timings
from netloader.core.plan import mask_of, ranges_of, to_ranges
from netloader.core.protocol import State, transfer
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.pull import Pull
from netloader.core.sources import Source
from netloader.errors import RemoteProtocolError
from tests.core.pair import Pair, client_terms, server_terms
from tests.core.pull_world import announcement
from tests.core.stories import SAME, deadline_of, error_of, go_on_until, say, until_transfer

STALL = Timings().stall


def parked(*, partial: bool) -> Pair:
    """A client that has nothing to ask for, at a relay."""
    ledger = Ledger()
    pair = Pair(client_terms(SAME), server_terms(), ledger=ledger)
    pair.upstream = ("ab", (), partial)  # type: ignore[assignment]
    go_on_until(pair, lambda: ledger.plan is not None)
    ledger.assign("another session", 1 << 20)
    pair.drain()
    assert pair.states() == (State.TRANSFER, State.TRANSFER)
    return pair


def test_a_client_that_waits_for_a_relay_to_get_more_blocks_has_no_deadline_on_either_side() -> None:
    assert deadline_of(parked(partial=False).server) == STALL
    pair = parked(partial=True)
    pair.server.feed(e.BlocksOffered(has=((0, 2),)))
    pair.drain()
    assert deadline_of(pair.server) is None
    assert deadline_of(pair.client) is None
    pair.server.feed(e.BlocksOffered(has=((3, 4),), sent=((0, 1),)))
    assert deadline_of(pair.server) is None
    pair.server.feed(e.BlocksOffered(has=((2, 3),)))
    assert deadline_of(pair.server) == STALL, "the relay has every block now"
    pair.ledger.lose("another session")
    pair.end()
    assert pair.states() == (State.DONE, State.DONE)


def test_a_relay_that_is_still_pulling_sets_no_deadline_when_it_has_sent_what_was_asked() -> None:
    pair = Pair(client_terms(SAME), server_terms())
    pair.upstream = ("ab", (), True)  # type: ignore[assignment]
    go_on_until(pair, lambda: any(isinstance(x, f.SendBlocks) for x in pair.server.effects))
    while sending := [t for t in pair.server.ready() if isinstance(t.effect, f.SendBlocks)]:
        pair.server.finish(sending[0])
    assert not pair.server.session.asked
    assert deadline_of(pair.server) is None


@pytest.mark.parametrize("named", [{"has": ((0, 2),)}, {"sent": ((0, 2),)}])
def test_progress_has_to_name_a_block_that_was_not_named_before(named: dict[str, Any]) -> None:
    pair = until_transfer()
    say(pair.client, m.Progress(**named))
    say(pair.client, m.Progress(**dict.fromkeys(named, ((1, 3),))))
    assert pair.client.session.state is State.TRANSFER
    say(pair.client, m.Progress(**dict.fromkeys(named, ((0, 1), (2, 3)))))
    error_of(pair.client, RemoteProtocolError, "names no block that it had not named before")
    pair = until_transfer()
    say(pair.client, m.Progress())
    error_of(pair.client, RemoteProtocolError, "names no block that it had not named before")


def test_progress_is_taken_without_a_number_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = until_transfer()
    monkeypatch.setattr(transfer, "expand", None)
    say(pair.client, m.Progress(has=((0, 4),)))
    assert pair.client.session.state is State.TRANSFER
    say(pair.client, m.Progress(has=((0, 5),)))
    error_of(pair.client, RemoteProtocolError, "there are 4 blocks")


# --- masks ----------------------------------------------------------------------------------------------------------


class Counted(int):
    """A number that fails when it is used as often as it has blocks."""

    def __and__(self, other: int) -> int:
        raise AssertionError("an operation on the whole number for each of its blocks")

    __xor__ = __sub__ = __rshift__ = __neg__ = __and__  # type: ignore[assignment]


def test_ranges_are_made_without_an_operation_on_the_whole_mask_for_each_block() -> None:
    many = 300_000
    assert ranges_of(Counted((1 << many) - 1)) == ((0, many),)
    every_other = tuple((number, number + 1) for number in range(0, many, 2))
    assert ranges_of(Counted(mask_of(every_other))) == every_other
    assert ranges_of(0) == ()


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_those_of_their_blocks(seed: int) -> None:
    rng = random.Random(seed)
    blocks = {rng.randrange(1 + seed * 9) for _ in range(seed * 5)}
    assert mask_of(to_ranges(blocks)) == sum(1 << number for number in blocks)
    assert ranges_of(mask_of(to_ranges(blocks))) == to_ranges(blocks)


# --- sources that have nothing new ----------------------------------------------------------------------------------


def starved_at(count: int) -> tuple[Pull, list[int]]:
    """A pull with sessions at `count` relays that have nothing; one more source is known."""
    sources = [Source(Address(f"10.0.0.{n}", 1)) for n in range(count + 1)]
    pull = Pull(sources, PullOptions(stripe=count, wait=60.0), random.Random(1), listing=10.0)
    known, opened = announcement(8), list[int]()
    todo = [c.session for c in pull.begin(0.0) if isinstance(c, p.Connect)]
    while todo:
        opened.append(number := todo.pop(0))
        for event in (
            p.SessionStarted(number),
            p.HoldingAnnounced(number, known, partial=True),
            p.SessionReady(number),
            p.SessionIdle(number),
        ):
            todo += [c.session for c in pull.handle(event, 0.0) if isinstance(c, p.Connect)]
    assert len(opened) == count
    return pull, opened


def test_one_source_is_left_for_one_that_is_spare() -> None:
    pull, opened = starved_at(4)
    due = pull.wake_at(0.0)
    assert due is not None
    (left,) = pull.handle(p.TimerFired(), due)
    assert isinstance(left, p.Finish)
    later = pull.wake_at(due)
    assert later is None or later > due, "the timer is not due at once again"
    assert pull.handle(p.TimerFired(), due + 1.0) == []
    commands = pull.handle(p.SessionEnded(left.session), due + 1.0)
    assert [c for c in commands if isinstance(c, p.Connect)], "the spare source takes its place"
    assert not [c for c in commands if isinstance(c, p.Finish)]
    assert left.session in opened


def test_a_source_that_was_left_for_another_one_is_tried_again_when_that_one_has_nothing_either() -> None:
    """Neither says anything from now on. One of them may have got what is missing."""
    pull, _ = starved_at(1)
    now, tried = 0.0, []
    for _ in range(6):
        due = pull.wake_at(now)
        assert due is not None, "the pull does not stay with a source that is silent"
        assert due - now > 1.9
        now = due
        (left,) = pull.handle(p.TimerFired(), now)
        assert isinstance(left, p.Finish)
        commands, now = pull.handle(p.SessionEnded(left.session), now), now + 0.1
        (again,) = [c for c in commands if isinstance(c, p.Connect)]
        tried.append(again.source)
        for event in (
            p.SessionStarted(again.session),
            p.HoldingAnnounced(again.session, announcement(8), partial=True),
            p.SessionReady(again.session),
            p.SessionIdle(again.session),
        ):
            assert not [c for c in pull.handle(event, now) if isinstance(c, p.Connect)]
    assert set(tried[::2]).isdisjoint(tried[1::2])
