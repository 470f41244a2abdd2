"""Moves blocks over connected stream sockets, directly between the kernel and the tensors' memory.

All calls block and run in worker threads.
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
"""Least bytes of one send call, which joins several blocks when they are smaller. A receive call ends with its block,
because a complete block is hashed at once."""

LONGEST_CALL = 32 << 20
"""Most bytes of one system call, because stalls are detected between calls."""

_TICKS = 8
"""Number of stall checks within the stall time."""

Placed = tuple[int, BlockView]
"""A block and its position in the call."""

_Call = Callable[[int, Message, int], int]
"""A system call: takes the socket's descriptor, a message and flags."""


def share(blocks: Sequence[BlockView], first: int, lanes: int) -> list[list[Placed]]:
    """Distribute blocks over lanes, round robin.

    Args:
        blocks: Blocks of one call.
        first: Number of blocks that this channel moved before in this direction.
        lanes: Number of lanes of the channel.
    """
    shares: list[list[Placed]] = [[] for _ in range(lanes)]
    for place, block in enumerate(blocks):
        shares[(first + place) % lanes].append((place, block))
    return shares


def calls(
    blocks: Sequence[Placed], least: int, longest: int = LONGEST_CALL
) -> Iterator[tuple[Regions[int], list[int]]]:
    """What each system call moves, and the positions of the blocks that it completes.

    Args:
        blocks: Blocks in order.
        least: Number of bytes from which on no further block is added to a call.
        longest: Most bytes of one call.
    """
    regions, places, size = array("Q"), list[int](), 0
    for place, block in blocks:
        spans = block.regions()
        # Most blocks fit as they are. Visiting each region would be slow with tens of thousands of small tensors.
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
        sock: Connected. This object owns it from now on.
        stall: Seconds without progress after which an operation fails.
    """

    def __init__(self, sock: socket.socket, stall: float) -> None:
        # A blocking socket with the kernel's timeouts, because Python's timeouts need one more system call each time.
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
            TransportError: See :meth:`netloader.transports.base.Channel.recv`.
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
        """Shut the connection down for both sides, so that blocked calls return. Any thread may call it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    def close(self, *, reset: bool) -> None:
        """Free the socket, once no thread uses it any more. Idempotent.

        Args:
            reset: Send a reset. After an interrupted receive the kernel may not send one by itself. A sender that waits
                for buffer space would then wait until its timeout.
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
        """Call `move` until it moves bytes; returns how many."""
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
        return TransferTimeout(f"the peer's host no longer answers: {error}")
    return PeerLost(f"the data connection to the peer broke: {error}", hint="check that the peer is still running")
