"""The HCCL transport: blocks between the NPUs of one or two Ascend hosts, in trusted networks.

Each channel has a group of two, a bare ``ProcessGroupHCCL`` of torch_npu. Both ends exchange what they need to connect
over the control connection. It also tells them that the peer is gone, which HCCL does not. See docs/hccl.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from netloader.errors import MemoryStillInUse, NetloaderError, PeerLost, TransferTimeout, TransportError
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup
from netloader.transports.hccl.devices import device_of
from netloader.transports.hccl.messages import GroupMessage, Messenger, Value, Waiting
from netloader.transports.hccl.scheduler import Scheduler
from netloader.transports.io.channel_state import ChannelState
from netloader.transports.io.worker import Worker

if TYPE_CHECKING:
    from netloader.transports.hccl.link import HcclLink
    from netloader.transports.hccl.store import PeerStore
    from netloader.transports.process_group import LinkChannel

__all__ = ["HcclTransport"]

_CLIENT, _SERVER = 0, 1
"""Ranks: the side that receives is 0; see :class:`~netloader.transports.hccl.link.HcclLink`."""

_TO_CLIENT, _TO_SERVER = 0, 1
"""The groups of a channel. The second is made when the client sends for the first time, which netloader never does: all
operations of a group share one stream, in order, so two directions in one group would wait for each other."""

_GRACE = 0.2
"""Seconds to receive what the peer sent before its Ended: the blocks in flight may be complete."""

_CLOSING = 10.0
"""Seconds that closing a group may take before an error is logged."""

_log = logging.getLogger(__name__)
_numbers = itertools.count()


class _HcclOffer(msgspec.Struct, frozen=True):
    """What a client is told about the server's HCCL, for messages and the log."""

    device: str
    torch_npu: str


class _GroupEnd:
    """One group of a channel at one end.

    Attributes:
        link: The link; `channel` owns it once that is set.
        windows: The scheduler.
        channel: The channel over the link; None until it is set up.
    """

    def __init__(self, number: int, rank: int, setup: Setup, messenger: Messenger) -> None:
        # Imported here, so that `missing` can report why it can't be imported.
        from netloader.transports.hccl.link import HcclLink
        from netloader.transports.hccl.store import PeerStore

        self._number = number
        self._rank = rank
        self._setup = setup
        self._messenger = messenger
        self.exchange: PeerStore = PeerStore(setup.timeout)
        self.link: HcclLink = HcclLink(rank, setup.device, self.exchange, setup.timeout, setup.stall)
        self._worker = Worker(f"netloader-hccl-{next(_numbers)}", self.link.abort)
        self.windows = Scheduler(number, messenger.post, self, setup.stall)
        self.channel: LinkChannel | None = None

    # --- the device's turn ------------------------------------------------------------------------------------------

    async def take(self) -> None:
        """See :class:`~netloader.transports.hccl.scheduler.Turn`."""
        await self._worker.run(partial(self.link.take_turn, connecting=self.channel is None))

    def give(self) -> None:
        """See :class:`~netloader.transports.hccl.scheduler.Turn`."""
        self.link.give_turn()

    def check_pace(self) -> None:
        """See :class:`~netloader.transports.hccl.scheduler.Turn`."""
        self.link.check_pace()

    def _done(self) -> None:
        """Give the turn back once the thread has left HCCL, which may be later than the end of the wait."""
        if not self._worker.closing:  # otherwise closing the link gives the turn back
            self._worker.start(self.link.give_turn)

    # --- setting up -------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the group's object."""
        await self._worker.run(self.link.open)

    async def connect(self) -> LinkChannel:
        """Wait until the peer is ready, then run the first operation, which connects."""
        from netloader.transports.process_group import LinkChannel

        try:
            await self._messenger.run_while_listening(self._meet)
            # From here on the peer may be in HCCL's connect call. It can't be cancelled, and would wait for this end
            # until HCCL's own timeout. So this end connects too, even if the group is no longer needed.
            with anyio.CancelScope(shield=True), anyio.move_on_after(self._setup.timeout) as scope:
                self.link.commit()
                await self._messenger.run_while_listening(self._first, self._relay_values)
        finally:
            self._done()
        if scope.cancelled_caught:
            raise TransferTimeout(f"HCCL did not connect both ends within {self._setup.timeout:g} s")
        # The link has its own stall detection, which knows how long an operation may take.
        self.channel = LinkChannel(self.link, self._worker, float("inf"))
        return self.channel

    async def _meet(self) -> None:
        """Get both devices' turns before connecting. A turn is never held for a peer that is not ready."""
        if self._rank == _CLIENT:
            await self.windows.want(0)
            await self.windows.take(0, connecting=True)
        else:
            await self.windows.open(0, connecting=True)

    async def _first(self) -> None:
        if self._rank == _SERVER:
            await self.windows.go()
        await self._worker.run(self.link.first)

    async def _relay_values(self) -> None:
        """Send the peer the values that torch_npu puts into the store."""
        while True:
            key, value = await self.exchange.published()
            try:
                await self._messenger.post(Value(self._number, key, value))
            except PeerLost as error:
                self.link.abort(error.message)
                return

    # --- moving -----------------------------------------------------------------------------------------------------

    async def send(self, channel: LinkChannel, blocks: Sequence[BlockView]) -> None:
        """Send blocks in windows. Each begins when both ends have their devices' turns."""
        from netloader.transports.hccl.link import WINDOW_BYTES

        rest = list(blocks)
        self.link.busy(sends=True)
        try:
            while rest:
                count = await self.windows.open(_fitting(rest, WINDOW_BYTES))
                window, rest = rest[:count], rest[count:]
                self.link.begin(_operations(window))
                await self.windows.go()
                await channel.send(window)
        finally:
            self.link.busy(sends=False)
            self._done()

    async def recv(self, channel: LinkChannel, blocks: Sequence[BlockView], landed: Landed | None) -> None:
        """The counterpart of :meth:`send`."""
        rest = list(blocks)
        try:
            await self.windows.want(len(rest))
            while rest:
                count = await self.windows.take(len(rest))
                window, rest = rest[:count], rest[count:]
                self.link.begin(_operations(window))
                await channel.recv(window, landed)
        finally:
            self._done()

    # --- ending -----------------------------------------------------------------------------------------------------

    def abort(self, reason: str, grace: float = 0.0) -> None:
        """End every wait; must not block."""
        self.windows.lose(reason)
        self.link.abort(reason, grace=grace)

    async def aclose(self) -> None:
        """Free everything. Idempotent, bounded.

        Raises:
            MemoryStillInUse: As :meth:`netloader.transports.base.Channel.aclose`.
        """
        self.link.abort()
        if self.channel is not None:
            await self.channel.aclose()
            return
        if not self._worker.closing:
            self._worker.start(self.link.close)
        if not await self._worker.aclose(_CLOSING):
            # The first operation of a group can't be interrupted, and HCCL ends it after HCCL_CONNECT_TIMEOUT. It uses
            # only the link's own memory.
            _log.error("thread %s still waits inside HCCL after the set-up was given up", self._worker.name)


