"""One end of a gloo group of two. It runs in the process of the session, which has no other purpose.

A group is a bare ``ProcessGroupGloo`` object, without a world, group names or other process-wide state. A peer that
violates gloo's protocol can end this process, or keep one of its threads busy for ever.
"""

from __future__ import annotations

import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.gloo import packet_filter
from netloader.transports.gloo.addresses import Address, Endpoint, plain_host
from netloader.transports.gloo.rendezvous import LocalStore, Rendezvous
from netloader.transports.io.socket_options import tune
from netloader.transports.process_group import WINDOW

__all__ = ["DATA", "MARK", "RECEIPT", "Group", "Work", "tag"]

_UNUSED_PAIRS = 2
"""Unused pairs that are made before the real one. They make sure that the number of the real pair, which an
unauthenticated peer could send (and repeat; see `packet_filter`), is never read as an operation that makes gloo end the
process."""

DATA, MARK, RECEIPT = range(3)
_KINDS = 4
_LENGTHS = (1 << 29) - 3  # a tag has 31 bits

_FOREVER = timedelta(days=1)
"""Gloo's own timeout of an operation. The stall detection ends an operation long before."""

_SOURCE_LINE = re.compile(r"^\[[^\]]*\]\s*")


@dataclass(slots=True)
class Work:
    """A block in flight.

    Attributes:
        waits: Gloo's handle to wait for: an operation without bytes.
        holds: Gloo's other handles, which are kept until then.
        confirms: For a received block: the number of bytes to confirm.
    """

    waits: Any
    holds: tuple[Any, ...]
    confirms: int | None = None


