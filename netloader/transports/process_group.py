"""A channel over a collective library's point-to-point operations: what gloo and its relatives have in common.

Such a library moves one tensor for each operation, blocks the calling thread while it waits, and has no notion of a
block. Here are the window of operations in flight, the packing of blocks with many spans, the thread that waits, and
the watch on progress. A :class:`Link` adds how a group of two is made, and how a blocked call in it is freed.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from netloader.codecs.packed import pack, staging_for, unpack, worth_packing
from netloader.errors import MemoryStillInUse, TransferTimeout, TransportError
from netloader.transports.base import BlockView, Landed
from netloader.transports.io.channel_state import ChannelState, came_in_time
from netloader.transports.io.worker import Job, Worker

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_STAGED", "WINDOW", "Link", "LinkChannel"]

WINDOW = 16
"""Operations in flight in one direction; more gained little (docs/transports.md)."""

MAX_STAGED = 16 << 20
"""Bytes of packed blocks in flight in one direction; a larger block goes alone."""

_CLOSING = 10.0
"""Seconds that freeing a group and its threads may take before we say that it does not end."""

_FREED = 40.0
"""Seconds that a second call of `aclose` waits for the first one, whose own waits take no longer."""

_log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Any
"""The library's handle of a started operation."""


class Link(ABC):
    """Two ranks of a collective library, and what is particular about it.

    Everything but :meth:`abort` and :meth:`progress` is called in the channel's threads and may block there.

    Attributes:
        device: Where the tensors live.
        max_staged: Bytes of staged blocks in flight in one direction; a larger block goes alone.
        lands_in_place: Whether bytes may be received straight into a caller's memory; otherwise into staging memory,
            for libraries whose operations cannot be called back once they were started.
    """

    device: str
    max_staged: int = MAX_STAGED
    lands_in_place: bool = True

    def enter(self) -> None:
        """First act in a thread that did not open the link (choosing the device, where that is per thread)."""
        return

    def stage(self, nbytes: int) -> torch.Tensor:
        """Fresh staging memory.

        Raises:
            TransportError: There is none.
        """
        return staging_for(nbytes, self.device)

    def reaches(self, block: BlockView) -> bool:
        """Whether a block's memory can be sent from where it is; else it is gathered in staging memory first."""
        del block
        return True

    def pack(self, block: BlockView, staging: torch.Tensor) -> torch.Tensor:
        """Gather a block; see :func:`netloader.codecs.packed.pack`."""
        return pack(block, staging)

    def unpack(self, staging: torch.Tensor, block: BlockView) -> None:
        """Spread a block, so that the host can see it; see :func:`netloader.codecs.packed.unpack`."""
        unpack(staging, block)

    @abstractmethod
    def send(self, tensor: torch.Tensor) -> Work:
        """Start sending a one-dimensional contiguous ``uint8`` tensor; the peer receives one of the same length.

        Raises:
            TransportError: It can't be started any more.
        """

    @abstractmethod
    def recv(self, tensor: torch.Tensor) -> Work:
        """Start filling a tensor; the counterpart of :meth:`send`."""

    @abstractmethod
    def finish(self, work: Work) -> None:
        """Wait until an operation has ended and its bytes can be seen by the host.

        Raises:
            TransportError: It failed; also after :meth:`abort`.
        """

    @abstractmethod
    def progress(self) -> int:
        """A number that grows while bytes move in either direction. Any thread; must not block."""

    @abstractmethod
    def abort(self) -> None:
        """Make every blocked and every later call fail at once, here and at the peer. Any thread; must not block."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent; after it no byte lands in any tensor."""


@dataclass(slots=True)
class _Flight:
    """An operation under way."""

    block: BlockView
    work: Work | None = None
    staged: torch.Tensor | None = None


