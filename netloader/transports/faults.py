"""Fault injection: a wrapper for any transport that drops, delays, truncates or corrupts chosen blocks.

A fault on the sending side changes only the bytes that are sent, never the caller's memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import anyio

from netloader.errors import ConfigError, PeerLost
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup, Transport
from netloader.transports.contract_0_1 import adapted
from netloader.transports.fault_blocks import copy_of, flip, head
from netloader.transports.io.channel_state import ChannelState

__all__ = ["Fault", "FaultKind", "Faults", "FaultyTransport", "Side"]

_LOOK_EVERY = 0.02
"""Seconds between two checks for the file that ends a hold."""


_CLOSING = 60.0
"""Seconds that closing the wrapped channel may take. A transport that keeps the contract needs less."""

_NUMBER = re.compile("[0-9]{1,12}")


class FaultKind(StrEnum):
    """The kinds of faults."""

    DROP = "drop"
    """The block is not sent; later blocks are."""
    DELAY = "delay"
    """The block is delayed by `seconds`."""
    CUT = "cut"
    """The channel is closed after `byte` bytes of the block (after 0 where the transport moves whole blocks only)."""
    CORRUPT = "corrupt"
    """One bit of the block's byte `byte` is flipped. A byte past the end of the block changes nothing."""
    SWAP = "swap"
    """The block and block `other` are exchanged; both have one size and are in one call of send."""
    TRUNCATE = "truncate"
    """Only the first `byte` bytes of the block are sent."""
    STALL = "stall"
    """Nothing moves from this block on, until the channel is closed."""
    HOLD = "hold"
    """The block is sent; later blocks wait until the hold ends (see :class:`Fault`)."""


class Side(StrEnum):
    """The operation in which a fault occurs."""

    SEND = "send"
    RECV = "recv"


_SEND_ONLY = (FaultKind.DROP, FaultKind.SWAP, FaultKind.TRUNCATE)
_BEFORE = (FaultKind.DELAY, FaultKind.CUT, FaultKind.STALL)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: Kind of fault.
        block: Number of the block.
        side: Whether it occurs in ``send`` or in ``recv``. Drop, swap and truncate exist for sending only.
        byte: Which byte of the block, counted from 0, for kinds that need one.
        other: The second block of a swap.
        seconds: Duration of a delay.
        until: What ends a hold: a ``threading.Event``, or a path at which a file appears. None: :meth:`Faults.release`.
        times: How often it occurs; None for every time that the block is moved.
    """

    kind: FaultKind
    block: int
    side: Side = Side.SEND
    byte: int = 0
    other: int | None = None
    seconds: float = 0.0
    until: threading.Event | Path | None = None
    times: int | None = 1

    def __post_init__(self) -> None:
        if self.side is Side.RECV and self.kind in _SEND_ONLY:
            raise ConfigError(field="Fault.side", value=self.side, allowed=f"send, for {self.kind}")
        if self.kind is FaultKind.SWAP and self.other is None:
            raise ConfigError(field="Fault.other", value=None, allowed="the number of the block to swap with")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse the form of the command line: ``corrupt:BLOCK[:BYTE]``, ``cut:BLOCK[:BYTE]`` or ``stall:BLOCK``.

        Raises:
            ConfigError: `text` has another form.
        """
        kind, *numbers = text.split(":")
        longest = {"corrupt": 2, "cut": 2, "stall": 1}.get(kind, 0)
        if not (1 <= len(numbers) <= longest and all(_NUMBER.fullmatch(number) for number in numbers)):
            raise ConfigError(
                field="fault", value=text, allowed="corrupt:BLOCK[:BYTE], cut:BLOCK[:BYTE] or stall:BLOCK, from 0"
            )
        return cls(FaultKind(kind), int(numbers[0]), byte=int(numbers[1]) if len(numbers) > 1 else 0)


class Faults:
    """The faults of one or several channels, and a list of those that occurred.

    May be shared by transports, event loops and threads.

    Args:
        faults: The faults. Several of one block occur in this order.
    """

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._left = {fault: fault.times for fault in faults}
        self._fired: list[Fault] = []
        self._released = threading.Event()

    @classmethod
    def parse(cls, text: str) -> Faults:
        """The one fault that `text` describes; see :meth:`Fault.parse`."""
        return cls([Fault.parse(text)])

    @property
    def fired(self) -> tuple[Fault, ...]:
        """The faults that occurred, in order, once for each time."""
        with self._lock:
            return tuple(self._fired)

    def release(self) -> None:
        """End every hold whose `until` is None, now and in the future."""
        self._released.set()

    def take(self, side: Side, block: int, nbytes: int) -> list[Fault]:
        """Take the faults, except swaps, of this block of `nbytes` bytes; they are counted as occurred."""
        with self._lock:
            struck = [
                fault
                for fault in self._left
                if fault.side is side
                and fault.block == block
                and fault.kind is not FaultKind.SWAP
                and not (fault.kind is FaultKind.CORRUPT and fault.byte >= nbytes)
            ]
            return [fault for fault in struck if self._count(fault)]

    def swap(self, blocks: Sequence[BlockView]) -> list[tuple[int, BlockView]]:
        """The blocks of one call, each with the number of the block that it is sent as; swaps count as occurred."""
        outgoing = list(blocks)
        at = {block.number: index for index, block in enumerate(blocks)}
        with self._lock:
            for fault in self._left:
                one, other = at.get(fault.block), at.get(-1 if fault.other is None else fault.other)
                if fault.kind is not FaultKind.SWAP or one is None or other is None:
                    continue
                if outgoing[one].nbytes == outgoing[other].nbytes and self._count(fault):
                    outgoing[one], outgoing[other] = outgoing[other], outgoing[one]
        return [(block.number, sent) for block, sent in zip(blocks, outgoing, strict=True)]

    def over(self, fault: Fault) -> bool:
        """Whether a hold has ended."""
        if fault.until is None:
            return self._released.is_set()
        return fault.until.exists() if isinstance(fault.until, Path) else fault.until.is_set()

    def _count(self, fault: Fault) -> bool:
        left = self._left[fault]
        if left == 0:
            return False
        if left is not None:
            self._left[fault] = left - 1
        self._fired.append(fault)
        return True


