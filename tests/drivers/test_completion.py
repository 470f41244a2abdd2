"""A pull that has every block is over: whatever its other sources are doing, none of them is waited for."""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import anyio
import pytest

import netloader.client.pull
import netloader.client.session
import netloader.session.driver
import netloader.session.phase_clock
from netloader.codecs.block_view import BlockView
from netloader.core import messages as m
from netloader.core.addresses import Address
from netloader.core.options import Timings
from netloader.core.report import Progress
from netloader.errors import NoSourceLeft
from netloader.transports.base import Channel, Landed, Setup
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import jumping, kit, peers

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
BLOCKS = len(HOLDING.announcement.plan.blocks)

AT_ONCE = 0.1
"""Seconds from the last block to the end of the pull."""

PATIENT = Timings(hello=1e3, validate=1e3, plan=1e3, stall=1e3, finalize=1e3)
"""Nothing here ends by a deadline of a session."""

Wire = kit.Wire[m.ClientMessage]
HUB = kit.Hub()


async def silent(wire: Wire) -> None:
    await wire.closed()


async def welcomes(wire: Wire) -> None:
    await wire.hear_until(m.Hello)
    await wire.say(kit.welcome(HUB.transport))
    await wire.closed()


async def lets_wait(wire: Wire) -> None:
    await wire.hear_until(m.Hello)
    await wire.say(kit.welcome(HUB.transport))
    await wire.hear_until(m.Identify)
    while True:
        await wire.say(m.Waiting(reason="others come first", position=3))
        with anyio.move_on_after(5.0):
            await wire.closed()
            return


async def announces(wire: Wire) -> None:
    await wire.hear_until(m.Hello)
    await wire.say(kit.welcome(HUB.transport))
    await wire.hear_until(m.Identify)
    await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(HOLDING))
    await wire.closed()


async def hears_nothing(wire: Wire) -> None:
    """As a stopped process: it does not even see that we close."""
    del wire
    await anyio.sleep_forever()


SCRIPTS: dict[str, Callable[[Wire], Awaitable[None]]] = {
    script.__name__: script for script in (silent, welcomes, lets_wait, announces, hears_nothing)
}


@pytest.mark.parametrize("names", [*((name,) for name in SCRIPTS), tuple(SCRIPTS)])
def test_sources_that_bring_nothing_do_not_hold_up_a_complete_pull(names: tuple[str, ...]) -> None:
    """Each is in the middle of what it does when the last block arrives, a second (of a clock that jumps) later."""

    async def story(clock: jumping.Clock) -> tuple[float, float]:
        last = Faults([Fault(FaultKind.HOLD, BLOCKS - 2)])
        async with AsyncExitStack() as stack:
            good = await stack.enter_async_context(kit.serving(FaultyTransport(HUB.transport, last), HOLDING))
            bad = [await stack.enter_async_context(kit.fake_server(SCRIPTS[name])) for name in names]
            tasks = await stack.enter_async_context(anyio.create_task_group())
            times: dict[bool, float] = {}

            async def release() -> None:
                await anyio.sleep(1.0)
                assert all(fake.connections == 1 for fake in bad)
                last.release()

            def progress(step: Progress) -> None:
                times[step.verified == step.total] = clock.now

            tasks.start_soon(release)
            into, sources = kit.blank(SOURCE), [kit.at(good), *(fake.address for fake in bad)]
            report = await kit.pull(
                into, sources, HUB.transport, progress=progress, stripe=len(sources), timeout=3600, timings=PATIENT
            )
            ended = clock.now
            assert kit.contents(into) == kit.contents(SOURCE)
            assert report.retries == 0
            await kit.until(lambda: good.ended)
            assert [session.session.error for session in good.ended] == [None]
            return times[True], ended

    modules = (netloader.client.pull, netloader.client.session, netloader.session.driver, netloader.session.phase_clock)
    last, ended = jumping.run(story, *modules)
    assert ended - last <= AT_ONCE


async def _seconds_after_the_last_block(
    sources: list[Address], done: Callable[[], None] = lambda: None, *, stripe: int = 1
) -> float:
    """Pull by tcp; seconds from the last block to the return."""
    into, last = kit.blank(SOURCE), 0.0

    def progress(step: Progress) -> None:
        nonlocal last
        if step.verified == step.total:
            last = time.perf_counter()
            done()

    report = await kit.pull(into, sources, kit.carrier("tcp"), progress=progress, stripe=stripe)
    ended = time.perf_counter()
    assert report.identity == kit.IDENTITY  # also where no goodbye was heard
    assert kit.contents(into) == kit.contents(SOURCE)
    return ended - last


