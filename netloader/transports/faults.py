"""Harm on purpose: any transport, wrapped so that chosen blocks are lost, late, cut off or changed on their way.

The caller's own memory is never touched by a fault on the sending side: what is changed is what goes out.
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
"""Seconds between two looks for the file that ends a hold."""


_CLOSING = 60.0
"""Seconds that closing the transport inside may take: its own bounds are smaller, if it keeps the contract."""

_NUMBER = re.compile("[0-9]{1,12}")


class FaultKind(StrEnum):
    """What is done to a block."""

    DROP = "drop"
    """It is not sent; those after it are."""
    DELAY = "delay"
    """It is held up for `seconds`."""
    CUT = "cut"
    """The channel is closed when `byte` bytes of it are out (none where the transport moves whole blocks only)."""
    CORRUPT = "corrupt"
    """One bit of its byte `byte` is turned over; a byte beyond its end strikes nothing."""
    SWAP = "swap"
    """It and block `other` (same size, same call of send) carry each other's bytes."""
    TRUNCATE = "truncate"
    """Only its first `byte` bytes are sent."""
    STALL = "stall"
    """Nothing more happens from it on, until the channel is closed."""
    HOLD = "hold"
    """It passes; what follows waits until told (see :class:`Fault`)."""


class Side(StrEnum):
    """Which operation a fault strikes."""

    SEND = "send"
    RECV = "recv"


_SEND_ONLY = (FaultKind.DROP, FaultKind.SWAP, FaultKind.TRUNCATE)
_BEFORE = (FaultKind.DELAY, FaultKind.CUT, FaultKind.STALL)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: What.
        block: Number of the block it happens to.
        side: While sending, or while receiving. Dropping, swapping and truncating exist for sending only.
        byte: Which byte of the block, counted from 0, where the kind asks for one.
        other: The second block of a swap.
        seconds: How long a delay takes.
        until: What ends a hold: a ``threading.Event`` or the path of a file that appears. None: :meth:`Faults.release`.
        times: How many passages of the block are struck; None for all.
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
        """From the form that a command line takes: ``corrupt:BLOCK[:BYTE]``, ``cut:BLOCK[:BYTE]``, ``stall:BLOCK``.

        Raises:
            ConfigError: It has another form.
        """
        kind, *numbers = text.split(":")
        longest = {"corrupt": 2, "cut": 2, "stall": 1}.get(kind, 0)
        if not (1 <= len(numbers) <= longest and all(_NUMBER.fullmatch(number) for number in numbers)):
            raise ConfigError(
                field="fault", value=text, allowed="corrupt:BLOCK[:BYTE], cut:BLOCK[:BYTE] or stall:BLOCK, from 0"
            )
        return cls(FaultKind(kind), int(numbers[0]), byte=int(numbers[1]) if len(numbers) > 1 else 0)


class Faults:
    """The faults that one or several channels run into, and the account of those that happened.

    May be shared by transports, event loops and threads.

    Args:
        faults: What is to go wrong. Several may strike one block; they do so in this order.
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
        """Those that happened, in order, once for each time."""
        with self._lock:
            return tuple(self._fired)

    def release(self) -> None:
        """End every hold that waits for nothing else; also those to come."""
        self._released.set()

    def take(self, side: Side, block: int, nbytes: int) -> list[Fault]:
        """The faults, other than swaps, that strike this block of `nbytes` bytes now; they count as happened."""
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
        """The blocks of one call with the number that each goes out for; swaps are counted as happened."""
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
        """Whether a hold has come to its end."""
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
    """Any transport, with faults on its channels, at both ends or at the one where this object is used.

    Args:
        inner: The transport that does the work.
        faults: What is to go wrong.
        name: A name of its own; the inner transport's by default, so that it meets unharmed peers.
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
        # Empty calls too: they find out whether the channel is still there.
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
            raise PeerLost(f"cut off in block {fault.block} by a fault made on purpose")

    async def _hold(self, fault: Fault) -> None:
        while not self._faults.over(fault):
            with anyio.move_on_after(_LOOK_EVERY):
                await self._until_closed()

    async def _until_closed(self) -> None:
        await self._closed.wait()
        raise self._state.closed()

    @asynccontextmanager
    async def _ending_both(self) -> AsyncIterator[None]:
        """What fails or is cancelled out here ends the channel inside as well."""
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
