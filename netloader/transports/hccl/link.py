"""One end of an HCCL group of two: a bare ``ProcessGroupHCCL`` of torch_npu, and the handling of its failures.

There is no world, no group name, and nothing is registered in ``torch.distributed``. All tensors that are sent are
plain ``uint8``, so dtypes and memory formats do not matter here. docs/hccl.md gives the reasons.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from netloader.codecs.npu_formats import gather, scatter
from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.base import BlockView
from netloader.transports.hccl.devices import blocking_wait, device_of
from netloader.transports.process_group import Link

if TYPE_CHECKING:
    from netloader.transports.hccl.store import PeerStore

__all__ = ["FLOOR", "LEEWAY", "SLOWEST", "WINDOW_BYTES", "HcclLink"]

WINDOW_BYTES = 256 << 20
"""Bytes that one link moves before the next link of its device gets its turn."""

FLOOR = 50e6
"""Bytes per second below which a link counts as broken, because an operation shows no progress before its end."""

SLOWEST = 5e6
"""Average bytes per second, over the life of a link, below which a receiver is given up.

Time that this side waits for its turn, or has nothing to send, does not count. Each operation may take the stall time,
so without this limit a slow receiver could occupy a communicator, its memory and a client's turn for ever."""

LEEWAY = 10.0
"""How many stall times a receiver may lag behind that rate."""

_MAX_STAGED = 64 << 20
_POLL = (0.0, 0.0005)
"""Seconds between polls of an operation: at first, and later."""