async def test_of_two_honest_servers_the_busy_one_is_not_waited_for() -> None:
    """Processes of their own, in real time: the best of three counts, since this machine has other work too."""
    async with (
        peers.peer("serve", transport="tcp", server={"max_clients": 1}, hold=[5]) as busy,
        peers.peer("serve", transport="tcp") as free,
    ):
        ports = [(await server.hear())["port"] for server in (busy, free)]
        async with peers.peer("pull", transport="tcp", ports=ports[:1]):
            await busy.until(lambda seen: seen["sessions"] == ["TRANSFER"])
            sources = [Address("127.0.0.1", port) for port in ports]
            waited = [await _seconds_after_the_last_block(sources, stripe=2) for _ in range(3)]
            await busy.until(lambda seen: seen["sessions"] == ["TRANSFER"])
    assert min(waited) <= AT_ONCE


async def test_a_server_that_stops_at_the_last_block_is_not_waited_for() -> None:
    """As above; it never says goodbye, nor does it take ours."""
    waited = []
    async with peers.peer("serve", transport="tcp") as server:
        source = Address("127.0.0.1", (await server.hear())["port"])
        for _ in range(3):
            waited.append(await _seconds_after_the_last_block([source], lambda: server.send(signal.SIGSTOP)))
            server.send(signal.SIGCONT)
            await server.until(lambda seen: not seen["sessions"])
        heard = await server.ask("errors")
    assert min(waited) <= AT_ONCE
    assert heard["errors"] == ["NoneType"] * 3


class _SlowToReturn(FaultyTransport):
    """Its channels take a second more to return from a receive than the last block takes to land."""

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        channel = await super().connect(offer, setup)
        receive = channel.recv

        async def recv(blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
            await receive(blocks, landed)
            await anyio.sleep(1.0)

        channel.recv = recv  # type: ignore[method-assign]
        return channel


async def test_a_pull_is_complete_with_its_last_block_not_when_the_receive_returns() -> None:
    """The blocks are accounted for while they are received. By tcp, whose threads know nothing of the event loop."""
    carrier = kit.carrier("tcp")
    into, ended = kit.blank(SOURCE), 0.0
    async with kit.serving(carrier, HOLDING) as server:
        last = 0.0

        def progress(step: Progress) -> None:
            nonlocal last
            if step.verified == step.total:
                last = time.perf_counter()

        report = await kit.pull(into, [kit.at(server)], _SlowToReturn(carrier, Faults()), progress=progress)
        ended = time.perf_counter()
        await kit.until(lambda: server.ended)
    assert [session.session.error for session in server.ended] == [None]
    assert report.retries == 0
    assert kit.contents(into) == kit.contents(SOURCE)
    assert ended - last <= AT_ONCE


async def test_what_a_source_says_again_and_again_is_accounted_for_once_whatever_numbers_it_holds() -> None:
    said = 0

    async def loads(wire: Wire) -> None:
        nonlocal said
        said += 1
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(HUB.transport))
        await wire.hear_until(m.Identify)
        code: m.RefusalCode = "not-ready" if said < 4 else "not-held"
        await wire.say(m.Refusal(code=code, message=f"{said} of 4 parts are loaded", retry_after=0.001))

    async with kit.fake_server(loads) as fake:
        with pytest.raises(NoSourceLeft) as caught:
            await kit.pull(kit.blank(SOURCE), [fake.address], HUB.transport, wait=kit.PATIENCE)
    assert [attempt.times for attempt in caught.value.attempts] == [3, 1]
    assert [attempt.cause.message for attempt in caught.value.attempts] == [
        "3 of 4 parts are loaded",
        "4 of 4 parts are loaded",
    ]


async def test_what_was_pulled_is_named_as_its_source_did_whoever_was_refused_after_that() -> None:
    """One that holds other weights is heard after the first was accepted, and is the last to close."""
    other = kit.variant(fingerprint="ab", load_state={"has_own_lm_head": True})
    last, accepted = Faults([Fault(FaultKind.HOLD, BLOCKS - 2)]), anyio.Event()

    async def announces_others(wire: Wire) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(HUB.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Waiting(reason="others come first", position=3))
        await accepted.wait()
        await wire.say(m.Accepted(identity=other), kit.announce(kit.held(kit.weights(1), other)))
        await wire.hear_until(m.Goodbye)
        last.release()
        await anyio.sleep_forever()

    def progress(step: Progress) -> None:
        if step.verified:
            accepted.set()

    async with (
        kit.serving(FaultyTransport(HUB.transport, last), HOLDING) as good,
        kit.fake_server(announces_others) as bad,
    ):
        into, sources = kit.blank(SOURCE), [bad.address, kit.at(good)]
        report = await kit.pull(into, sources, HUB.transport, progress=progress, stripe=2)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert report.identity == kit.IDENTITY
