"""The threads of one channel: some for each direction, started when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.lowlevel

from netloader.transports._landing import Operation
from netloader.transports._worker import Worker

__all__ = ["Crew"]

_CLOSE_SECONDS = 10.0
"""Seconds that closing waits for a thread; it comes back at once, unless whoever is told about blocks takes long."""


class Crew:
    """Threads that carry out the operations of a channel.

    Args:
        name: The transport's, for the names of the threads.
        cut: Makes whatever they are doing return soon; callable from any thread, must not block.
    """

    def __init__(self, name: str, cut: Callable[[], None]) -> None:
        self._name = name
        self._cut = cut
        self._workers: dict[str, dict[int, Worker]] = {}

    async def carry_out(
        self, direction: str, operation: Operation, works: Sequence[Callable[[], object] | None]
    ) -> None:
        """Do all of `works` at once, each in the thread of its place, and wait for all of them, cancelled or not.

        A thread first finishes what it was given before. None: nothing to do for the thread of that place.

        Raises:
            BaseException: The first thing that one of them raised.
        """
        workers = self._workers.setdefault(direction, {})
        jobs = []
        for place, work in enumerate(works):
            if work is None:
                continue
            if place not in workers:  # a small call needs fewer, and each costs a start and an end
                workers[place] = Worker(f"netloader-{self._name}-{direction}-{place}", self._cut)
            jobs.append(workers[place].start(partial(operation.run, work)))
        try:
            for job in jobs:
                await job.over.wait()
        except BaseException:
            self._cut()
            with anyio.CancelScope(shield=True):
                for job in jobs:
                    await job.over.wait()
            raise
        operation.check_error()
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def aclose(self) -> None:
        """Let the threads end, and join them. Idempotent."""
        everyone = [worker for workers in self._workers.values() for worker in workers.values()]
        for worker in everyone:  # all of them first: they end beside each other
            worker.end()
        for worker in everyone:
            await worker.aclose(_CLOSE_SECONDS)
