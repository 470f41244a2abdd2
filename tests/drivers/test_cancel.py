"""A pull cancelled, or a server stopped, at every step of the event loop."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import anyio
import anyio.lowlevel
import pytest

from netloader.core.addresses import Address
from netloader.core.protocol import State
from netloader.errors import NoSourceLeft
from netloader.transports.base import Transport
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from netloader.transports.gloo import GlooTransport
from tests.drivers import kit

STOP_WITHIN = 2.0
TRIES = 3
"""One slow stop may be due to load on the machine; three in a row are a fault."""

SOURCE = kit.weights(rows=3)
HOLDING = kit.held(SOURCE)


async def cut_after(steps: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Run `work` and cancel it after `steps` iterations of the event loop; return whether it had ended by then."""
    over = False

    async def run() -> None:
        nonlocal over
        await work()
        over = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        for _ in range(steps):
            if over:
                return True
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    return over


async def cancelled(server: kit.WatchedServer, transport: Transport, steps: int) -> bool:
    """Cancel a pull after `steps` iterations of the event loop; return False if it had ended by then."""
    into = kit.blank(SOURCE)
    over = await cut_after(steps, lambda: kit.pull(into, [kit.at(server)], transport))
    left = kit.contents(into)
    await kit.until(lambda: server.sessions == (), "the server's session ended")
    assert kit.contents(into) == left, f"a byte landed after the call was over ({steps=})"
    assert (server._turns.taken, server._turns.waiting) == (0, 0)
    if over:
        assert left == kit.contents(SOURCE)
    return not over


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_a_pull_cancelled_at_every_step_leaves_nothing_behind() -> None:
    hub = kit.Hub(1500)
    async with kit.serving(hub.transport, HOLDING, max_clients=1) as server:
        steps = 1
        while await cancelled(server, hub.transport, steps):
            steps += 1
    assert steps > 50
    assert hub.transport._hub.open_offers == 0


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_a_gloo_pull_cancelled_at_many_steps_leaves_nothing_behind() -> None:
    transport = GlooTransport()
    async with kit.serving(transport, HOLDING, max_clients=1) as server:
        steps = 1
        while await cancelled(server, transport, steps):
            steps += 1 + steps // 3
        into = kit.blank(SOURCE)
        await kit.pull(into, [kit.at(server)], transport)
        assert kit.contents(into) == kit.contents(SOURCE)


async def test_a_server_stopped_at_any_step_tells_its_client_the_reason() -> None:
    steps, stopped = 0, 0
    while True:
        hub = kit.Hub(1500)
        into = kit.blank(SOURCE)
        outcome: list[object] = []

        async def client(port: int) -> None:
            try:
                outcome.append(await kit.pull(into, [Address("127.0.0.1", port)], hub.transport))  # noqa: B023
            except NoSourceLeft as error:
                outcome.append(error)  # noqa: B023

        async with anyio.create_task_group() as tasks, kit.serving(hub.transport, HOLDING) as server:
            tasks.start_soon(client, server.port)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
        (ended,) = outcome
        if not isinstance(ended, NoSourceLeft):
            assert kit.contents(into) == kit.contents(SOURCE)
            break
        for attempt in ended.attempts:
            assert attempt.hint
            assert "unexpected" not in attempt.message
        stopped += 1
        steps += 2
    assert stopped > 10


async def test_a_server_cancelled_with_its_task_group_tells_its_client_the_reason() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    faults = Faults([Fault(FaultKind.HOLD, 2)])
    ports: list[int] = []

    async def serve() -> None:
        async with kit.serving(FaultyTransport(hub.transport, faults), HOLDING) as server:
            ports.append(server.port)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as servers:
        servers.start_soon(serve)
        await kit.until(lambda: ports)

        async def stop() -> None:
            await kit.until(lambda: faults.fired)
            servers.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop)
            with pytest.raises(NoSourceLeft, match="the server is stopping"):
                with anyio.CancelScope(shield=True):
                    await kit.pull(into, [Address("127.0.0.1", ports[0])], hub.transport)


@pytest.mark.parametrize("transport", ["memory", "gloo"])
@pytest.mark.usefixtures("turns_stay")
async def test_stopping_a_server_takes_bounded_time_whatever_its_clients_do(transport: str) -> None:
    took: list[float] = []
    while not took or min(took) >= STOP_WITHIN:
        assert len(took) < TRIES, f"seconds to stop: {took}"
        took.append(await seconds_to_stop(GlooTransport() if transport == "gloo" else kit.Hub(1500).transport))


async def seconds_to_stop(inner: Transport) -> float:
    """How long a server takes to stop with a client in a transfer, a queued one, and a silent one."""
    faults = Faults([Fault(FaultKind.HOLD, 2)])
    outcomes: list[NoSourceLeft] = []

    async def client(port: int) -> None:
        with pytest.raises(NoSourceLeft) as caught:
            await kit.pull(kit.blank(SOURCE), [Address("127.0.0.1", port)], inner)
        outcomes.append(caught.value)

    async with anyio.create_task_group() as tasks:
        async with kit.serving(FaultyTransport(inner, faults), HOLDING, max_clients=1) as server:
            tasks.start_soon(client, server.port)
            await kit.until(lambda: faults.fired, "one is in the middle of a transfer")
            tasks.start_soon(client, server.port)
            await kit.until(lambda: server._turns.waiting == 1, "one is in the queue")
            silent = await anyio.connect_tcp("127.0.0.1", server.port)
            await kit.until(lambda: len(server.sessions) == 3, "one is silent")
            began = time.monotonic()
        took = time.monotonic() - began
        await silent.aclose()
    assert [error.attempts[0].message.split(": ", 1)[1] for error in outcomes] == ["the server is stopping"] * 2
    return took


@pytest.mark.allow_blocking(reason="the connections have to exist before the next iteration of the event loop")
async def test_connections_accepted_while_a_server_stops_do_not_delay_it() -> None:
    with ExitStack() as stack, anyio.fail_after(kit.PATIENCE / 2):
        async with kit.serving(kit.Hub().transport, HOLDING, stop_within=kit.PATIENCE) as server:
            for _ in range(20):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))


async def test_an_error_in_the_body_of_a_server_is_raised_unchanged() -> None:
    with pytest.raises(ZeroDivisionError):
        async with kit.serving(kit.Hub().transport, HOLDING):
            raise ZeroDivisionError


async def test_a_pull_that_times_out_in_the_middle_reports_its_progress() -> None:
    hub = kit.Hub(0)
    faults = Faults([Fault(FaultKind.HOLD, 2)])
    async with kit.serving(FaultyTransport(hub.transport, faults), HOLDING) as server:
        with pytest.raises(NoSourceLeft, match="did not end within 1 s") as caught:
            await kit.pull(kit.blank(SOURCE), [kit.at(server)], hub.transport, timeout=1.0)
        assert faults.fired
        assert caught.value.verified == 3 * kit.BLOCK
        assert caught.value.total == HOLDING.announcement.plan.nbytes
        await kit.until(lambda: server.sessions == ())
        assert all(session.state is State.FAILED for session in (s.session for s in server.ended))