class Group:
    """One end of a group of two.

    The sender follows each block with an empty operation (the mark), and the receiver confirms it with another (the
    receipt). Only these two are waited for. Bytes arrive in order, so the block is complete when the mark arrives, and
    its memory may be reused when the receipt arrives.

    Args:
        rank: Rank of this side, 0 or 1.
        bind: Numeric address to listen at, with its zone.
        peer: Numeric address from which the peer connects, as far as is known.
        connecting: Most seconds for connecting, once both addresses are known.

    Attributes:
        unfiltered: Why the kernel can't filter connections to gloo's port; empty if it can.
    """

    def __init__(self, rank: int, bind: str, peer: str, connecting: float) -> None:
        self.unfiltered = ""
        self._rank = rank
        self._bind = bind
        self._peer = plain_host(peer)
        self._connecting = connecting
        self._here: Endpoint = "", 0
        self._expected = 0  # the number that the peer has to send to this side's listener
        self._group: Any = None  # torch's stubs lack most of a ProcessGroupGloo
        self._listener: socket.socket | None = None
        self._nothing = torch.empty(0, dtype=torch.uint8)
        self._receipts: deque[Any] = deque(maxlen=2 * WINDOW)  # never more in flight than blocks

    def open(self, published: Callable[[Address], None], meet: Callable[[], tuple[Address, int]]) -> None:
        """Make the group: publish this side's address, wait for the peer's, and connect.

        Args:
            published: Called with this side's address, once the port is guarded.
            meet: Waits for the peer's address, and the number of its interface.

        Raises:
            TransportError: Gloo can't listen, or an unknown process has connected to its port.
            PeerLost, TransferTimeout: Connecting failed.
        """

        def met() -> tuple[Address, int]:
            address, zone = meet()
            if plain_host(address.dialler) != self._peer:
                self._peer = plain_host(address.dialler)
                self._guard()
            return address, zone

        with _translated(TransportError):
            # The only way to choose the address; torch's stubs lack it.
            options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
            options._timeout = timedelta(seconds=self._connecting)  # noqa: SLF001
            options._threads = 1  # noqa: SLF001
            options._devices = [ProcessGroupGloo.create_device(hostname=self._bind)]  # noqa: SLF001
            for _ in range(_UNUSED_PAIRS):
                ProcessGroupGloo(LocalStore(), 0, 1, options)
        with _translated(PeerLost):
            store = Rendezvous(self._rank, lambda address: self._publish(address, published), met)
            self._group = ProcessGroupGloo(store, self._rank, 2, options)

    def ends(self, theirs: Address) -> tuple[Endpoint | None, tuple[Endpoint, ...], socket.socket | None]:
        """The ends of the connection, once it is there.

        Returns:
            This side's endpoint, if it connected; the remote endpoints of the connections that its listener accepted;
            and a duplicate of the connection.
        """
        dialled = packet_filter.connections(remote=(plain_host(theirs.host), theirs.port))
        taken = packet_filter.connections(local=self._here)
        found = [sock for sock, _, _ in (*dialled, *taken)]
        for sock in found[1:]:
            sock.close()
        here = dialled[0][1] if dialled else None
        return here, tuple(far for _, _, far in taken), found[0] if found else None

    def settle(self, wire: socket.socket | None) -> None:
        """Both sides confirmed their connection: accept no other connection, and let data through."""
        if wire is not None:
            packet_filter.remove_filter(wire)
            with suppress(OSError):  # the options then stay, which only makes the transfer slower
                tune(wire, self._bind, self._peer)
        if self._listener is not None:
            with suppress(OSError):  # known already: the listener has no filter either
                packet_filter.close_listener(self._listener)
            self._listener.close()
            self._listener = None

    def send(self, tensor: torch.Tensor) -> Work:
        """Start sending a one-dimensional contiguous ``uint8`` tensor; the peer receives one of the same length.

        Raises:
            PeerLost: The connection has ended.
        """
        peer, nbytes = 1 - self._rank, tensor.numel()
        with _translated(PeerLost):
            receipt = self._group.recv([self._nothing], peer, tag(RECEIPT, nbytes))
            data = self._group.send([tensor], peer, tag(DATA, nbytes))
            mark = self._group.send([self._nothing], peer, tag(MARK, nbytes))
        return Work(receipt, (data, mark))

    def recv(self, tensor: torch.Tensor) -> Work:
        """Start filling a tensor; the counterpart of :meth:`send`."""
        peer, nbytes = 1 - self._rank, tensor.numel()
        with _translated(PeerLost):
            data = self._group.recv([tensor], peer, tag(DATA, nbytes))
            mark = self._group.recv([self._nothing], peer, tag(MARK, nbytes))
        return Work(mark, (data,), confirms=nbytes)

    def finish(self, work: Work) -> None:
        """Wait for an operation.

        Raises:
            PeerLost: The connection has ended.
        """
        with _translated(PeerLost):
            work.waits.wait(_FOREVER)
            if work.confirms is not None:
                receipt = self._group.send([self._nothing], 1 - self._rank, tag(RECEIPT, work.confirms))
                self._receipts.append(receipt)

    def _publish(self, address: Address, published: Callable[[Address], None]) -> None:
        """Called by gloo once it listens, before any other process knows the address."""
        self._here = address.host, address.port
        self._expected = address.pairs[1 - self._rank]
        self._listener = packet_filter.find_listener(*self._here)
        if self._listener is None:
            raise TransportError(f"gloo does not listen at {address.host}:{address.port} as it says")
        self._guard()
        connections = packet_filter.connections(local=self._here)
        for sock, _, _ in connections:
            sock.close()
        if connections:
            raise TransportError(f"an unknown process connected to gloo's port {address.port} before it was published")
        published(address)

    def _guard(self) -> None:
        if self._listener is None:
            return
        try:
            packet_filter.guard_listener(self._listener, self._peer, self._expected)
        except OSError as error:
            self.unfiltered = str(error)


def tag(kind: int, nbytes: int) -> int:
    """The tag of an operation for a block of this length.

    Gloo matches a send with a receive of the same tag. With the length in the tag, both lengths are always equal. A
    longer send would end the receiver's process.
    """
    return nbytes % _LENGTHS * _KINDS + kind


@contextmanager
def _translated(kind: type[TransportError]) -> Iterator[None]:
    """Translate gloo's errors, which all have one type, into this library's errors."""
    try:
        yield
    except RuntimeError as error:
        text = _SOURCE_LINE.sub("", str(error)).partition(". This is typically")[0].splitlines()[0]
        raise (TransferTimeout if "imed out" in text else kind)(f"gloo: {text}") from error