_EAGER = 20
"""How many polls use the first interval."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _HcclWork:
    """One send or receive that was given to HCCL."""

    work: Any
    tensor: torch.Tensor
    sends: bool


class HcclLink(Link):
    """One end of a pair; see :class:`~netloader.transports.process_group.Link`.

    Args:
        rank: Rank of this side. The receiver of weights is 0, because rank 0 listens on a port for the rendezvous, and
            a server with many clients should not need many ports.
        device: Name of the device, as torch writes it, with an index.
        exchange: The store for the rendezvous of both ends.
        timeout: Seconds that setting up may take.
        stall: Seconds without progress after which an operation has failed, plus the time that its bytes may take.

    Attributes:
        queueing: Whether it is waiting for the device's turn.
        committed: Whether this end has to connect, because the peer relies on it; see :meth:`commit`.
    """

    max_staged = _MAX_STAGED
    lands_in_place = False  # a posted receive can't be cancelled, so it writes only to the link's own memory

    def __init__(self, rank: int, device: str, exchange: PeerStore, timeout: float, stall: float) -> None:
        self.device = device
        self.queueing = False
        self._rank = rank
        self._exchange = exchange
        self._timeout = timeout
        self._stall = stall
        self._account = device_of(device)
        self._group: Any = None  # torch_npu has no types
        self._lock = threading.Lock()  # abort() may come from any thread
        self.committed = False
        self._why: str | None = None
        self._until = float("inf")  # when to give up operations in flight, once there is a reason
        self._flying: set[_HcclWork] = set()
        self._left = 0  # operations of this window that have not ended
        self._moved = 0
        self._since = float("inf")  # when it was connected, shifted by all waits for a turn and all idle time
        self._idle_since: float | None = None
        self._sent_bytes = 0

    # --- setting up, in the channel's thread ------------------------------------------------------------------------

    def open(self) -> None:
        """Make the group object. It connects with its first operation."""
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        self.enter()
        options = ProcessGroupHCCL.Options()
        # This link polls its operations. The group's own timeout is only for calls that should not block at all.
        seconds = self._timeout + self._stall + WINDOW_BYTES / FLOOR
        options._timeout = timedelta(seconds=seconds)  # noqa: SLF001 - has no other name
        options.is_high_priority_stream = False
        options.group_id = "netloader"
        # Not empty: torch_npu takes a group with an empty list as its process-wide "world", which its end then clears.
        options.global_ranks_in_group = [0, 1]
        with _translated(TransportError), blocking_wait():
            self._group = ProcessGroupHCCL(self._exchange, self._rank, 2, options)

    def enter(self) -> None:
        """Choose device and stream of this thread; see :class:`~netloader.transports.process_group.Link`."""
        npu: Any = torch.get_device_module("npu")
        with _translated(TransportError):
            npu.set_device(self.device)
            # Not the default stream, on which the engine computes.
            npu.set_stream(npu.Stream(device=self.device))

    def take_turn(self, *, connecting: bool = False) -> None:
        """Wait for the device's turn: within the set-up's timeout to connect, otherwise for as long as others use it.

        Raises:
            PeerLost: The link was closed meanwhile.
            RefusedError: No communicator may be made now.
        """
        self.queueing = True
        began = time.monotonic()
        try:
            self._account.turns.take(self, self._timeout if connecting else float("inf"), self._given_up)
        finally:
            self.queueing = False
            self._since += time.monotonic() - began
        if connecting:
            self._account.check_may_open()  # the device may be held still since the offer

    def give_turn(self) -> None:
        """Pass the turn to the next link. Any thread may call it."""
        self._account.turns.give(self)

    def commit(self) -> None:
        """From now on connect in any case: the peer is about to connect, and HCCL's connect call can't be cancelled.

        Raises:
            PeerLost: The link was closed before.
        """
        if self._why is not None:
            raise PeerLost(self._why)
        self.committed = True

    def first(self) -> None:
        """Connect, by the first operation, and give the turn back.

        Both ends are ready and have their turns, so neither waits long. The turn is given back here in the thread,
        because no other link may make a communicator on the device before this call has returned.
        """
        try:
            self._connect()
        finally:
            self.committed = False
            if self._why is not None:
                self._exchange.abort()
            self.give_turn()

    def _connect(self) -> None:
        npu: Any = torch.get_device_module("npu")
        hello = self.stage(1)
        free, _ = npu.mem_get_info(self.device)
        with _translated(PeerLost):
            self._await(self._post(hello, sends=self._rank == 1))
        self._account.opened(self, max(0, free - npu.mem_get_info(self.device)[0]))
        self._since = time.monotonic()

    # --- moving -----------------------------------------------------------------------------------------------------

    def begin(self, operations: int) -> None:
        """This link has the turn now. It is given back after this number of operations."""
        self._left = operations
        if not operations:
            self.give_turn()

    def busy(self, *, sends: bool) -> None:
        """Begin (`sends`) or stop measuring the receiver's rate."""
        now = time.monotonic()
        if not sends:
            self._idle_since = now
        elif self._idle_since is not None:
            self._since += now - self._idle_since
            self._idle_since = None

    def stage(self, nbytes: int) -> torch.Tensor:
        """Staging memory on the device; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(TransportError):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def reaches(self, block: BlockView) -> bool:
        """False for blocks in the host's memory; see :class:`~netloader.transports.process_group.Link`."""
        return all(span.device.type == "npu" for span in block.tensors())

    def pack(self, block: BlockView, staging: torch.Tensor) -> torch.Tensor:
        """Gather a block; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(TransportError):
            return gather(block.tensors(), staging)

    def unpack(self, staging: torch.Tensor, block: BlockView) -> None:
        """Scatter a block; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(TransportError):
            scatter(staging, block.tensors())
            torch.get_device_module("npu").current_stream().synchronize()

    def send(self, tensor: torch.Tensor) -> _HcclWork:
        """Start sending."""
        with _translated(PeerLost):
            return self._post(tensor, sends=True)

    def recv(self, tensor: torch.Tensor) -> _HcclWork:
        """Start receiving."""
        with _translated(PeerLost):
            return self._post(tensor, sends=False)

    def finish(self, work: _HcclWork) -> None:
        """Wait for an operation; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(PeerLost):
            self._await(work)
        self._left -= 1
        if not self._left:
            self.give_turn()

    def progress(self) -> int:
        """The number of operations that have ended."""
        return self._moved

    def abort(self, why: str = "the link was closed", grace: float = 0.0) -> None:
        """End every wait at the next poll, or `grace` seconds later, and start no new operation.

        HCCL's own abort may block, so :meth:`close` calls it.
        """
        with self._lock:
            self._until = min(self._until, time.monotonic() + grace)
            if self._why is None:
                self._why = why
        if not self.committed:
            self._exchange.abort()

    def close(self) -> None:
        """Free everything, now or when the device is no longer held still.

        See :class:`~netloader.transports.process_group.Link`.
        """
        self.abort()
        self._account.turns.give(self)
        group, self._group = self._group, None
        if group is not None:
            self._account.close_when_allowed(lambda: self._free(group))

    # --- parts ------------------------------------------------------------------------------------------------------

    def _given_up(self) -> bool:
        return self._why is not None

    def _post(self, tensor: torch.Tensor, *, sends: bool) -> _HcclWork:
        if self._group is None or (self._why is not None and not self.committed):
            raise PeerLost(self._why or "the group is closed")
        start = self._group.send if sends else self._group.recv
        operation = _HcclWork(start([tensor], 1 - self._rank, 0), tensor, sends)
        self._flying.add(operation)
        return operation

    def _await(self, operation: _HcclWork) -> None:
        limit = self._stall + operation.tensor.numel() / FLOOR
        began, looks = time.monotonic(), 0
        if operation.sends:
            self._sent_bytes += operation.tensor.numel()
        while not operation.work.is_completed():
            if self._why is not None and time.monotonic() >= self._until:
                raise PeerLost(self._why)
            if operation.sends:
                self.check_pace()
            if time.monotonic() - began > limit:
                waits = "the peer takes no bytes" if operation.sends else "the peer sends no bytes"
                self.abort(f"{waits} for {limit:.3g} s")
                raise TransferTimeout(f"{waits} for {limit:.3g} s", hint="check that the peer is still running")
            time.sleep(_POLL[looks >= _EAGER])
            looks += 1
        operation.work.wait()
        self._flying.discard(operation)
        self._moved += 1

    def check_pace(self) -> None:
        """Check the receiver's rate. Any thread may call it.

        Raises:
            TransferTimeout: The receiver is much slower than :data:`SLOWEST`.
        """
        lived = time.monotonic() - self._since
        if lived > LEEWAY * self._stall + self._sent_bytes / SLOWEST:
            text = f"the peer took {self._sent_bytes / 1e6:.1f} MB in {lived:.3g} s, less than {SLOWEST / 1e6:g} MB/s"
            self.abort(text)
            raise TransferTimeout(text, hint="let this receiver load its weights from files instead")

    def _free(self, group: Any) -> None:
        npu: Any = torch.get_device_module("npu")
        try:
            with _translated(TransportError):
                npu.set_device(self.device)
                # Not shutdown(): it first waits for the stream, and never returns when the peer is gone.
                group.abort_hccl_comm("netloader is done with it")
        except TransportError as error:
            _log.warning("HCCL on %s: a group could not be freed: %s", self.device, error)
        finally:
            self._account.closed(self)
            for operation in self._flying:
                if not operation.sends and not operation.work.is_completed():
                    self._account.keep(operation.work, operation.tensor)
            self._flying.clear()


@contextmanager
def _translated(kind: type[TransportError]) -> Iterator[None]:
    """Translate torch_npu's errors, which all have one type, into this library's errors."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().splitlines()
        raise kind(f"HCCL: {text[0] if text else 'an operation failed without a message'}") from error
