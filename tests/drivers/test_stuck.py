"""Transport threads that do not return: a pull whose memory they use fails with MemoryStillInUse, a server goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from netloader.client.pull import pull_from
from netloader.core.options import PullOptions
from netloader.discovery.fixed import FixedSources
from netloader.errors import MemoryStillInUse, NoSourceLeft
from netloader.session import closing
from netloader.tensors import destination, digest_of
from netloader.transports.base import Channel, Setup
from netloader.transports.io import stream, thread_pool, worker
from netloader.transports.io.channel_state import LoopEvent
from netloader.transports.io.syscalls import sendmsg
from netloader.transports.memory import MemoryTransport
from netloader.transports.tcp import TcpTransport
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        *((thread_pool, "_PATIENCE"), (thread_pool, "_MOMENT"), (worker, "_PATIENCE"), (worker, "_AGAIN")),
        (closing, "_CLOSING"),
    ):
        monkeypatch.setattr(module, name, 0.1)


class Stuck:
    """A call that blocks until it is released, but for the first `free` times."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.free = 0
        self.inside = LoopEvent()
        self.threads: set[threading.Thread] = set()
        self._call = call
        self._go = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        if self.free:
            self.free -= 1
            return self._call(*arguments)
        self.threads.add(threading.current_thread())
        self.inside.set()
        assert self._go.wait(30)
        return self._call(*arguments)

    async def release(self) -> None:
        self._go.set()
        with anyio.fail_after(30):
            while any(thread.is_alive() for thread in self.threads):  # noqa: ASYNC110 - an end sets no event
                await anyio.sleep(0.001)


@pytest.fixture
async def hashing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stuck]:
    """At the client: its threads block while they hash a landed block, before later blocks are written."""
    stuck = Stuck(digest_of)
    monkeypatch.setattr(kit, "digest_of", stuck)
    yield stuck
    await stuck.release()


async def test_no_other_source_is_used_while_a_stuck_thread_may_write_to_the_memory(
    hashing: Stuck, caplog: pytest.LogCaptureFixture
) -> None:
    transport = TcpTransport(lanes=1)
    async with kit.serving(transport, HOLDING) as first, kit.serving(transport, HOLDING) as second:
        with anyio.fail_after(kit.PATIENCE):
            async with anyio.create_task_group() as tasks:

                async def leave() -> None:
                    await hashing.inside.wait()
                    await first.retract(reason="its owner changes it", within=0.1)

                tasks.start_soon(leave)
                error = await _error_of_a_pull([first, second], transport)
        assert isinstance(error, MemoryStillInUse)
        assert error.writes
        assert set(error.threads) == {thread.name for thread in hashing.threads} == {"netloader-tcp-recv-0"}
        assert "thread netloader-tcp-recv-0 may still write into the memory that is being filled" in str(error)
        assert "end this process" in error.hint
        assert not second.ended
        assert not second.sessions
    assert "may still write into the memory" in caplog.text


async def _error_of_a_pull(sources: list[kit.WatchedServer], transport: Any, **options: Any) -> Exception | None:
    try:
        await kit.pull(kit.blank(SOURCE), [kit.at(source) for source in sources], transport, **options)
    except (MemoryStillInUse, NoSourceLeft) as error:
        return error
    return None


async def test_a_pull_that_times_out_with_a_stuck_thread_raises_memory_still_in_use(hashing: Stuck) -> None:
    transport = TcpTransport(lanes=2)
    async with kit.serving(transport, HOLDING) as server:
        with anyio.fail_after(kit.PATIENCE):
            error = await _error_of_a_pull([server], transport, timeout=0.5)
    assert isinstance(error, MemoryStillInUse)
    assert hashing.threads


async def test_a_pull_cancelled_with_a_stuck_thread_raises_memory_still_in_use(hashing: Stuck) -> None:
    transport = TcpTransport(lanes=2)
    async with kit.serving(transport, HOLDING) as server:
        errors: list[Exception | None] = []
        async with anyio.create_task_group() as tasks:

            async def pull() -> None:
                errors.append(await _error_of_a_pull([server], transport))

            tasks.start_soon(pull)
            with anyio.fail_after(kit.PATIENCE):
                await hashing.inside.wait()
            tasks.cancel_scope.cancel()
    assert [type(error) for error in errors] == [MemoryStillInUse]


