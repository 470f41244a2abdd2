"""Connections that have said nothing: they cost a socket each, and no client waits for them."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from netloader.core import messages as m
from netloader.core.protocol import State
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
HUB = kit.Hub()


@asynccontextmanager
async def silent(server: kit.WatchedServer, count: int) -> AsyncIterator[None]:
    """Connections that wait in the kernel, because the server had no time to accept them yet."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", server.port))
        yield


async def test_a_client_behind_520_silent_connections_waits_for_none_of_them() -> None:
    into = kit.blank(SOURCE)
    async with kit.serving(HUB.transport, HOLDING) as server, silent(server, 520):
        await kit.pull(into, [kit.at(server)], HUB.transport)  # without WAIT: it is never turned away
        assert server.gone == 520 + 1 - 128
        assert [ended.number for ended in server.ended] == [1], "only the client had a session"
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_silent_connections_are_told_when_their_time_is_over_and_leave_nothing() -> None:
    async with kit.serving(HUB.transport, HOLDING, timings=kit.QUICK) as server, kit.fake_client(server) as wire:
        await kit.until(lambda: server.sessions)
        assert server.sessions[0].state is State.LISTEN
        (goodbye,) = await wire.hear_all()
        assert isinstance(goodbye, m.Goodbye)
        assert (goodbye.code, goodbye.reason) == ("timeout", "it said nothing within 1 s")
        assert server.sessions == ()


async def test_silent_connections_are_told_that_the_server_stops() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with kit.serving(HUB.transport, HOLDING) as server:
            wire = await stack.enter_async_context(kit.fake_client(server))
            await kit.until(lambda: server.sessions)
        (goodbye,) = await wire.hear_all()
        assert isinstance(goodbye, m.Goodbye)
        assert (goodbye.code, goodbye.reason) == ("gone", "the server is stopping")


@pytest.mark.usefixtures("no_leaked_descriptors")
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_connections_that_close_before_they_say_anything_have_no_session(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "netloader")
    async with kit.serving(HUB.transport, HOLDING) as server:
        for _ in range(3):
            async with kit.fake_client(server) as wire:
                await kit.until(lambda: server.sessions)
                await (wire.reset() if how == "reset" else wire.stream.aclose())
                await kit.until(lambda: not server.sessions)
        assert not server.ended
    assert sum("no client's" in record.getMessage() for record in caplog.records) == 1


async def test_a_client_that_said_something_does_not_go_while_its_session_has_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strangers that speak are paced; as many as may wait are accepted, and the others wait in the kernel."""
    into, pause = kit.blank(SOURCE), 0.01
    async with kit.serving(HUB.transport, HOLDING, max_strangers=40) as server:
        monkeypatch.setattr(server._pace, "wait", lambda _: pause)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kit.pull, into, [kit.at(server)], HUB.transport)
            await kit.until(lambda: server.sessions)
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(80):
                    wire = await stack.enter_async_context(kit.fake_client(server))
                    await wire.say(kit.hello(HUB.transport))
                await kit.until(lambda: len(server.sessions) == 10)
                await anyio.wait_all_tasks_blocked()
                assert not server.gone
            pause = 0.0
    assert kit.contents(into) == kit.contents(SOURCE)