class _Staging:
    """Memory for packed blocks of one direction, used again and again: fresh memory costs more than the copy."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: list[torch.Tensor] = []
        self.used = 0

    def fits(self, nbytes: int) -> bool:
        """Whether another block may be staged now."""
        return self.used == 0 or self.used + nbytes <= self._link.max_staged

    def take(self, nbytes: int) -> torch.Tensor:
        """Memory for `nbytes` bytes, perhaps more."""
        for index, tensor in enumerate(self._free):
            if tensor.numel() >= nbytes:
                del self._free[index]
                break
        else:
            self._free.clear()
            tensor = self._link.stage(nbytes)
        self.used += tensor.numel()
        return tensor

    def give(self, tensor: torch.Tensor) -> None:
        """Memory from :meth:`take` that is free again."""
        self.used -= tensor.numel()
        self._free.append(tensor)


class LinkChannel:
    """A :class:`~netloader.transports.base.Channel` over a link.

    Each block that has any bytes is one operation: its only span in place, or all its spans packed into one staging
    tensor. At most :data:`WINDOW` operations are in flight in one direction.

    Args:
        link: Open already.
        worker: The thread in which it was opened; the channel's from now on.
        stall: Seconds that an operation may go without any progress.
    """

    depth = 1
    whole_blocks = True

    def __init__(self, link: Link, worker: Worker, stall: float) -> None:
        self._link = link
        self._stall = stall
        self._state = ChannelState(f"channel ({worker.name})")
        self._workers = [worker]
        self._used: dict[str, Worker] = {}
        self._staging = {direction: _Staging(link) for direction in ("send", "recv")}
        self._steps = 0
        self._freed: anyio.Event | None = None
        self._lent: dict[str, tuple[Job[Any], Sequence[BlockView]]] = {}  # of calls that have not succeeded
        self._late: list[Worker] = []

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("send", self._link.abort):
            await self._run("send", self._send, list(blocks))

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("recv", self._link.abort):
            await self._run("recv", partial(self._recv, landed), list(blocks))

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        self._state.end("it was closed", closed=True)
        self._link.abort()
        if self._freed is None:
            self._freed = anyio.Event()
            try:
                await self._free()
            finally:
                self._freed.set()
        else:
            await came_in_time(_FREED, self._freed.wait)
        late = [worker.thread for worker in self._late if worker.thread.is_alive()]
        if late and (self._writes or "send" in self._lent):
            raise MemoryStillInUse(self._state.name, late, writes=self._writes, seconds=_CLOSING)

    async def _free(self) -> None:
        with suppress(MemoryStillInUse):  # its thread is named below
            await self._state.idle()
        self._staging.clear()
        # In the thread: it takes a library's own threads some milliseconds to notice that they shall end.
        freeing = self._workers[0].start(partial(self._close_link, [blocks for _, blocks in self._lent.values()]))
        for worker in self._workers:
            if not await worker.aclose(_CLOSING):
                _log.error("thread %s still runs %g s after its channel was closed", worker.name, _CLOSING)
                self._late.append(worker)
        if freeing.over.is_set() and freeing.error is not None:
            _log.error("%s could not be freed", self._workers[0].name, exc_info=freeing.error)

    def _close_link(self, lent: Sequence[Sequence[BlockView]]) -> None:
        """Free the link; `lent` stays alive until then, for libraries that still know where it is."""
        self._link.close()
        del lent

    @property
    def _writes(self) -> bool:
        """Whether a thread that does not end may write into memory that was lent."""
        if "recv" not in self._lent:
            return False
        job, _ = self._lent["recv"]
        return self._link.lands_in_place or not job.over.is_set()

    async def _run(self, direction: str, move: Callable[[list[BlockView]], T], blocks: list[BlockView]) -> T:
        worker = self._used.get(direction)
        if worker is None:
            if not self._used:
                worker = self._workers[0]
            else:  # the other direction has the first thread
                worker = Worker(f"{self._workers[0].name}-{direction}", self._link.abort)
                self._workers.append(worker)
                await worker.run(self._link.enter)
            self._used[direction] = worker
        seen, since = self._moved(), anyio.current_time()

        def watch() -> None:
            nonlocal seen, since
            moved, now = self._moved(), anyio.current_time()
            if moved != seen:
                seen, since = moved, now
            elif now - since >= self._stall:
                waits = "the peer takes no bytes" if direction == "send" else "the peer sends no bytes"
                raise TransferTimeout(f"{waits} for {self._stall:g} s", hint="is the peer still alive?")

        job = worker.start(partial(move, blocks))
        self._lent[direction] = job, blocks
        try:
            result = await worker.finish(job, watch, every=min(self._stall / 4, 1.0))
        except BaseException as error:
            if not job.over.is_set():
                raise MemoryStillInUse(
                    self._state.name, [worker.thread], writes=direction == "recv", seconds=worker.patience
                ) from error
            raise
        del self._lent[direction]  # all of it has moved
        return result

    def _moved(self) -> tuple[int, int]:
        return self._link.progress(), self._steps

    def _send(self, blocks: list[BlockView]) -> None:
        flights: deque[_Flight] = deque()
        staging = self._staging["send"]

        def land() -> None:
            flight = flights[0]
            self._link.finish(flight.work)
            if flight.staged is not None:
                staging.give(flight.staged)
            flights.popleft()

        try:
            for block in blocks:
                if block.nbytes == 0:
                    continue
                in_place = not worth_packing(block) and self._link.reaches(block)
                flight = self._staged(block, flights, staging, land, in_place=in_place)
                tensor = block.tensors()[0] if flight.staged is None else self._link.pack(block, flight.staged)
                flight.work = self._link.send(tensor)
                flights.append(flight)
            while flights:
                land()
        except BaseException:
            self._give_up(flights)
            raise

    def _recv(self, landed: Landed | None, blocks: list[BlockView]) -> None:
        flights: deque[_Flight] = deque()
        staging = self._staging["recv"]

        def land() -> None:
            flight = flights[0]
            if flight.work is not None:
                self._link.finish(flight.work)
            flights.popleft()
            if flight.staged is not None:
                self._link.unpack(flight.staged, flight.block)
                staging.give(flight.staged)
            if landed is not None:
                landed(flight.block)
            self._steps += 1

        try:
            for block in blocks:
                in_place = self._link.lands_in_place and not worth_packing(block)
                flight = self._staged(block, flights, staging, land, in_place=in_place)
                if block.nbytes:
                    into = block.tensors()[0] if flight.staged is None else flight.staged[: block.nbytes]
                    flight.work = self._link.recv(into)
                flights.append(flight)
            while flights:
                land()
        except BaseException:
            self._give_up(flights)
            raise

    def _staged(
        self,
        block: BlockView,
        flights: deque[_Flight],
        staging: _Staging,
        land: Callable[[], None],
        *,
        in_place: bool,
    ) -> _Flight:
        """Room for one more operation, and staging memory for its block, if it can't go in place."""
        while len(flights) >= WINDOW:
            land()
        if block.nbytes == 0 or in_place:
            return _Flight(block)
        while not staging.fits(block.nbytes):
            land()
        return _Flight(block, staged=staging.take(block.nbytes))

    def _give_up(self, flights: deque[_Flight]) -> None:
        """Return only when nothing that was posted can touch memory any more."""
        self._link.abort()
        while flights:
            work = flights.popleft().work
            if work is not None:
                try:
                    self._link.finish(work)
                except TransportError as error:
                    _log.debug("given up: %s", error)