class _NeverCloses(MemoryTransport):
    """A third-party transport whose channels cannot be closed at the client."""

    def __init__(self, close: Callable[[], Any]) -> None:
        super().__init__()
        self._close = close

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        channel: Any = await super().connect(offer, setup)
        close = channel.aclose

        async def aclose() -> None:
            await close()
            await self._close()

        channel.aclose = aclose
        return channel  # type: ignore[no-any-return]


async def _broken() -> None:
    raise OSError("a bug")


@pytest.mark.parametrize("close", [_broken, anyio.sleep_forever], ids=["raises", "hangs"])
async def test_complete_weights_are_not_returned_while_a_thread_may_still_write(
    close: Callable[[], Any],
) -> None:
    transport = _NeverCloses(close)
    async with kit.serving(transport, HOLDING) as server:
        with anyio.fail_after(kit.PATIENCE):
            error = await _error_of_a_pull([server], transport)
    assert isinstance(error, MemoryStillInUse)
    assert error.writes
    assert "memory channel: an operation may still write" in str(error)


async def test_a_stuck_send_ends_its_session_only_and_retraction_reports_memory_still_in_use(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Like a page of a file on a server that does not answer: the thread blocks in a system call for ever."""
    stuck = Stuck(sendmsg)
    monkeypatch.setattr(stream, "sendmsg", stuck)
    transport = TcpTransport(lanes=1)
    caplog.set_level(logging.ERROR, "netloader")
    try:
        async with kit.serving(transport, HOLDING, stop_within=0.1) as server:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_error_of_a_pull, [server], transport)
                with anyio.fail_after(kit.PATIENCE):
                    await stuck.inside.wait()
                    await server.retract(reason="its owner changes it", within=0.1)
                    await kit.until(lambda: not server.sessions)
                tasks.cancel_scope.cancel()
            assert server._turns.taken == 0
            told = [record.message for record in caplog.records if "not free to change" in record.message]
            assert told, caplog.text
            assert "thread netloader-tcp-send-0 may still read the memory being sent" in caplog.text
            server.add(HOLDING)
            caplog.clear()
            with anyio.fail_after(kit.PATIENCE):
                await server.retract(reason="once more", within=0.1)
            assert [record.message.partition(" may ")[0] for record in caplog.records] == [
                "the memory of the target is not free to change: tcp channel: thread netloader-tcp-send-0"
            ]
            await stuck.release()
            server.add(HOLDING)
            caplog.clear()
            await server.retract(reason="once more", within=0.1)
            assert not caplog.text
    finally:
        await stuck.release()


class _Relay:
    """A relay whose retraction goes on until it is cancelled."""

    port = 1

    def __init__(self) -> None:
        self.retracting = anyio.Event()

    def add(self, holding: Any, supply: Any = None) -> None:
        """Do nothing: no client connects."""

    async def retract(self, role: Any, **options: Any) -> None:
        self.retracting.set()
        await anyio.sleep_forever()


async def test_memory_still_in_use_is_raised_although_retraction_of_the_relay_is_cancelled(hashing: Stuck) -> None:
    """By asyncio's own cancellation, against which there is no shield."""
    transport, relay = TcpTransport(lanes=2), _Relay()
    hashing.free = 1  # a relay begins with the first verified block
    async with kit.serving(transport, HOLDING) as server:
        options = PullOptions()
        pull = asyncio.create_task(
            pull_from(
                destination(kit.blank(SOURCE)),
                kit.IDENTITY,
                FixedSources([kit.at(server)]),
                [transport],
                hashing,
                options,
                relay=relay,
            )
        )
        with anyio.fail_after(kit.PATIENCE):
            await hashing.inside.wait()
            pull.cancel()
            await relay.retracting.wait()
            pull.cancel()
            with pytest.raises(MemoryStillInUse):
                await pull
