"""Blocks over connected stream sockets, straight between the kernel and the tensors' memory.

Everything here blocks and runs in worker threads.
"""

from __future__ import annotations

import errno
import socket
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence

from netloader.codecs.regions import Regions
from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.base import BlockView
from netloader.transports.io.operation import Operation
from netloader.transports.io.syscalls import MOST_REGIONS, Message, recvmsg, sendmsg

__all__ = ["CALL_BYTES", "LONGEST_CALL", "Placed", "Stream", "calls", "share"]

CALL_BYTES = 16 << 20
"""What one call sends at least, of several blocks when they are smaller. One that receives ends with its block, since
that is looked at then."""

LONGEST_CALL = 32 << 20
"""Bytes that one system call may be asked for: a stall is looked for between calls."""

_TICKS = 8
"""Looks at the clock within the stall time."""

Placed = tuple[int, BlockView]
"""A block and its place in the call."""

_Call = Callable[[int, Message, int], int]
"""A system call with its socket, what it moves, and its flags."""


def share(blocks: Sequence[BlockView], first: int, lanes: int) -> list[list[Placed]]:
    """Which lane moves which block: they take turns.

    Args:
        blocks: Blocks of one call.
        first: How many blocks this channel has moved before, in this direction.
        lanes: Lanes of the channel.
    """
    shares: list[list[Placed]] = [[] for _ in range(lanes)]
    for place, block in enumerate(blocks):
        shares[(first + place) % lanes].append((place, block))
    return shares


def calls(
    blocks: Sequence[Placed], least: int, longest: int = LONGEST_CALL
) -> Iterator[tuple[Regions[int], list[int]]]:
    """What one system call moves, and the places of the blocks that end in it.

    Args:
        blocks: Blocks in order.
        least: Bytes from which on no further block is added to a call.
        longest: Bytes of one call, at most.
    """
    regions, places, size = array("Q"), list[int](), 0
    for place, block in blocks:
        spans = block.regions()
        # Most blocks fit as they are; with tens of thousands of small tensors a look at each piece is what takes time.
        fits = block.nbytes <= longest and len(spans) <= 2 * MOST_REGIONS
        if fits and regions and (len(regions) + len(spans) > 2 * MOST_REGIONS or size + block.nbytes > longest):
            yield regions, places
            regions, places, size = array("Q"), [], 0
        if fits:
            regions += spans
            size += block.nbytes
        for start, nbytes in () if fits else zip(spans[::2], spans[1::2], strict=True):
            for offset in range(0, nbytes, longest):
                piece = min(nbytes - offset, longest)
                if len(regions) == 2 * MOST_REGIONS or (regions and size + piece > longest):
                    yield regions, places
                    regions, places, size = array("Q"), [], 0
                regions.extend((start + offset, piece))
                size += piece
        places.append(place)
        if size >= least:
            yield regions, places
            regions, places, size = array("Q"), [], 0
    if places:
        yield regions, places


class Stream:
    """One connected stream socket.

    Args:
        sock: Connected; owned from here on.
        stall: Seconds without progress after which an operation fails.
    """

    def __init__(self, sock: socket.socket, stall: float) -> None:
        # Really blocking, with the kernel's own timeouts: what Python calls a timeout costs a poll for each call.
        sock.setblocking(True)
        tick = max(stall / _TICKS, 0.005)
        seconds = int(tick)
        timeval = struct.pack("@ll", seconds, int((tick - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._sock = sock

    def send(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Send blocks in order.

        Raises:
            TransportError: See :meth:`netloader.transports.base.Channel.send`.
        """
        for message in [Message(regions) for regions, _ in calls(blocks, CALL_BYTES)]:
            self._move_all(sendmsg, message, 0, operation)

    def receive(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Fill blocks in order.

        Raises:
            TransportError: See :meth:`netloader.transports.base.Channel.recv`; what reporting a block raises.
        """
        for message, places in [(Message(regions), places) for regions, places in calls(blocks, 1)]:
            self._move_all(recvmsg, message, socket.MSG_WAITALL, operation)
            for place in places:
                operation.completed(place)

    def put(self, regions: Regions[int], operation: Operation) -> None:
        """Send the bytes of at most 1024 regions, which the caller keeps alive."""
        self._move_all(sendmsg, Message(regions), 0, operation)

    def fill(self, regions: Regions[int], operation: Operation) -> None:
        """Receive into at most 1024 regions, which the caller keeps alive."""
        self._move_all(recvmsg, Message(regions), socket.MSG_WAITALL, operation)

    def cut(self) -> None:
        """End the connection for both sides; whoever waits in it comes back. From any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    def close(self, *, reset: bool) -> None:
        """Free the socket, once no thread uses it any more. Idempotent.

        Args:
            reset: Tell the peer that what it sent is lost. After a receive was cut short the kernel may not do so by
                itself: it forgets the connection, and a sender that waits for room waits on.
        """
        if reset and self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self._sock.close()

    def _move_all(self, move: _Call, message: Message, flags: int, operation: Operation) -> None:
        """Send or fill all of `message`."""
        while message.nbytes:
            moved = self._move(move, message, flags, operation)
            if moved == message.nbytes:
                return
            message = message.after(moved)

    def _move(self, move: _Call, message: Message, flags: int, operation: Operation) -> int:
        """Call `move` until it moves something; how many bytes that were."""
        while True:
            try:
                moved = move(self._sock.fileno(), message, flags)
            except BlockingIOError:
                operation.check_stall()
                continue
            except OSError as error:
                raise _as_transport_error(error) from error
            if moved == 0:
                raise PeerLost("the peer closed its data connection")
            operation.moved()
            return moved


def _as_transport_error(error: OSError) -> TransportError:
    if error.errno == errno.EFAULT:
        return TransportError(f"the memory of a block can't be used: {error}")
    if error.errno == errno.ETIMEDOUT:
        return TransferTimeout(f"the peer's host does not answer any more: {error}")
    return PeerLost(f"the data connection to the peer broke: {error}", hint="is the peer still running?")