def _fitting(blocks: Sequence[BlockView], nbytes: int) -> int:
    """How many of `blocks` fit into a window of `nbytes`; at least one."""
    count = total = 0
    for block in blocks:
        total += block.nbytes
        if count and total > nbytes:
            break
        count += 1
    return count


def _operations(blocks: Sequence[BlockView]) -> int:
    return sum(block.nbytes > 0 for block in blocks)


class _HcclChannel:
    """One end of a channel.

    Args:
        rank: Rank of this side.
        setup: Parameters of the channel.
    """

    depth = 1
    whole_blocks = True

    def __init__(self, rank: int, setup: Setup) -> None:
        self.setup = setup
        self._rank = rank
        self._messenger = Messenger(setup.signals, self._value, self._heard, self._peer_waits, self._lost)
        self._halves: dict[int, _GroupEnd] = {}
        self._state = ChannelState(f"channel (hccl on {setup.device})")
        self._closing = False
        self.accepted = False
        self._half(_TO_CLIENT)

    # --- setting up -------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Make this side's end of the first group, so that local errors appear before the peer is contacted."""
        await self._within(self._halves[_TO_CLIENT].open)

    async def establish(self) -> None:
        """Connect to the peer."""
        await self._within(self._halves[_TO_CLIENT].connect)
        self.accepted = True

    async def _within(self, step: Callable[[], Awaitable[object]]) -> None:
        """Run a step of the set-up within the deadline. If it fails, free everything and tell the peer."""
        try:
            with anyio.move_on_after(self.setup.timeout) as scope:
                await step()
            if scope.cancelled_caught:
                raise TransferTimeout(
                    f"the peer did not open its end of the HCCL group within {self.setup.timeout:g} s",
                    hint="HCCL_IF_IP, HCCL_SOCKET_IFNAME and its ports decide where the devices' hosts meet",
                )
        except BaseException as error:
            await self._fail(error)
            await self.aclose()
            raise

    def _half(self, number: int) -> _GroupEnd:
        half = self._halves.get(number)
        if half is None:
            half = self._halves[number] = _GroupEnd(number, self._rank, self.setup, self._messenger)
            if self._messenger.gone is not None:
                half.windows.lose(self._messenger.gone)
        return half

    # --- moving -----------------------------------------------------------------------------------------------------

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        await self._operate("send", lambda half, channel: half.send(channel, blocks))

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        await self._operate("recv", lambda half, channel: half.recv(channel, blocks, landed))

    async def _operate(self, direction: str, move: Callable[[_GroupEnd, LinkChannel], Awaitable[None]]) -> None:
        to_client = (direction == "send") == (self._rank == _SERVER)
        number = _TO_CLIENT if to_client else _TO_SERVER

        async def work() -> None:
            half = self._half(number)
            channel = await self._moving(half)
            await self._messenger.run_while_listening(lambda: move(half, channel), self._reassure)

        async with self._state.operation(direction, self._cut):
            try:
                await work()
            except BaseException as error:
                await self._fail(error)
                raise

    async def _moving(self, half: _GroupEnd) -> LinkChannel:
        """The channel for this direction, made when it is first needed."""
        if half.channel is not None:
            return half.channel
        with anyio.move_on_after(self.setup.stall):
            await half.open()
            return await half.connect()
        raise TransferTimeout(f"the peer opens no second group within {self.setup.stall:g} s")

    async def _reassure(self) -> None:
        """Tell a peer that has to wait because others have the device's turn."""
        while True:
            await anyio.sleep(self.setup.stall / 4)
            if any(half.link.queueing for half in self._halves.values()):
                try:
                    await self._messenger.post(Waiting())
                except PeerLost as error:
                    self._lost(error.message, inside=False)
                    return

    # --- ending -----------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel` and :class:`~netloader.transports.base.Pending`."""
        self._state.end("it was closed", closed=True)
        self._cut()
        if not self._closing:
            self._closing = True
            await self._messenger.send_ended("it was closed", inside=self._inside())
        in_use: MemoryStillInUse | None = None
        for half in list(self._halves.values()):
            try:
                await half.aclose()
            except MemoryStillInUse as error:  # free the other group all the same
                in_use = error
        if in_use is not None:
            raise in_use
        await self._state.idle()

    async def _fail(self, error: BaseException) -> None:
        reason = error.message if isinstance(error, NetloaderError) else type(error).__name__
        self._cut()
        await self._messenger.send_ended(reason, inside=self._inside())

    def _inside(self) -> bool:
        return any(half.link.committed for half in self._halves.values())

    def _cut(self) -> None:
        for half in self._halves.values():
            half.abort("the link was closed")

    def _lost(self, reason: str, inside: bool) -> None:
        for half in self._halves.values():
            half.abort(reason, _GRACE)
            if not inside:
                half.exchange.abort()  # nobody will be there

    def _peer_waits(self) -> None:
        for half in self._halves.values():
            half.windows.alive()

    def _heard(self, note: GroupMessage) -> bool:
        return note.group in (_TO_CLIENT, _TO_SERVER) and self._half(note.group).windows.handle_message(note)

    def _value(self, note: Value) -> bool:
        if note.group not in (_TO_CLIENT, _TO_SERVER):
            return False
        return self._half(note.group).exchange.deliver(note.key, note.value)


