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
        self._workers: dict[str, list[Worker]] = {}

    async def carry_out(
        self, direction: str, operation: Operation, works: Sequence[Callable[[], object] | None]
    ) -> None:
        """Do all of `works` at once, each in the thread of its place, and wait for all of them, cancelled or not.

        A thread first finishes what it was given before. None: nothing to do for the thread of that place.

        Raises:
            BaseException: The first thing that one of them raised.
        """
        workers = self._workers.setdefault(direction, [])
        while len(workers) < len(works):
            workers.append(Worker(f"netloader-{self._name}-{direction}-{len(workers)}", self._cut))
        jobs = [
            worker.start(partial(operation.run, work))
            for worker, work in zip(workers, works, strict=False)  # a small call needs fewer
            if work is not None
        ]
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
        for workers in self._workers.values():
            for worker in workers:
                await worker.aclose(_CLOSE_SECONDS)
