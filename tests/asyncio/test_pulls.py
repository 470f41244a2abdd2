"""Pulls beside each other, pulls that are cancelled, and what is left then: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import torch

import netloader
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport

WEIGHTS = {f"layer.{number}": torch.randn(256, 512) for number in range(24)}
IDENTITY = netloader.ModelIdentity(model="pulls")
NOBODY = "127.0.0.1:9"  # no server listens there

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("leaves_nothing")]


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in WEIGHTS.items()}


def equal(tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensors[name], tensor) for name, tensor in WEIGHTS.items())


@pytest_asyncio.fixture
async def server() -> AsyncIterator[netloader.Server]:
    async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1", fan_out=0) as running:
        yield running


@pytest_asyncio.fixture
async def server_of_few() -> AsyncIterator[netloader.Server]:
    async with netloader.Server({"w": torch.arange(4.0)}, IDENTITY, host="127.0.0.1", fan_out=0) as running:
        yield running


def stalls() -> FaultyTransport:
    """A transport whose first sender sends some blocks and no more until its channel is closed."""
    from netloader.transports.tcp import TcpTransport

    return FaultyTransport(TcpTransport(), Faults([Fault(FaultKind.STALL, block=2)]))


@pytest_asyncio.fixture
async def stalling() -> AsyncIterator[netloader.Server]:
    """A server that sends a few blocks to its first client and then no more."""
    async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1", transport=stalls()) as running:
        yield running


async def pulls(server: netloader.Server) -> None:
    mine = empty()
    await netloader.pull(mine, IDENTITY, sources=[server.address], timeout=60)
    assert equal(mine)


async def only(tasks: set[asyncio.Task[object]]) -> None:
    """Wait until no other tasks run."""
    async with asyncio.timeout(30):
        while others := asyncio.all_tasks() - tasks - {asyncio.current_task()}:
            await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)


async def test_several_pulls_in_a_task_group(server: netloader.Server) -> None:
    before = asyncio.all_tasks()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(pulls(server))
    await only(before)


async def test_several_servers_in_a_task_group() -> None:
    async def serves_and_pulls() -> None:
        async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as server:
            await pulls(server)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(serves_and_pulls())


async def test_a_failed_pull_cancels_the_others_of_its_group(stalling: netloader.Server) -> None:
    before, begun = asyncio.all_tasks(), asyncio.Event()

    async def fails() -> None:
        await begun.wait()
        await netloader.pull(empty(), IDENTITY, sources=[NOBODY])

    async def is_cancelled() -> None:
        await netloader.pull(empty(), IDENTITY, sources=[stalling.address], progress=lambda _: begun.set())

    cancelled: list[asyncio.Task[None]] = []

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            cancelled.append(tasks.create_task(is_cancelled()))
            tasks.create_task(fails())

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert cancelled[0].cancelled()
    assert caught.group_contains(netloader.NoSourceLeft, match=NOBODY)
    await pulls(stalling)
    await only(before)


async def test_gather_raises_the_error_of_one_and_the_other_goes_on(server: netloader.Server) -> None:
    other = asyncio.create_task(pulls(server))
    with pytest.raises(netloader.NoSourceLeft, match=NOBODY):
        await asyncio.gather(netloader.pull(empty(), IDENTITY, sources=[NOBODY]), other)
    await other


async def test_gather_returns_errors_beside_reports(server: netloader.Server) -> None:
    mine = empty()
    report, error = await asyncio.gather(
        netloader.pull(mine, IDENTITY, sources=[server.address]),
        netloader.pull(empty(), IDENTITY, sources=[NOBODY]),
        return_exceptions=True,
    )
    assert isinstance(report, netloader.PullReport)
    assert isinstance(error, netloader.NoSourceLeft)
    assert equal(mine)


async def test_a_pull_that_is_ended_by_a_timeout_leaves_nothing(stalling: netloader.Server) -> None:
    before = asyncio.all_tasks()

    async def cut_short() -> None:
        async with asyncio.timeout(None) as limit:

            def ends_now(_: netloader.Progress) -> None:
                limit.reschedule(asyncio.get_running_loop().time())

            await netloader.pull(empty(), IDENTITY, sources=[stalling.address], progress=ends_now)

    with pytest.raises(TimeoutError):
        await cut_short()
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0
    await only(before)
    await pulls(stalling)


async def test_a_pull_that_wait_for_ends_leaves_nothing(stalling: netloader.Server) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(netloader.pull(empty(), IDENTITY, sources=[stalling.address]), 0.2)
    await only(before)
    await pulls(stalling)


async def test_its_own_timeout_says_which_source_and_leaves_nothing(stalling: netloader.Server) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(netloader.NetloaderError, match=str(stalling.address)):
        await netloader.pull(empty(), IDENTITY, sources=[stalling.address], timeout=2)
    await only(before)
    await pulls(stalling)


async def step(task: asyncio.Task[None], count: int) -> None:
    """Let the event loop run `count` times, or until `task` is done."""
    for _ in range(count):
        if task.done():
            return
        await asyncio.sleep(0)


@pytest.mark.parametrize("again", [None, 0, 1, 5, 12], ids=lambda steps: f"again_after_{steps}")
@pytest.mark.parametrize("call", ["pull", "pull_new", "probe", "server"])
async def test_a_call_that_is_cancelled_at_any_step_leaves_nothing(
    server_of_few: netloader.Server, call: str, again: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A time limit, a task group and the end of the application may each cancel the same task."""

    async def calls() -> None:
        if call == "pull":
            await netloader.pull({"w": torch.empty(4)}, sources=[server_of_few.address])
        elif call == "pull_new":
            await netloader.pull_new(sources=[server_of_few.address])
        elif call == "probe":
            await netloader.probe(server_of_few.address)
        else:
            async with netloader.Server({"w": torch.zeros(4)}, IDENTITY, host="127.0.0.1") as other:
                await netloader.probe(other.address)

    before = asyncio.all_tasks()
    completed = 0
    for count in (*range(12), 15, 20, 30, 50, 80, 200, 100_000):
        task = asyncio.create_task(calls())
        await step(task, count)
        completed += not task.cancel()
        if again is not None:
            await step(task, again)
            task.cancel()
        async with asyncio.timeout(30):
            (result,) = await asyncio.gather(task, return_exceptions=True)
        assert result is None or isinstance(result, asyncio.CancelledError)
        await only(before)
    assert 1 <= completed < 18, "some were cancelled, and some were not"
    tensors, _ = await netloader.pull_new(sources=[server_of_few.address])
    assert tensors["w"].tolist() == [0, 1, 2, 3]
    assert "unexpected" not in caplog.text


