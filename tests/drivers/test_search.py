"""Sources that are found during a pull: real sockets, and a provider that follows a script."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from netloader.client import pull as pull_module
from netloader.client.pull import pull_from
from netloader.client.search import search
from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.options import PullOptions
from netloader.core.report import Progress, PullReport
from netloader.core.sources import MAX_KNOWN, Source
from netloader.discovery import Appeared, FixedSources, Listed, SourceChange, SourceProvider, Vanished
from netloader.errors import DiscoveryError, NoSourceLeft
from netloader.observe.events import Event, SourceChosen
from netloader.tensors import destination, digest_of
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import kit

HUB = kit.Hub()
WEIGHTS = kit.weights()
HOLDING = kit.held(WEIGHTS)
NOBODY = Address("127.0.0.1", 9)

Story = Callable[[], AsyncGenerator[SourceChange, None]]


class Script:
    """A provider that follows a script."""

    def __init__(self, story: Story) -> None:
        self.watch = story


async def pull(
    sources: SourceProvider, *, progress: Callable[[Progress], None] | None = None, **options: object
) -> PullReport:
    """A pull from the sources that the provider finds; checks the bytes."""
    into = kit.blank(WEIGHTS)
    chosen = PullOptions(**{"timeout": kit.PATIENCE, "timings": kit.CALM, **options})  # type: ignore[arg-type]
    filled = destination(into)
    report = await pull_from(filled, kit.IDENTITY, sources, [HUB.transport], digest_of, chosen, progress)
    assert kit.contents(into) == kit.contents(WEIGHTS)
    return report


async def for_ever() -> None:
    await anyio.sleep(10 * kit.PATIENCE)


async def test_changes_of_a_provider_are_observed_in_order() -> None:
    source = Source(Address("10.0.0.7", 80), {"zone": "a"}, load=1.0)
    events: list[p.Event] = []

    async def story() -> AsyncGenerator[SourceChange, None]:
        yield Appeared(source)
        yield Listed()
        yield Vanished(source.address)

    await search(Script(story), events.append)
    assert events == [p.SourcesFound([source]), p.Listed(), p.SourceLost(source.address), p.SearchEnded()]


async def test_a_source_that_appears_while_the_pull_waits_is_used_and_the_stream_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The stream is closed before the time-out of the sessions' ends, so being cut off by it does not count.
    monkeypatch.setattr(pull_module, "_FAREWELL", 10 * kit.PATIENCE)
    closed: list[bool] = []
    async with kit.serving(HUB.transport, HOLDING) as server:

        async def story() -> AsyncGenerator[SourceChange, None]:
            try:
                yield Listed()
                yield Vanished(NOBODY)  # was never listed
                await anyio.wait_all_tasks_blocked()  # the pull waits
                yield Appeared(Source(kit.at(server), {"zone": "a"}))
                await for_ever()
            finally:
                closed.append(True)

        with anyio.fail_after(kit.PATIENCE):
            report = await pull(Script(story), wait=kit.PATIENCE)
    assert list(report.sources) == [str(kit.at(server))]
    assert report.attempts == ()
    assert closed == [True]


async def test_a_source_that_vanishes_is_used_until_its_session_ends_and_not_tried_again() -> None:
    """Its connection breaks later; another source, which appears then, gives the other blocks."""
    held = Faults([Fault(FaultKind.HOLD, 10)])
    carrier = FaultyTransport(FaultyTransport(HUB.transport, held), Faults([Fault(FaultKind.CUT, 25)]))
    async with kit.serving(carrier, HOLDING) as first, kit.serving(HUB.transport, HOLDING) as second:

        async def story() -> AsyncGenerator[SourceChange, None]:
            yield Appeared(Source(kit.at(first)))
            yield Listed()
            await kit.until(lambda: any(one.transport for one in first.sessions))
            yield Vanished(kit.at(first))
            held.release()
            await kit.until(lambda: first.ended)
            yield Appeared(Source(kit.at(second)))
            await for_ever()

        report = await pull(Script(story), wait=kit.PATIENCE)
        (session,) = first.ended
        assert "connection cut in block 25" in str(session.session.error)  # long after it vanished
    assert report.sources[str(kit.at(second))].blocks > 0


def _raises() -> SourceChange:
    raise DiscoveryError("no name server", hint="look at resolv.conf")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (_raises, "Script failed: no name server (look at resolv.conf)"),
        (lambda: dict[str, SourceChange]()["key"], "Script failed: KeyError: 'key'"),
        (lambda: "nonsense", "Script failed: 'nonsense' is no change of sources"),
    ],
)
async def test_a_provider_that_fails_is_logged_and_its_sources_are_kept(
    fault: Callable[[], SourceChange], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "netloader")
    async with kit.serving(HUB.transport, HOLDING) as server:

        async def story() -> AsyncGenerator[SourceChange, None]:
            yield Appeared(Source(kit.at(server)))
            yield fault()

        report = await pull(Script(story))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("netloader")]
    assert ours == [f"discovery: {told}"]  # asyncio's debug mode tells of slow callbacks on a busy host
    assert [str(attempt) for attempt in report.attempts] == [f"discovery: {told}"]


async def test_a_provider_whose_own_task_was_cancelled_does_not_end_the_pull() -> None:
    """Its `CancelledError` must not cancel the pull, which would then return an empty report."""

    async def story() -> AsyncGenerator[SourceChange, None]:
        yield Listed()
        raise asyncio.CancelledError

    with anyio.fail_after(kit.PATIENCE), pytest.raises(NoSourceLeft, match="discovery: Script failed: CancelledError"):
        await pull(Script(story), wait=kit.PATIENCE)


async def test_a_provider_that_cannot_be_watched_ends_a_pull_without_sources(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> AsyncGenerator[SourceChange, None]:
        raise OSError("no socket")

    with pytest.raises(NoSourceLeft, match="discovery: Script failed: OSError: no socket"):
        await pull(Script(broken), wait=kit.PATIENCE)


async def test_when_the_stream_ends_and_no_source_is_left_the_pull_fails() -> None:
    async def story() -> AsyncGenerator[SourceChange, None]:
        await anyio.wait_all_tasks_blocked()
        yield Appeared(Source(NOBODY))

    with anyio.fail_after(kit.PATIENCE), pytest.raises(NoSourceLeft, match="cannot be reached"):
        await pull(Script(story))
    with pytest.raises(NoSourceLeft, match="no source was given"):
        await pull(FixedSources([]), wait=kit.PATIENCE)


@pytest.mark.parametrize(("listed", "listing", "wait"), [(True, 10.0, 0.0), (False, 0.05, 0.0), (True, 10.0, 0.05)])
async def test_the_wait_for_a_stream_without_sources_is_bounded(listed: bool, listing: float, wait: float) -> None:
    async def story() -> AsyncGenerator[SourceChange, None]:
        if listed:
            yield Listed()
        await for_ever()

    with anyio.fail_after(kit.PATIENCE), pytest.raises(NoSourceLeft, match="discovery: no source appeared within"):
        await pull(Script(story), connect_timeout=listing, wait=wait)


async def test_a_flood_of_changes_neither_fills_memory_nor_blocks_the_event_loop() -> None:
    """The provider never waits and never ends; the only good source is among the first."""
    said = itertools.count(1)
    async with kit.serving(HUB.transport, HOLDING) as server:

        async def story() -> AsyncGenerator[SourceChange, None]:
            yield Appeared(Source(kit.at(server), load=0.5))
            for number in said:
                yield Appeared(
                    Source(Address(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 9), load=1)
                )
                yield Vanished(Address("10.0.0.1", 9))

        with anyio.fail_after(kit.PATIENCE):
            await pull(Script(story), stripe=1)
    assert next(said) < 100 * MAX_KNOWN


async def test_a_pull_that_is_cancelled_closes_the_stream_first() -> None:
    story_told: list[str] = []

    async def story() -> AsyncGenerator[SourceChange, None]:
        try:
            yield Listed()
            await for_ever()
        finally:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 1.0):
                await anyio.lowlevel.checkpoint()
                story_told.append("closed")

    with anyio.CancelScope() as scope:

        async def cancel() -> None:
            await anyio.wait_all_tasks_blocked()
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel)
            await pull(Script(story), wait=kit.PATIENCE)
    assert scope.cancelled_caught
    assert story_told == ["closed"]


async def test_a_provider_may_hold_a_task_group_open() -> None:
    async with kit.serving(HUB.transport, HOLDING) as server:

        async def story() -> AsyncGenerator[SourceChange, None]:
            send, receive = anyio.create_memory_object_stream[Address](1)

            async def look(found: Callable[[Address], Awaitable[None]]) -> None:
                await found(kit.at(server))
                await for_ever()

            async with send, receive, anyio.create_task_group() as tasks:
                tasks.start_soon(look, send.send)
                async for address in receive:
                    yield Appeared(Source(address))

        report = await pull(Script(story))
    assert list(report.sources) == [str(kit.at(server))]


async def test_a_dead_generation_is_tried_once_and_another_one_at_its_address_is_tried() -> None:
    """Without a generation, an address that can't be reached is tried again until `wait` is over."""
    chosen: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, SourceChosen):
            chosen.append(event.source)

    async with kit.serving(HUB.transport, HOLDING) as server:

        async def story() -> AsyncGenerator[SourceChange, None]:
            yield Appeared(Source(NOBODY, generation="dead"))
            yield Listed()
            await kit.until(lambda: chosen)
            for load in (1.0, 2.0):  # its entry has not expired yet, and is read again
                await anyio.wait_all_tasks_blocked()
                yield Appeared(Source(NOBODY, load=load, generation="dead"))
            yield Vanished(NOBODY)
            yield Appeared(Source(NOBODY, generation="dead"))
            yield Appeared(Source(NOBODY, generation="another"))
            await kit.until(lambda: len(chosen) > 1)
            yield Appeared(Source(kit.at(server), generation="alive"))
            await for_ever()

        into = kit.blank(WEIGHTS)
        options = PullOptions(timeout=kit.PATIENCE, timings=kit.CALM, wait=kit.PATIENCE)
        provider, filled = Script(story), destination(into)
        await pull_from(filled, kit.IDENTITY, provider, [HUB.transport], digest_of, options, None, None, [note])
    assert kit.contents(into) == kit.contents(WEIGHTS)
    assert chosen == [str(NOBODY), str(NOBODY), str(kit.at(server))]
