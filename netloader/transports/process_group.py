"""A channel over the point-to-point operations of a collective library: the part that gloo and HCCL have in common.

Such a library moves one tensor with each operation, blocks the calling thread while it waits, and does not know blocks.
This module has the window of operations in flight, the packing of blocks with many spans, the waiting thread, and the
stall detection. A :class:`Link` makes a group of two, and unblocks calls in it.
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
from netloader.transports.io.channel_state import ChannelState, finished_within
from netloader.transports.io.worker import Job, Worker

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_STAGED", "WINDOW", "Link", "LinkChannel"]

WINDOW = 16
"""Operations in flight in one direction; more gained little (docs/transports.md)."""

MAX_STAGED = 16 << 20
"""Most bytes of packed blocks in flight in one direction; a larger block is sent alone."""

_CLOSING = 10.0
"""Seconds that freeing a group and its threads may take before an error is logged."""

_FREED = 40.0
"""Seconds that a second call of `aclose` waits for the first one, whose own waits take no longer."""

_log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Any
"""The library's handle of a started operation."""


class Link(ABC):
    """A group of two ranks of a collective library, with the library's own behaviour.

    All methods except :meth:`abort` and :meth:`progress` are called in the channel's threads and may block.

    Attributes:
        device: Device of the tensors.
        max_staged: Most bytes of staged blocks in flight in one direction; a larger block is sent alone.
        lands_in_place: Whether bytes are received directly into the caller's memory. Otherwise they are received into
            staging memory, for libraries whose operations can't be cancelled.
    """

    device: str
    max_staged: int = MAX_STAGED
    lands_in_place: bool = True

    def enter(self) -> None:
        """Called first in a thread that did not open the link, for example to choose the thread's device."""
        return

    def stage(self, nbytes: int) -> torch.Tensor:
        """Allocate staging memory.

        Raises:
            TransportError: There is not enough memory.
        """
        return staging_for(nbytes, self.device)

    def reaches(self, block: BlockView) -> bool:
        """Whether a block can be sent from its own memory. Otherwise it is copied to staging memory first."""
        del block
        return True

    def pack(self, block: BlockView, staging: torch.Tensor) -> torch.Tensor:
        """Gather a block; see :func:`netloader.codecs.packed.pack`."""
        return pack(block, staging)

    def unpack(self, staging: torch.Tensor, block: BlockView) -> None:
        """Scatter a block, and wait until the host can read it; see :func:`netloader.codecs.packed.unpack`."""
        unpack(staging, block)

    @abstractmethod
    def send(self, tensor: torch.Tensor) -> Work:
        """Start sending a one-dimensional contiguous ``uint8`` tensor; the peer receives one of the same length.

        Raises:
            TransportError: It can't be started.
        """

    @abstractmethod
    def recv(self, tensor: torch.Tensor) -> Work:
        """Start filling a tensor; the counterpart of :meth:`send`."""

    @abstractmethod
    def finish(self, work: Work) -> None:
        """Wait until an operation has ended and the host can read its bytes.

        Raises:
            TransportError: It failed, or :meth:`abort` was called.
        """

    @abstractmethod
    def progress(self) -> int:
        """A number that grows while bytes move in either direction. Any thread; must not block."""

    @abstractmethod
    def abort(self) -> None:
        """Make every blocked and every later call fail at once, here and at the peer. Any thread; must not block."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent. No byte is written into any tensor after it returns."""


@dataclass(slots=True)
class _InFlight:
    """An operation in flight."""

    block: BlockView
    work: Work | None = None
    staged: torch.Tensor | None = None


class _Staging:
    """A pool of staging memory for one direction, because allocating memory costs more than the copy."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: list[torch.Tensor] = []
        self.used = 0

    def fits(self, nbytes: int) -> bool:
        """Whether another block of this size may be staged now."""
        return self.used == 0 or self.used + nbytes <= self._link.max_staged

    def take(self, nbytes: int) -> torch.Tensor:
        """Memory for at least `nbytes` bytes."""
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
        """Return memory from :meth:`take`."""
        self.used -= tensor.numel()
        self._free.append(tensor)

    def clear(self) -> None:
        """Free what is not in use. The traceback of a kept error may keep this object alive."""
        self._free.clear()


class LinkChannel:
    """A :class:`~netloader.transports.base.Channel` over a link.

    Each block that is not empty is one operation: a single span in place, or several spans packed into one staging
    tensor. At most :data:`WINDOW` operations are in flight in one direction.

    Args:
        link: An open link.
        worker: The thread in which it was opened. The channel owns it from now on.
        stall: Seconds that an operation may go without progress.
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
            await finished_within(_FREED, self._freed.wait)
        late = [worker.thread for worker in self._late if worker.thread.is_alive()]
        if late and (self._writes or "send" in self._lent):
            raise MemoryStillInUse(self._state.name, late, writes=self._writes, seconds=_CLOSING)

    async def _free(self) -> None:
        with suppress(MemoryStillInUse):  # its thread is named below
            await self._state.idle()
        for staging in self._staging.values():
            staging.clear()
        # In the worker thread, because a library's own threads need some milliseconds to end.
        freeing = self._workers[0].start(partial(self._close_link, [blocks for _, blocks in self._lent.values()]))
        for worker in self._workers:
            if not await worker.aclose(_CLOSING):
                _log.error("thread %s still runs %g s after its channel was closed", worker.name, _CLOSING)
                self._late.append(worker)
        if freeing.over.is_set() and freeing.error is not None:
            _log.error("%s could not be freed", self._workers[0].name, exc_info=freeing.error)

    def _close_link(self, lent: Sequence[Sequence[BlockView]]) -> None:
        """Free the link. `lent` stays alive until then, because a library may still have its address."""
        self._link.close()
        del lent

    @property
    def _writes(self) -> bool:
        """Whether a thread that does not end may write into a caller's memory."""
        if "recv" not in self._lent:
            return False
        job, _ = self._lent["recv"]
        return self._link.lands_in_place or not job.over.is_set()

    async def _run(self, direction: str, move: Callable[[list[BlockView]], T], blocks: list[BlockView]) -> T:
        worker = self._used.get(direction)
        if worker is None:
            if not self._used:
                worker = self._workers[0]
            else:  # the other direction uses the first thread
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
                raise TransferTimeout(f"{waits} for {self._stall:g} s", hint="check that the peer is still running")

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
        flights: deque[_InFlight] = deque()
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
        flights: deque[_InFlight] = deque()
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
        flights: deque[_InFlight],
        staging: _Staging,
        land: Callable[[], None],
        *,
        in_place: bool,
    ) -> _InFlight:
        """Wait for room for one more operation. Returns staging memory, if the block can't be sent from its own."""
        while len(flights) >= WINDOW:
            land()
        if block.nbytes == 0 or in_place:
            return _InFlight(block)
        while not staging.fits(block.nbytes):
            land()
        return _InFlight(block, staged=staging.take(block.nbytes))

    def _give_up(self, flights: deque[_InFlight]) -> None:
        """Return only when no posted operation can access memory any more."""
        self._link.abort()
        while flights:
            work = flights.popleft().work
            if work is not None:
                try:
                    self._link.finish(work)
                except TransportError as error:
                    _log.debug("given up: %s", error)
