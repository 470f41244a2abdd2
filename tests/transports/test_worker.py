from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import anyio
import pytest

from netloader.errors import ChannelClosed
from netloader.transports.io.channel_state import ChannelState, LoopEvent
from netloader.transports.io.worker import Worker


class Blocked:
    """A call that blocks until it is freed, like one in a foreign library."""

    def __init__(self) -> None:
        self.running = LoopEvent()
        self._freed = threading.Event()

    def __call__(self) -> str:
        self.running.set()
        assert self._freed.wait(30)
        return threading.current_thread().name

    def free(self) -> None:
        self._freed.set()


async def test_calls_run_in_order_in_one_named_thread() -> None:
    worker = Worker("netloader-test", lambda: None)
    seen: list[int] = []
    calls: list[Callable[[], None]] = [lambda number=number: seen.append(number) for number in range(5)]  # type: ignore[misc]
    jobs = [worker.start(call) for call in calls]
    assert await worker.run(lambda: threading.current_thread().name) == "netloader-test"
    assert seen == list(range(5))
    assert all(job.over.is_set() for job in jobs)
    assert await worker.aclose(10)
    with pytest.raises(ChannelClosed, match="closed"):
        worker.start(lambda: None)


async def test_the_error_of_a_call_is_raised_and_keeps_no_reference() -> None:
    class Large:
        pass

    kept: list[weakref.ref[Large]] = []

    def call() -> None:
        large = Large()
        kept.append(weakref.ref(large))
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    worker = Worker("netloader-test", lambda: None)
    with pytest.raises(ValueError, match="outer") as caught:
        await worker.run(call)
    gc.collect()
    assert kept[0]() is None
    assert isinstance(caught.value.__cause__, KeyError)
    await worker.aclose(10)


async def test_cancelling_frees_the_call_and_waits_for_it() -> None:
    blocked = Blocked()
    worker = Worker("netloader-test", blocked.free)
    job = worker.start(blocked)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.finish, job)
        await blocked.running.wait()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert job.over.is_set()
    assert await worker.aclose(10)


async def test_a_watch_that_raises_frees_the_call() -> None:
    blocked = Blocked()
    worker = Worker("netloader-test", blocked.free)
    seen = []

    def watch() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise TimeoutError("enough")

    job = worker.start(blocked)
    with pytest.raises(TimeoutError, match="enough"):
        await worker.finish(job, watch, every=0.001)
    assert job.over.is_set()
    assert await worker.aclose(10)


async def test_a_thread_that_does_not_end_is_logged() -> None:
    blocked = Blocked()
    worker = Worker("netloader-test", lambda: None)
    worker.start(blocked)
    assert not await worker.aclose(0.01)
    blocked.free()
    assert await worker.aclose(10)


async def test_setting_a_loop_event_of_an_ended_loop_does_nothing() -> None:
    events: list[LoopEvent] = []

    async def main() -> None:
        events.append(LoopEvent())

    await anyio.to_thread.run_sync(anyio.run, main)
    events[0].set()
    assert not events[0].is_set()


async def test_the_first_reason_for_an_end_stays() -> None:
    state = ChannelState("test channel")
    assert state.end("first")
    assert not state.end("second", closed=True)
    assert "first" in str(state.closed())