async def test_an_error_in_the_body_of_a_server_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError, match="body"):
        async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1"):
            raise KeyError("body")


async def test_a_task_that_serves_until_it_is_cancelled() -> None:
    started: asyncio.Future[netloader.Address] = asyncio.get_running_loop().create_future()

    async def serves() -> None:
        async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as server:
            started.set_result(server.address)
            await asyncio.Event().wait()

    before = asyncio.all_tasks()
    task = asyncio.create_task(serves())
    await netloader.pull(empty(), IDENTITY, sources=[await started])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await only(before)


async def test_a_generator_pulls_beside_its_reader(server: netloader.Server) -> None:
    """Progress as an asynchronous stream, as an application that shows it would write it."""
    seen: asyncio.Queue[netloader.Progress | None] = asyncio.Queue()
    mine = empty()
    task = asyncio.create_task(netloader.pull(mine, IDENTITY, sources=[server.address], progress=seen.put_nowait))
    task.add_done_callback(lambda _: seen.put_nowait(None))
    done = [step.verified async for step in read(seen)]
    assert done == sorted(done)
    assert done[-1] == sum(tensor.nbytes for tensor in WEIGHTS.values())
    await task


async def read(queue: asyncio.Queue[netloader.Progress | None]) -> AsyncIterator[netloader.Progress]:
    while (step := await queue.get()) is not None:
        yield step
