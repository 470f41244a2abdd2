"""Threads that do not return: the caller gets MemoryStillInUse, and closing ends all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from netloader.errors import ChannelClosed, MemoryStillInUse, PeerLost
from netloader.transports import process_group
from netloader.transports.base import BlockView, Channel, Transport
from netloader.transports.conformance import TensorBlockView
from netloader.transports.conformance_kit import open_descriptors
from netloader.transports.faults import Faults, FaultyTransport
from netloader.transports.gloo import GlooTransport
from netloader.transports.io import channel_state, thread_pool, worker
from netloader.transports.io.channel_state import ChannelState, LoopEvent, finished_within
from netloader.transports.shm import ShmTransport
from netloader.transports.tcp import TcpTransport
from tests.transports.pairs import opened

pytestmark = pytest.mark.usefixtures("no_leaked_descriptors")

TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "tcp": lambda: TcpTransport(lanes=2),
    "tcp-staged": lambda: TcpTransport(lanes=1, staged=1 << 16),
    "shm-read": ShmTransport,
    "shm-pipes": lambda: ShmTransport(reading=False),
    "gloo": GlooTransport,
    "faulty": lambda: FaultyTransport(TcpTransport(), Faults()),
}
over_each = pytest.mark.parametrize("make", TRANSPORTS.values(), ids=TRANSPORTS)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        *((thread_pool, "_PATIENCE"), (thread_pool, "_MOMENT"), (worker, "_PATIENCE"), (worker, "_AGAIN")),
        *((process_group, "_CLOSING"), (channel_state, "_SETTLING")),
    ):
        monkeypatch.setattr(module, name, 0.1)


class Stuck:
    """A call that blocks until it is released."""

    def __init__(self) -> None:
        self.inside = LoopEvent()
        self.entered = threading.Event()
        self.threads: set[threading.Thread] = set()
        self._go = threading.Event()

    def __call__(self, *_: object) -> None:
        self.threads.add(threading.current_thread())
        self.inside.set()
        self.entered.set()
        assert self._go.wait(30)

    def let_go(self) -> None:
        self._go.set()

    async def ended(self) -> None:
        """Wait until its threads have ended, after their channel was closed."""
        self.let_go()
        with anyio.fail_after(30):
            while any(thread.is_alive() for thread in self.threads):  # noqa: ASYNC110 - an end sets no event
                await anyio.sleep(0.001)


@pytest.fixture
async def stuck() -> AsyncIterator[Stuck]:
    made = Stuck()
    yield made
    made.let_go()


class StuckView(TensorBlockView):
    """A block whose memory does not answer, like a page of a file on a server that does not answer."""

    def __init__(self, stuck: Stuck) -> None:
        super().__init__(0, [bytes(1000)])
        self._stuck = stuck

    def buffers(self) -> Any:
        self._stuck()
        return super().buffers()

    def tensors(self) -> Any:
        self._stuck()
        return super().tensors()


def says(error: MemoryStillInUse, stuck: Stuck, *, writes: bool) -> bool:
    names = {thread.name for thread in stuck.threads}
    assert "end this process" in error.hint
    return error.writes is writes and names == set(error.threads) and min(names) in str(error) and error.lasts


async def cut_short(stuck: Stuck, call: Callable[[], Awaitable[None]]) -> MemoryStillInUse:
    """Make a call, cancel it when its thread is stuck, and return what it raises."""
    errors: list[MemoryStillInUse] = []

    async def make() -> None:
        try:
            await call()
        except MemoryStillInUse as error:
            errors.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make)
            await stuck.inside.wait()
            tasks.cancel_scope.cancel()
    (error,) = errors
    return error


def numbers(count: int) -> list[BlockView]:
    return [TensorBlockView(number, [bytes([number]) * 1000]) for number in range(count)]


@over_each
async def test_a_receive_that_does_not_return_raises_memory_still_in_use_as_long_as_it_runs(
    make: Callable[[], Transport], stuck: Stuck
) -> None:
    async with opened(make()) as (server, client):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_whatever_comes, server, numbers(4))
            error = await cut_short(stuck, lambda: client.recv(numbers(4), stuck))
            assert says(error, stuck, writes=True)
            for _ in range(2):
                with pytest.raises(MemoryStillInUse) as caught, anyio.fail_after(30):
                    await client.aclose()
                assert says(caught.value, stuck, writes=True)
            await server.aclose()
        await stuck.ended()
        assert not error.lasts
        await client.aclose()


async def _whatever_comes(channel: Channel, blocks: list[BlockView]) -> None:
    with suppress(PeerLost, ChannelClosed):  # the other end is closed during the call
        await channel.send(blocks)


@over_each
async def test_a_send_that_does_not_return_raises_memory_still_in_use(
    make: Callable[[], Transport], stuck: Stuck
) -> None:
    async with opened(make()) as (server, _):
        assert says(await cut_short(stuck, lambda: server.send([StuckView(stuck)])), stuck, writes=False)
        with pytest.raises(MemoryStillInUse) as caught, anyio.fail_after(30):
            await server.aclose()
        assert says(caught.value, stuck, writes=False)
        await stuck.ended()
        await server.aclose()


@over_each
async def test_closing_under_a_receive_that_is_stuck_is_bounded(make: Callable[[], Transport], stuck: Stuck) -> None:
    async with opened(make()) as (server, client):
        errors: list[Exception] = []

        async def receive() -> None:
            try:
                await client.recv(numbers(4), stuck)
            except Exception as error:  # noqa: BLE001 - checked below
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_whatever_comes, server, numbers(4))
            tasks.start_soon(receive)
            await stuck.inside.wait()
            with pytest.raises(MemoryStillInUse), anyio.fail_after(30):
                await client.aclose()
            await server.aclose()
            tasks.cancel_scope.cancel()
        assert [type(error) for error in errors] in ([MemoryStillInUse], [])  # raised by the call that ends first
        await stuck.ended()
        await client.aclose()


async def test_memory_still_in_use_outranks_the_error_of_another_thread(stuck: Stuck) -> None:
    def landed(view: BlockView) -> None:
        if view.number:
            assert stuck.entered.wait(30)
            raise ValueError("wrong bytes")
        stuck()

    async with opened(TcpTransport(lanes=2)) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(_whatever_comes, server, numbers(2))
        with pytest.raises(MemoryStillInUse), anyio.fail_after(30):
            await client.recv(numbers(2), landed)
        stuck.let_go()


@pytest.mark.parametrize("name", ["tcp", "tcp-staged", "shm-read", "shm-pipes"])
async def test_resources_of_a_stuck_thread_are_freed_when_it_returns(name: str, stuck: Stuck) -> None:
    before = set(open_descriptors())
    async with opened(TRANSPORTS[name]()) as (server, client):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_whatever_comes, server, numbers(4))
            await cut_short(stuck, lambda: client.recv(numbers(4), stuck))
            with pytest.raises(MemoryStillInUse):
                await client.aclose()
            await server.aclose()
        assert set(open_descriptors()) > before
        await stuck.ended()
        assert set(open_descriptors()) == before


async def test_an_operation_without_a_thread_is_bounded_as_well() -> None:
    state = ChannelState("test channel")
    leave = anyio.Event()

    async def receive() -> None:
        async with state.operation("recv"):
            await leave.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        state.end("it was closed", closed=True)
        with pytest.raises(MemoryStillInUse, match="test channel: an operation may still write") as caught:
            await state.idle()
        assert caught.value.lasts
        leave.set()
    await state.idle()


async def test_a_suspended_process_counts_as_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute in which the process is suspended does not count, because its threads were suspended too."""
    looks = 0

    async def never() -> None:
        nonlocal looks
        looks += 1
        clock.now += 100.0
        await anyio.sleep_forever()

    clock = _Clock(monkeypatch)
    assert not await finished_within(3.0, never)
    assert looks == 3


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self.now)
