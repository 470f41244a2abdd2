"""The thread pool of a channel: threads for each direction, started when they are first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.lowlevel

from netloader.errors import MemoryStillInUse
from netloader.transports.io.channel_state import finished_within
from netloader.transports.io.operation import Operation
from netloader.transports.io.worker import Job, Worker

__all__ = ["ThreadPool"]

_PATIENCE = 10.0
"""Seconds that threads may take to return after they were told to. Most return at once, and the others after the block
that they are hashing or reading. Only a system call that can't be interrupted takes longer, such as reading a page of a
file from a server that does not answer."""

_LOOK = 1.0
"""Seconds between two checks whether another thread of the operation failed; then this one has to return soon."""

_MOMENT = 0.5
"""Seconds that the other threads may take when one is stuck."""


class ThreadPool:
    """Threads that carry out the operations of a channel.

    Args:
        name: Name of the transport, used in the names of the threads.
        cut: Makes the threads' running calls return soon; callable from any thread, must not block.
    """

    def __init__(self, name: str, cut: Callable[[], None]) -> None:
        self._name = name
        self._cut = cut
        self._workers: dict[str, dict[int, Worker]] = {}
        self._closing = False
        self._left_to_threads = False

    async def run_all(self, direction: str, operation: Operation, works: Sequence[Callable[[], object] | None]) -> None:
        """Run all of `works` in parallel, the n-th in the n-th thread, and wait for all of them, even if cancelled.

        A thread finishes earlier work first. None means no work for that thread.

        Raises:
            MemoryStillInUse: After a failure or a cancellation a thread did not return.
            TransportError: No more threads can be started.
            BaseException: The first error of a thread.
        """
        workers = self._workers.setdefault(direction, {})
        jobs: list[tuple[Worker, Job[None]]] = []
        try:
            for place, work in enumerate(works):
                if work is None:
                    continue
                if place not in workers:  # threads are started on demand, because a small call needs fewer
                    workers[place] = Worker(f"netloader-{self._name}-{direction}-{place}", self._cut)
                jobs.append((workers[place], workers[place].start(partial(operation.run, work))))
            for _, job in jobs:
                while not (job.over.is_set() or operation.failed or self._closing):
                    with anyio.move_on_after(_LOOK):
                        await job.over.wait()
        except BaseException:
            self._cut()
            await self._wait_for_return(direction, jobs)
            raise
        await self._wait_for_return(direction, jobs)
        operation.check_error()
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def aclose(self, free: Callable[[], object]) -> None:
        """Stop and join the threads, then call `free`. Idempotent, as `free` has to be.

        Raises:
            MemoryStillInUse: A thread does not return. It will call `free` when it does.
        """
        self._closing = True
        everyone = [(worker, way) for way, workers in self._workers.items() for worker in workers.values()]
        for worker, _ in everyone:  # first tell all of them, so that they stop in parallel
            worker.end()
        if not any(worker.stuck for worker, _ in everyone):  # else they were waited for
            await finished_within(_PATIENCE, lambda: _all_ended([worker for worker, _ in everyone]))
        late = [(worker, way) for worker, way in everyone if not await worker.aclose(_MOMENT)]
        if not late:
            free()
            return
        if not self._left_to_threads:
            self._left_to_threads = True
            _free_after_last([worker for worker, _ in late], free)
        raise self._in_use([worker for worker, _ in late], writes=any(way == "recv" for _, way in late))

    async def _wait_for_return(self, direction: str, jobs: Sequence[tuple[Worker, Job[None]]]) -> None:
        """Wait for calls that end by themselves, or were interrupted.

        Raises:
            MemoryStillInUse: A call does not end.
        """

        async def all_over() -> None:
            for _, job in jobs:
                await job.over.wait()

        if all(job.over.is_set() for _, job in jobs) or await finished_within(_PATIENCE, all_over):
            return
        late = [worker for worker, job in jobs if not job.over.is_set()]
        for worker in late:
            worker.stuck = True
        raise self._in_use(late, writes=direction == "recv")

    def _in_use(self, late: Sequence[Worker], *, writes: bool) -> MemoryStillInUse:
        threads = [worker.thread for worker in late]
        return MemoryStillInUse(f"{self._name} channel", threads, writes=writes, seconds=_PATIENCE)


async def _all_ended(workers: Sequence[Worker]) -> None:
    for worker in workers:
        await worker.gone()


def _free_after_last(workers: Sequence[Worker], free: Callable[[], object]) -> None:
    """Have the last thread that ends call `free`, because the threads still use what it frees."""
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
