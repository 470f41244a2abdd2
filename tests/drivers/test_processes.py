"""Processes that are killed or suspended at a chosen point: how the other side ends."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack

import anyio
import pytest

from netloader.codecs.frames import server_messages
from netloader.core import messages as m
from netloader.core.addresses import Address
from netloader.core.options import Timings
from netloader.core.protocol import State
from netloader.core.report import PullReport
from netloader.errors import NoSourceLeft, PeerLost, TransferTimeout, TransportError
from netloader.transports.gloo import GlooTransport
from tests.drivers import kit, peers

SOURCE = kit.weights()
BLOCKS = len(kit.held(SOURCE).announcement.plan.blocks)
SHORT = Timings(hello=2.0, validate=kit.PATIENCE, plan=kit.PATIENCE, stall=2.0, finalize=kit.PATIENCE)


async def test_the_client_of_a_suspended_and_of_a_killed_server_pulls_from_the_next_source() -> None:
    outcomes: dict[str, PullReport | NoSourceLeft] = {}

    async def pull(name: str, sources: list[Address], timings: Timings = kit.CALM) -> None:
        into = kit.blank(SOURCE)
        try:
            report = await kit.pull(into, sources, GlooTransport(), timings=timings)
        except NoSourceLeft as error:
            outcomes[name] = error
            return
        assert kit.contents(into) == kit.contents(SOURCE)
        assert sum(share.blocks for share in report.sources.values()) == BLOCKS
        outcomes[name] = report

    async with peers.peer("serve", hold=[20]) as first, peers.peer("serve") as second:
        both = [Address("127.0.0.1", (await server.hear())["port"]) for server in (first, second)]

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pull, "suspended in the middle", both, SHORT)
            await first.until(lambda seen: seen["sessions"] == ["TRANSFER"])
            first.send(signal.SIGSTOP)
        await pull("suspended before Hello", both, SHORT)
        first.send(signal.SIGCONT)
        await first.until(lambda seen: not seen["sessions"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pull, "killed, with another source", both)
            tasks.start_soon(pull, "killed, without another source", both[:1])
            await first.until(lambda seen: seen["sessions"] == ["TRANSFER", "TRANSFER"])
            first.send(signal.SIGKILL)
        assert await second.finish() == 0

    causes = []
    for name in ("suspended in the middle", "suspended before Hello", "killed, with another source"):
        report = outcomes[name]
        assert isinstance(report, PullReport), (name, report)
        assert report.sources[str(both[1])].blocks > 0
        causes.append(report.attempts[0].cause)
    assert isinstance(causes[0], TransportError)
    assert isinstance(causes[1], TransferTimeout)
    assert isinstance(causes[2], PeerLost)
    error = outcomes["killed, without another source"]
    assert isinstance(error, NoSourceLeft)
    assert isinstance(error.attempts[0].cause, PeerLost)
    assert error.attempts[0].hint


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_client_killed_or_suspended_in_the_middle_ends_its_own_session_only(number: signal.Signals) -> None:
    into = kit.blank(SOURCE)
    transport = GlooTransport()
    async with (
        kit.serving(transport, kit.held(SOURCE), timings=SHORT, max_clients=2) as server,
        peers.peer("pull", ports=[server.port], hold=[5]) as victim,
    ):
        await kit.until(lambda: [s.state for s in server.sessions] == [State.TRANSFER])
        victim.send(number)
        await kit.pull(into, [kit.at(server)], transport)
        await kit.until(lambda: len(server.ended) == 2 and not server.sessions)
        assert kit.contents(into) == kit.contents(SOURCE)
        errors = [session.session.error for session in server.ended]
        assert sum(error is None for error in errors) == 1
        assert any(isinstance(error, TransportError) for error in errors)


@pytest.mark.parametrize("token", [None, "0123456789abcdef"])
async def test_connections_that_stop_after_hello_do_not_keep_a_new_client_out(token: str | None) -> None:
    """As many connections as a server keeps before Identify, and more of them all the time."""
    transport = kit.carrier("tcp")
    secret = None if token is None else token.encode()

    async def connect_and_greet(stack: AsyncExitStack, port: int) -> tuple[kit.Wire[m.ServerMessage], m.Welcome]:
        stream = await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", port))
        wire = kit.Wire(stream, server_messages())
        await wire.say(kit.hello(transport, secret))
        return wire, await wire.hear_until(m.Welcome)

    async with peers.peer("serve", transport="tcp", token=token) as server, AsyncExitStack() as stack:
        port = (await server.hear())["port"]
        (first, first_welcome), *_ = [await connect_and_greet(stack, port) for _ in range(128)]
        async with anyio.create_task_group() as tasks:

            async def more() -> None:
                while True:
                    await connect_and_greet(stack, port)

            tasks.start_soon(more)
            for _ in range(3):
                into = kit.blank(SOURCE)
                await kit.pull(into, [Address("127.0.0.1", port)], transport, token=secret, wait=kit.PATIENCE)
                assert kit.contents(into) == kit.contents(SOURCE)
            tasks.cancel_scope.cancel()
        if secret is not None:
            first.authenticate(secret, first_welcome)
        heard = await first.hear_all()
        refusals = [message for message in heard if isinstance(message, m.Refusal)]
        assert [(refusal.code, refusal.retry_after) for refusal in refusals] == [("busy", 1.0)]


async def test_an_evicted_client_tries_again_within_its_wait() -> None:
    evicting = True

    async def evict(wire: kit.Wire[m.ClientMessage]) -> None:
        nonlocal evicting
        await wire.hear_until(m.Hello)
        if evicting:
            evicting = False
            await wire.say(m.Goodbye(code="busy", reason="others want to connect"))
        else:
            await wire.say(m.Goodbye(code="internal", reason="the second time"))

    async with kit.fake_server(evict) as server:
        with pytest.raises(NoSourceLeft, match="the second time"):
            await kit.pull(kit.blank(SOURCE), [server.address], kit.carrier("tcp"), wait=kit.PATIENCE)
        assert server.connections == 2
        evicting = True
        with pytest.raises(NoSourceLeft, match="others want to connect"):
            await kit.pull(kit.blank(SOURCE), [server.address], kit.carrier("tcp"))
        assert server.connections == 3
