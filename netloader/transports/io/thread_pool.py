"""The threads of one channel: some for each direction, started when it is first used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.lowlevel

from netloader.errors import MemoryStillInUse
from netloader.transports.io.channel_state import came_in_time
from netloader.transports.io.operation import Operation
from netloader.transports.io.worker import Job, Worker

__all__ = ["ThreadPool"]

_PATIENCE = 10.0
"""Seconds that threads which were told to return may take: mostly they are back at once, and at the latest when the
block is hashed, or read out of the peer's memory, that they are busy with. What keeps one longer is a call into the
system that nothing ends, such as a page of a file on a server that does not answer."""

_LOOK = 1.0
"""Seconds between two looks whether others of an operation's threads have failed: then this one should be back soon."""

_MOMENT = 0.5
"""Seconds for the threads beside one that is stuck."""


class ThreadPool:
    """Threads that carry out the operations of a channel.

    Args:
        name: The transport's, for the names of the threads.
        cut: Makes whatever they are doing return soon; callable from any thread, must not block.
    """

    def __init__(self, name: str, cut: Callable[[], None]) -> None:
        self._name = name
        self._cut = cut
        self._workers: dict[str, dict[int, Worker]] = {}
        self._closing = False
        self._left_to_threads = False

    async def carry_out(
        self, direction: str, operation: Operation, works: Sequence[Callable[[], object] | None]
    ) -> None:
        """Do all of `works` at once, each in the thread of its place, and wait for all of them, cancelled or not.

        A thread first finishes what it was given before. None: nothing to do for the thread of that place.

        Raises:
            MemoryStillInUse: After a failure or a cancellation a thread did not return.
            BaseException: The first thing that one of them raised.
        """
        workers = self._workers.setdefault(direction, {})
        jobs: list[tuple[Worker, Job[None]]] = []
        for place, work in enumerate(works):
            if work is None:
                continue
            if place not in workers:  # a small call needs fewer, and each costs a start and an end
                workers[place] = Worker(f"netloader-{self._name}-{direction}-{place}", self._cut)
            jobs.append((workers[place], workers[place].start(partial(operation.run, work))))
        try:
            for _, job in jobs:
                while not (job.over.is_set() or operation.failed or self._closing):
                    with anyio.move_on_after(_LOOK):
                        await job.over.wait()
        except BaseException:
            self._cut()
            await self._bring_back(direction, jobs)
            raise
        await self._bring_back(direction, jobs)
        operation.check_error()
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def aclose(self, free: Callable[[], object]) -> None:
        """Let the threads end, and join them, then call `free`. Idempotent, as `free` has to be.

        Raises:
            MemoryStillInUse: One of them does not return. Whenever it does, it calls `free`.
        """
        self._closing = True
        everyone = [(worker, way) for way, workers in self._workers.items() for worker in workers.values()]
        for worker, _ in everyone:  # all of them first: they end beside each other
            worker.end()
        if not any(worker.stuck for worker, _ in everyone):  # else they were waited for
            await came_in_time(_PATIENCE, lambda: _all_gone([worker for worker, _ in everyone]))
        late = [(worker, way) for worker, way in everyone if not await worker.aclose(_MOMENT)]
        if not late:
            free()
            return
        if not self._left_to_threads:
            self._left_to_threads = True
            _leave_to([worker for worker, _ in late], free)
        raise self._in_use([worker for worker, _ in late], writes=any(way == "recv" for _, way in late))

    async def _bring_back(self, direction: str, jobs: Sequence[tuple[Worker, Job[None]]]) -> None:
        """Wait for calls that end by themselves, or were cut short.

        Raises:
            MemoryStillInUse: One of them does not end.
        """

        async def all_over() -> None:
            for _, job in jobs:
                await job.over.wait()

        if all(job.over.is_set() for _, job in jobs) or await came_in_time(_PATIENCE, all_over):
            return
        late = [worker for worker, job in jobs if not job.over.is_set()]
        for worker in late:
            worker.stuck = True
        raise self._in_use(late, writes=direction == "recv")

    def _in_use(self, late: Sequence[Worker], *, writes: bool) -> MemoryStillInUse:
        threads = [worker.thread for worker in late]
        return MemoryStillInUse(f"{self._name} channel", threads, writes=writes, seconds=_PATIENCE)


async def _all_gone(workers: Sequence[Worker]) -> None:
    for worker in workers:
        await worker.gone()


def _leave_to(workers: Sequence[Worker], free: Callable[[], object]) -> None:
    """Have `free` called by the last of the threads that ends: what they use is not to be taken from under them."""
    lock = threading.Lock()
    busy = len(workers)

    def ended() -> None:
        nonlocal busy
        with lock:
            busy -= 1
            last = not busy
        if last:
            free()

    for worker in workers:
        worker.last(ended)
