"""The event loops that applications choose: uvloop, eager tasks, and asyncio's debug mode."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
import torch
import uvloop

import netloader

WEIGHTS = {f"layer.{number}": torch.randn(500, 300) for number in range(16)}
IDENTITY = netloader.ModelIdentity(model="loops")
EACH = pytest.mark.asyncio(loop_factories=["uvloop", "eager"])
LIMIT = 0.05
"""Seconds that one step on the event loop may take."""
TRIES = 5
"""One slow step may be due to load on the machine; one in each of several runs is a fault."""

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest_asyncio.fixture
async def server() -> AsyncIterator[netloader.Server]:
    async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as running:
        yield running


async def pulls(server: netloader.Server, relay: netloader.Server | None = None) -> None:
    mine = {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()}
    await netloader.pull(mine, IDENTITY, sources=[server.address], relay=relay)
    assert all(torch.equal(mine[name], tensor) for name, tensor in WEIGHTS.items())


@EACH
async def test_pulls_beside_each_other(server: netloader.Server) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(pulls(server))


@EACH
async def test_a_relay(server: netloader.Server) -> None:
    async with netloader.Server(host="127.0.0.1") as relay:
        await pulls(server, relay)
        await pulls(relay)


@EACH
async def test_a_pull_that_is_ended_by_a_timeout(server: netloader.Server) -> None:
    before = asyncio.all_tasks()

    async def cut_short() -> None:
        async with asyncio.timeout(None) as limit:

            def ends_now(_: netloader.Progress) -> None:
                limit.reschedule(asyncio.get_running_loop().time())

            await netloader.pull_new(sources=[server.address], progress=ends_now)
            await asyncio.Event().wait()  # the pull may have ended by then: it is quick

    with pytest.raises(TimeoutError):
        await cut_short()
    async with asyncio.timeout(30):
        while others := asyncio.all_tasks() - before:
            await asyncio.wait(others)
    await pulls(server)


@EACH
async def test_errors_are_raised_as_they_are(server: netloader.Server) -> None:
    with pytest.raises(netloader.NoSourceLeft, match="'another'"):
        await netloader.pull(WEIGHTS, netloader.ModelIdentity(model="another"), sources=[server.address])
    with pytest.raises(netloader.ManifestError):
        await netloader.Server({"w": torch.zeros(1).to_sparse()}, host="127.0.0.1").__aenter__()


@EACH
async def test_a_blocking_call_in_a_thread(server: netloader.Server) -> None:
    tensors, _ = await asyncio.to_thread(netloader.sync.pull_new, sources=[server.address])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in WEIGHTS.items())


def test_a_runner_with_uvloop() -> None:
    async def serves_and_pulls() -> None:
        assert type(asyncio.get_running_loop()) is uvloop.Loop
        async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as server:
            await pulls(server)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serves_and_pulls())


async def steps_that_take_long(caplog: pytest.LogCaptureFixture, work: Callable[[], Awaitable[None]]) -> list[str]:
    """What asyncio's debug mode says of `work`."""
    loop = asyncio.get_running_loop()
    assert loop.get_debug()
    loop.slow_callback_duration = LIMIT
    caplog.clear()
    with caplog.at_level(logging.WARNING, "asyncio"):
        await work()
        await asyncio.sleep(0)
    return [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def test_nothing_takes_long_on_the_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def serves_and_pulls() -> None:
        async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as server:
            await netloader.probe(server.address)
            await pulls(server)

    slow: list[str] = []
    with asyncio.Runner(debug=True) as runner:
        for _ in range(TRIES):
            slow = runner.run(steps_that_take_long(caplog, serves_and_pulls))
            if not slow:
                return
    pytest.fail("\n".join(slow), pytrace=False)


def test_what_takes_long_would_be_found(caplog: pytest.LogCaptureFixture) -> None:
    async def takes_long() -> None:
        time.sleep(2 * LIMIT)  # noqa: ASYNC251 - blocking the event loop is the purpose

    with asyncio.Runner(debug=True) as runner:
        (found,) = runner.run(steps_that_take_long(caplog, takes_long))
    assert "took 0." in found