class _HcclPending:
    """A server's half-open channel."""

    def __init__(self, channel: _HcclChannel, offer: bytes) -> None:
        self.offer = offer
        self._channel = channel

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        await self._channel.establish()
        return self._channel

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        if not self._channel.accepted:
            await self._channel.aclose()


class HcclTransport:
    """Moves blocks between Ascend devices over HCCL."""

    name = "hccl"

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        kind, _, index = device.partition(":")
        if kind != "npu":
            return f"it moves tensors in an NPU's memory only, not on {device}"
        # HCCL would then split the group off the world's communicator, and take its ranks 0 and 1 for the world's.
        if os.environ.get("RANK_TABLE_FILE"):
            return "RANK_TABLE_FILE is set: HCCL makes no group outside of that table"
        if os.environ.get("ROOTINFO_SUBCOMM_ENABLE") == "1":
            return "ROOTINFO_SUBCOMM_ENABLE=1 is set: HCCL makes no group outside of the world's"
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed"
        try:
            import torch

            importlib.import_module("torch_npu")
            there = torch.get_device_module("npu").device_count()
        except (ImportError, OSError, RuntimeError) as error:
            return f"torch_npu cannot be used here: {str(error).splitlines()[0] if str(error) else error!r}"
        if int(index or 0) >= there:
            return f"there are {there} NPUs here" if there else "there is no NPU here"
        return None

    def facts(self, device: str) -> Mapping[str, str]:
        """The versions of the messages with which both ends connect, and of the bytes that are sent."""
        del device
        return {"rendezvous": "2", "wire": "plain bytes"}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`.

        Raises:
            RefusedError: No communicator may be made on this device now (see
                :func:`~netloader.transports.hccl.devices.hold_still`). The error says when to try again.
        """
        channel = await self._prepared(_SERVER, setup)
        return _HcclPending(channel, msgspec.msgpack.encode(_HcclOffer(setup.device, _version())))

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        try:
            theirs = msgspec.msgpack.decode(offer, type=_HcclOffer)
        except msgspec.DecodeError as error:
            raise TransportError(f"the offer of an HCCL group can't be read: {error}") from error
        _log.debug("hccl: %s here, %s with torch_npu %s there", setup.device, theirs.device, theirs.torch_npu)
        channel = await self._prepared(_CLIENT, setup)
        await channel.establish()
        return channel

    async def _prepared(self, rank: int, setup: Setup) -> _HcclChannel:
        reason = self.missing(setup.device)
        if reason is not None:
            raise TransportError(f"HCCL cannot be used for {setup.device}: {reason}")
        if ":" not in setup.device:
            raise TransportError(f"HCCL needs a device with an index, not {setup.device!r}", hint="give it as npu:0")
        device_of(setup.device).check_may_open()
        channel = _HcclChannel(rank, setup)
        await channel.prepare()
        return channel


def _version() -> str:
    import torch_npu

    return str(torch_npu.__version__)
