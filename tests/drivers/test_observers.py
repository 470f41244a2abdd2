"""Events that observers of both sides get over real sockets: their order, and that they add up to the report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from netloader.client.pull import pull_from
from netloader.core.addresses import Address
from netloader.core.options import PullOptions
from netloader.core.report import PullReport
from netloader.core.sources import Source
from netloader.discovery import FixedSources
from netloader.errors import NoSourceLeft, PeerLost, RefusedError
from netloader.observe import (
    BlocksVerified,
    Event,
    Observer,
    Observers,
    PhaseEnded,
    PullBegan,
    PullEnded,
    ServingStarted,
    ServingStopped,
    SessionBegan,
    SessionEnded,
    SourceChosen,
    SourceLeft,
    TransportChosen,
)
from netloader.tensors import destination, digest_of
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import kit

HUB = kit.Hub()
WEIGHTS = kit.weights()
HOLDING = kit.held(WEIGHTS)
NOBODY = Address("127.0.0.1", 9)


async def pull(sources: Sequence[Source], observers: Sequence[Observer], **options: Any) -> PullReport:
    chosen = PullOptions(**{"timeout": kit.PATIENCE, "timings": kit.CALM, **options})
    filled, found = destination(kit.blank(WEIGHTS)), FixedSources(sources)
    return await pull_from(filled, kit.IDENTITY, found, [HUB.transport], digest_of, chosen, observers=observers)


def order_of(events: Sequence[Event]) -> list[str]:
    """The order of events; the same event several times in a row is listed once."""
    names = [event.phase if isinstance(event, PhaseEnded) else type(event).__name__ for event in events]
    return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


def phases(events: Sequence[Event]) -> dict[str, float]:
    total = Counter[str]()
    for event in events:
        if isinstance(event, PhaseEnded):
            total[event.phase] += event.seconds  # type: ignore[assignment]
    return dict(total)


async def test_observers_of_both_sides_get_the_events_of_a_pull_in_order_and_they_add_up_to_the_report() -> None:
    ours: list[Event] = []
    theirs: list[Event] = []
    held = Faults([Fault(FaultKind.HOLD, 20)])  # so that blocks are reported in several events

    def note(event: Event) -> None:
        ours.append(event)
        if isinstance(event, BlocksVerified):
            held.release()

    async with kit.serving(FaultyTransport(HUB.transport, held), HOLDING, observers=[theirs.append]) as server:
        address = str(kit.at(server))
        report = await pull([Source(kit.at(server), {"zone": "a"})], [note])
        await kit.until(lambda: server.ended)
    assert order_of(ours) == [
        *("PullBegan", "SourceChosen", "SessionBegan", "connect", "validate", "plan", "TransportChosen"),
        *("BlocksVerified", "transfer", "finalize", "verify", "SessionEnded", "SourceLeft", "PullEnded"),
    ]
    assert order_of(theirs) == [
        *("ServingStarted", "SessionBegan", "connect", "validate", "plan", "TransportChosen"),
        *("BlocksSent", "transfer", "finalize", "SessionEnded", "ServingStopped"),
    ]
    assert ours[:3] == [
        PullBegan("target"),
        SourceChosen(1, address, {"zone": "a"}),
        SessionBegan("client", 1, address),
    ]
    assert ours[-1] == PullEnded(report.seconds, report, role="target")
    spent = phases(ours)
    assert {name: spent.get(name, 0.0) for name in report.phases.as_dict()} == pytest.approx(report.phases.as_dict())
    came = [event for event in ours if isinstance(event, BlocksVerified)]
    assert len(came) > 1
    assert (sum(e.blocks for e in came), sum(e.nbytes for e in came)) == (report.blocks, report.nbytes)
    assert (came[-1].verified, came[-1].total, came[-1].source) == (report.nbytes, report.nbytes, address)
    for events, side in ((ours, "client"), (theirs, "server")):
        (ended,) = [event for event in events if isinstance(event, SessionEnded)]
        assert (ended.side, ended.role, ended.transport, ended.error) == (side, "target", "memory", None)
        assert (ended.blocks, ended.nbytes) == (report.blocks, report.nbytes)
        assert ended.seconds == pytest.approx(sum(phases(events).values()) - phases(events).get("verify", 0.0), abs=1.0)
        (opened,) = [event for event in events if isinstance(event, TransportChosen)]
        assert opened == TransportChosen(side, ended.session, ended.peer, "memory")
    known = HOLDING.announcement
    assert theirs[0] == ServingStarted(
        "target", "raw", "kit", known.root, len(known.manifest.tensors), len(known.plan.blocks), known.plan.nbytes
    )
    assert theirs[-1] == ServingStopped("target", "raw", known.root, "the server is stopping")


async def test_a_retraction_is_observed() -> None:
    events: list[Event] = []
    async with kit.serving(HUB.transport, HOLDING, observers=[events.append]) as server:
        await server.retract("target", reason="asleep")
    stopped = [event for event in events if isinstance(event, ServingStopped)]
    assert [(event.role, event.reason) for event in stopped] == [("target", "asleep")]


async def test_failed_sources_are_observed_with_the_reason() -> None:
    ours: list[Event] = []
    theirs: list[Event] = []
    other = kit.held(kit.weights(1), kit.variant(model="another"))
    async with (
        kit.serving(HUB.transport, other, observers=[theirs.append]) as wrong,
        kit.serving(HUB.transport, HOLDING) as right,
    ):
        report = await pull([Source(NOBODY), Source(kit.at(wrong)), Source(kit.at(right))], [ours.append])
        await kit.until(lambda: wrong.ended)
    left = [event for event in ours if isinstance(event, SourceLeft)]
    assert [type(event.error) for event in left[:2]] == [PeerLost, RefusedError]
    assert [event.error.message for event in left if event.error] == [a.cause.message for a in report.attempts]
    assert left[-1].error is None
    chosen = [event for event in ours if isinstance(event, SourceChosen)]
    assert [event.session for event in chosen] == [event.session for event in left] == [1, 2, 3]
    began = [event.session for event in ours if isinstance(event, SessionBegan)]
    assert began == [event.session for event in ours if isinstance(event, SessionEnded)] == [2, 3]
    assert phases(ours)["connect"] == pytest.approx(report.phases.connect)
    (ended,) = [event for event in theirs if isinstance(event, SessionEnded)]
    assert isinstance(ended.error, RefusedError)
    assert not ended.stray


async def test_blocks_of_a_broken_session_are_counted_once() -> None:
    ours: list[Event] = []
    cut = FaultyTransport(HUB.transport, Faults([Fault(FaultKind.CUT, 25)]))
    async with kit.serving(cut, HOLDING) as first, kit.serving(HUB.transport, HOLDING) as second:
        report = await pull([Source(kit.at(first)), Source(kit.at(second))], [ours.append], stripe=1)
    ended = [event for event in ours if isinstance(event, SessionEnded)]
    assert sum(event.nbytes for event in ended) == report.nbytes
    by_source = {source: share.nbytes for source, share in report.sources.items()}
    assert Counter({event.peer: event.nbytes for event in ended}) == Counter(by_source)


async def test_a_failed_and_a_cancelled_pull_are_observed_as_such() -> None:
    failed: list[Event] = []
    with pytest.raises(NoSourceLeft) as raised:
        await pull([Source(NOBODY)], [failed.append])
    assert isinstance(failed[-1], PullEnded)
    assert failed[-1].error is raised.value
    cancelled: list[Event] = []
    with anyio.CancelScope() as scope:

        def cancel(event: Event) -> None:
            cancelled.append(event)
            if isinstance(event, SourceLeft):
                scope.cancel()

        await pull([Source(NOBODY)], [cancel], wait=kit.PATIENCE)
    last = cancelled[-1]
    assert isinstance(last, PullEnded)
    assert (last.report, last.error) == (None, None)


async def test_a_stray_connection_is_observed_as_a_session() -> None:
    events: list[Event] = []
    async with kit.serving(HUB.transport, HOLDING, observers=[events.append]) as server:
        async with kit.fake_client(server) as wire:
            await wire.raw(b"GET / HTTP/1.1\r\n\r\n")
            await wire.closed()
        await kit.until(lambda: server.ended)
    (ended,) = [event for event in events if isinstance(event, SessionEnded)]
    assert ended.stray
    assert (ended.role, ended.transport, ended.blocks) == ("", "", 0)


async def test_sessions_that_a_stopping_server_cuts_are_observed_as_ended() -> None:
    events: list[Event] = []
    held = FaultyTransport(HUB.transport, Faults([Fault(FaultKind.HOLD, 3)]))
    async with (
        anyio.create_task_group() as tasks,
        kit.serving(held, HOLDING, observers=[events.append], stop_within=0.0) as server,
    ):
        tasks.start_soon(_fails, kit.at(server))
        await kit.until(lambda: any(one.transport for one in server.sessions))
    assert order_of(events)[-2:] == ["SessionEnded", "ServingStopped"]


async def _fails(address: Address) -> None:
    with pytest.raises(NoSourceLeft):
        await pull([Source(address)], [])


async def test_an_observer_that_raises_is_logged_once_and_removed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "netloader")
    ours: list[Event] = []
    theirs: list[Event] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError(event)

    async with kit.serving(HUB.transport, HOLDING, observers=[broken, theirs.append]) as server:
        await pull([Source(kit.at(server))], [broken, ours.append])
        await pull([Source(kit.at(server))], [ours.append])
    logged = [record for record in caplog.records if "is told nothing more" in record.getMessage()]
    assert len(logged) == 2  # one of the server, one of the pull
    assert all(record.exc_info for record in logged)
    assert len([event for event in ours if isinstance(event, PullEnded)]) == 2
    assert len([event for event in theirs if isinstance(event, SessionEnded)]) == 2


def test_observers_are_called_in_order_and_a_removed_one_does_not_disturb_the_others() -> None:
    heard: list[str] = []

    def first(_: Event) -> None:
        heard.append("first")
        raise ValueError

    observers = Observers([first, lambda _: heard.append("second")])
    for _ in range(2):
        observers(PullBegan("target"))
    assert heard == ["first", "second", "second"]