class FaultyTransport:
    """A transport whose channels have faults, at each end where this object is used.

    Args:
        inner: The wrapped transport.
        faults: The faults.
        name: Its name; by default that of `inner`, so that it can connect to peers without faults.
    """

    def __init__(self, inner: Transport, faults: Faults, *, name: str | None = None) -> None:
        self.name = inner.name if name is None else name
        self._inner = adapted(inner)
        self._faults = faults

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        return self._inner.missing(device)

    def facts(self, device: str) -> Mapping[str, str]:
        """See :class:`netloader.transports.base.Transport`."""
        return self._inner.facts(device)

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        return _FaultyPending(await self._inner.offer(setup), self._faults)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        return _FaultyChannel(await self._inner.connect(offer, setup), self._faults)


class _FaultyPending:
    def __init__(self, inner: Pending, faults: Faults) -> None:
        self.offer = inner.offer
        self._inner = inner
        self._faults = faults

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        return _FaultyChannel(await self._inner.accept(), self._faults)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        await self._inner.aclose()


class _FaultyChannel:
    depth = 1

    def __init__(self, inner: Channel, faults: Faults) -> None:
        self.whole_blocks = inner.whole_blocks
        self._inner = inner
        self._faults = faults
        self._state = ChannelState("channel with faults")
        self._closed = anyio.Event()

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("send"), self._ending_both():
            await self._run(Side.SEND, self._faults.swap(blocks), self._inner.send, _changed)

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        bits: dict[int, list[int]] = {}

        def change(block: BlockView, struck: Sequence[Fault]) -> BlockView:
            bits[block.number] = [fault.byte for fault in struck if fault.kind is FaultKind.CORRUPT]
            return block

        def harmed(block: BlockView) -> None:
            for byte in bits.pop(block.number, ()):
                flip(block, byte)
            if landed is not None:
                landed(block)

        async def move(batch: Sequence[BlockView]) -> None:
            await self._inner.recv(batch, harmed)

        async with self._state.operation("recv"), self._ending_both():
            await self._run(Side.RECV, [(block.number, block) for block in blocks], move, change)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        self._state.end("it was closed", closed=True)
        self._closed.set()
        await self._inner.aclose()
        await self._state.idle()

    async def _run(
        self,
        side: Side,
        blocks: Sequence[tuple[int, BlockView]],
        move: Callable[[Sequence[BlockView]], Awaitable[None]],
        change: Callable[[BlockView, Sequence[Fault]], BlockView | None],
    ) -> None:
        batch: list[BlockView] = []
        for number, block in blocks:
            struck = self._faults.take(side, number, block.nbytes)
            for fault in struck:
                if fault.kind in _BEFORE:
                    await move(batch)
                    batch = []
                    await self._strike(fault, block)
            outgoing = change(block, struck)
            if outgoing is not None:
                batch.append(outgoing)
            for fault in struck:
                if fault.kind is FaultKind.HOLD:
                    await move(batch)
                    batch = []
                    await self._hold(fault)
        # Pass on empty calls too, because they report whether the channel is still open.
        await move(batch)

    async def _strike(self, fault: Fault, block: BlockView) -> None:
        if fault.kind is FaultKind.DELAY:
            with anyio.move_on_after(fault.seconds):
                await self._until_closed()
        elif fault.kind is FaultKind.STALL:
            await self._until_closed()
        else:
            if fault.side is Side.SEND and fault.byte and not self.whole_blocks:
                await self._inner.send([head(block, fault.byte)])
            await self._inner.aclose()
            raise PeerLost(f"connection cut in block {fault.block} by an injected fault")

    async def _hold(self, fault: Fault) -> None:
        while not self._faults.over(fault):
            with anyio.move_on_after(_LOOK_EVERY):
                await self._until_closed()

    async def _until_closed(self) -> None:
        await self._closed.wait()
        raise self._state.closed()

    @asynccontextmanager
    async def _ending_both(self) -> AsyncIterator[None]:
        """End the wrapped channel too when the body fails or is cancelled."""
        try:
            yield
        except BaseException:
            with anyio.move_on_after(_CLOSING, shield=True):
                await self._inner.aclose()
            raise


def _changed(block: BlockView, struck: Sequence[Fault]) -> BlockView | None:
    outgoing = block
    for fault in struck:
        if fault.kind is FaultKind.DROP:
            return None
        if fault.kind is FaultKind.CORRUPT:
            outgoing = copy_of(outgoing)
            flip(outgoing, fault.byte)
        elif fault.kind is FaultKind.TRUNCATE:
            outgoing = head(outgoing, fault.byte)
    return outgoing
