"""One end of an HCCL group of two: torch_npu's ``ProcessGroupHCCL`` object itself, and what its failures ask for.

No world, no group names, nothing registered in ``torch.distributed``. What travels are plain ``uint8`` tensors, so that
no dtype and no memory format matters here. docs/hccl.md says why each thing is done the way it is.
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
    from netloader.transports.hccl.store import Exchange

__all__ = ["FLOOR", "LEEWAY", "SLOWEST", "WINDOW_BYTES", "HcclLink"]

WINDOW_BYTES = 256 << 20
"""Bytes that one link moves before the next one of its device may."""

FLOOR = 50e6
"""Bytes per second below which a link counts as broken: an operation shows no progress before its end."""

SLOWEST = 5e6
"""Bytes per second below which, over the life of a link, a receiver is given up; our own waits for turns do not count.

Each of its operations may take the stall time, so one that takes a block just within it would keep a communicator, its
memory and a client's place for ever. The time in which we have nothing to send does not count either."""

LEEWAY = 10.0
"""How many stall times a receiver may be behind that."""

_MAX_STAGED = 64 << 20
_POLL = (0.0, 0.0005)
"""Seconds between looks at an operation: first ones, later ones."""

_EAGER = 20
"""How many looks are first ones."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Operation:
    """One send or receive that was handed to HCCL."""

    work: Any
    tensor: torch.Tensor
    sends: bool


class HcclLink(Link):
    """One end of a pair; see :class:`~netloader.transports.process_group.Link`.

    Args:
        rank: Ours. The receiver of weights is 0: that rank listens on its host for the rendezvous, and the side that
            serves many keeps its ports.
        device: As torch names it, with an index.
        exchange: The store through which both ends find each other.
        timeout: Seconds that setting up may take.
        stall: Seconds without progress after which an operation has failed, beside the time that its bytes may take.

    Attributes:
        queueing: Whether it waits for the device's turn at the moment.
        committed: Whether the peer counts on it that this end connects; see :meth:`commit`.
    """

    max_staged = _MAX_STAGED
    lands_in_place = False  # a posted receive cannot be called back: it only ever writes to memory of its own

    def __init__(self, rank: int, device: str, exchange: Exchange, timeout: float, stall: float) -> None:
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
        self._until = float("inf")  # when to give up what is under way, once there is a reason
        self._flying: set[_Operation] = set()
        self._left = 0  # operations of this window that have not ended
        self._moved = 0
        self._since = float("inf")  # when it was connected, later by every wait for a turn, and by what it was idle
        self._idle_since: float | None = None
        self._sent_bytes = 0

    # --- setting up, in the channel's thread ------------------------------------------------------------------------

    def open(self) -> None:
        """Make the group's object; it connects with the first operation only."""
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        self.enter()
        options = ProcessGroupHCCL.Options()
        # What is awaited here is awaited by looking; the group's own limit is for what we never expect to wait for.
        seconds = self._timeout + self._stall + WINDOW_BYTES / FLOOR
        options._timeout = timedelta(seconds=seconds)  # noqa: SLF001 - has no other name
        options.is_high_priority_stream = False
        options.group_id = "netloader"
        # Not empty: an empty list makes a group the "world" of torch_npu, a process-wide pointer that its end clears.
        options.global_ranks_in_group = [0, 1]
        with _translated(TransportError), blocking_wait():
            self._group = ProcessGroupHCCL(self._exchange, self._rank, 2, options)

    def enter(self) -> None:
        """Choose device and stream of this thread; see :class:`~netloader.transports.process_group.Link`."""
        npu: Any = torch.get_device_module("npu")
        with _translated(TransportError):
            npu.set_device(self.device)
            # Not the default one, on which the engine computes.
            npu.set_stream(npu.Stream(device=self.device))

    def take_turn(self, *, connecting: bool = False) -> None:
        """Wait for the device: to connect within the time for setting up, else as long as others need it.

        Raises:
            PeerLost: The link was given up meanwhile.
            RefusedError: Nothing may be opened now.
        """
        self.queueing = True
        began = time.monotonic()
        try:
            self._account.turns.take(self, self._timeout if connecting else float("inf"), self._given_up)
        finally:
            self.queueing = False
            self._since += time.monotonic() - began
        if connecting:
            self._account.check_may_open()  # it may have been forbidden since the offer

    def give_turn(self) -> None:
        """Let the next link have the device; any thread."""
        self._account.turns.give(self)

    def commit(self) -> None:
        """Connect from now on, given up or not: the peer is on its way into HCCL, which lets nobody out alone.

        Raises:
            PeerLost: It was given up before.
        """
        if self._why is not None:
            raise PeerLost(self._why)
        self.committed = True

    def first(self) -> None:
        """Connect, by the first operation, and give the turn back.

        Both ends are there and have their turns: nobody waits for a stranger. The turn is given back here, in the
        thread, since nobody else may open anything on the device before this call has really returned.
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
        """The turn is there: it is given back when so many operations have ended."""
        self._left = operations
        if not operations:
            self.give_turn()

    def busy(self, *, sends: bool) -> None:
        """Blocks are to be sent: from now on the receiver's pace is looked at. Or no more are, until further notice."""
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
        """Not what a server keeps in the host's memory; see :class:`~netloader.transports.process_group.Link`."""
        return all(span.device.type == "npu" for span in block.tensors())

    def pack(self, block: BlockView, staging: torch.Tensor) -> torch.Tensor:
        """Gather a block; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(TransportError):
            return gather(block.tensors(), staging)

    def unpack(self, staging: torch.Tensor, block: BlockView) -> None:
        """Spread a block; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(TransportError):
            scatter(staging, block.tensors())
            torch.get_device_module("npu").current_stream().synchronize()

    def send(self, tensor: torch.Tensor) -> _Operation:
        """Start sending."""
        with _translated(PeerLost):
            return self._post(tensor, sends=True)

    def recv(self, tensor: torch.Tensor) -> _Operation:
        """Start receiving."""
        with _translated(PeerLost):
            return self._post(tensor, sends=False)

    def finish(self, work: _Operation) -> None:
        """Wait for an operation; see :class:`~netloader.transports.process_group.Link`."""
        with _translated(PeerLost):
            self._await(work)
        self._left -= 1
        if not self._left:
            self.give_turn()

    def progress(self) -> int:
        """Operations that ended."""
        return self._moved

    def abort(self, why: str = "the link was closed", grace: float = 0.0) -> None:
        """Have every wait end at the next look, or `grace` seconds later; nothing new is started.

        HCCL's own abort may block: it comes with :meth:`close`.
        """
        with self._lock:
            self._until = min(self._until, time.monotonic() + grace)
            if self._why is None:
                self._why = why
        if not self.committed:
            self._exchange.abort()

    def close(self) -> None:
        """Free everything, now or as soon as the device may be touched.

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

    def _post(self, tensor: torch.Tensor, *, sends: bool) -> _Operation:
        if self._group is None or (self._why is not None and not self.committed):
            raise PeerLost(self._why or "the group is closed")
        start = self._group.send if sends else self._group.recv
        operation = _Operation(start([tensor], 1 - self._rank, 0), tensor, sends)
        self._flying.add(operation)
        return operation

    def _await(self, operation: _Operation) -> None:
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
                raise TransferTimeout(f"{waits} for {limit:.3g} s", hint="is the peer still alive?")
            time.sleep(_POLL[looks >= _EAGER])
            looks += 1
        operation.work.wait()
        self._flying.discard(operation)
        self._moved += 1

    def check_pace(self) -> None:
        """See whether the receiver is worth more waiting; any thread.

        Raises:
            TransferTimeout: It is far behind the least that is expected.
        """
        lived = time.monotonic() - self._since
        if lived > LEEWAY * self._stall + self._sent_bytes / SLOWEST:
            text = f"the peer took {self._sent_bytes / 1e6:.1f} MB in {lived:.3g} s, less than {SLOWEST / 1e6:g} MB/s"
            self.abort(text)
            raise TransferTimeout(text, hint="a receiver this slow is better off with its files")

    def _free(self, group: Any) -> None:
        npu: Any = torch.get_device_module("npu")
        try:
            with _translated(TransportError):
                npu.set_device(self.device)
                # Never shutdown(): it waits for the stream first, for ever where the peer is gone.
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
    """torch_npu's errors, all of one type, into ours."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().splitlines()
        raise kind(f"HCCL: {text[0] if text else 'an operation failed and did not say why'}") from error
