"""Blocks over connected stream sockets, straight between the kernel and the tensors' memory.

Everything here blocks and runs in worker threads.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports._landing import Operation
from netloader.transports.base import BlockView

__all__ = ["CALL_BYTES", "LONGEST_CALL", "Lane", "Placed", "after", "calls", "share"]

CALL_BYTES = 1 << 20
"""Small blocks are moved together until a system call has this much to do; a block of more is one call's work."""

_CALL_SPANS = 1024
"""Pieces of memory that one system call takes (IOV_MAX)."""

LONGEST_CALL = 32 << 20
"""Bytes that one system call may be asked for: a stall is looked for between calls."""

_TICKS = 8
"""Looks at the clock within the stall time."""

Placed = tuple[int, BlockView]
"""A block and its place in the call."""

End = tuple[int, int]
"""After how many bytes a block ends, and its place in the call."""


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


def calls(blocks: Sequence[Placed], longest: int = LONGEST_CALL) -> Iterator[tuple[list[memoryview], list[End]]]:
    """What one system call moves at most, and which blocks end in it.

    Args:
        blocks: Blocks in order.
        longest: Bytes of one call, at most.
    """
    buffers: list[memoryview] = []
    ends: list[End] = []
    size = 0
    for place, block in blocks:
        spans = block.buffers()
        # Most blocks fit as they are; with tens of thousands of small tensors a look at each piece is what takes time.
        fits = block.nbytes <= longest and len(spans) <= _CALL_SPANS and all(spans)
        if fits and buffers and (len(buffers) + len(spans) > _CALL_SPANS or size + block.nbytes > longest):
            yield buffers, ends
            buffers, ends, size = [], [], 0
        if fits:
            buffers += spans
            size += block.nbytes
        for span in () if fits else spans:
            for start in range(0, len(span), longest):
                piece = span[start : start + longest] if len(span) > longest else span
                if len(buffers) == _CALL_SPANS or (buffers and size + len(piece) > longest):
                    yield buffers, ends
                    buffers, ends, size = [], [], 0
                buffers.append(piece)
                size += len(piece)
        ends.append((size, place))
        if size >= min(CALL_BYTES, longest):
            yield buffers, ends
            buffers, ends, size = [], [], 0
    if ends:
        yield buffers, ends


def after(buffers: Sequence[memoryview], moved: int) -> Sequence[memoryview]:
    """What is left of `buffers` when the first `moved` bytes are done."""
    for place, buffer in enumerate(buffers):
        if moved < len(buffer):
            return [buffer[moved:], *buffers[place + 1 :]]
        moved -= len(buffer)
    return ()


class Lane:
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
        for buffers, _ in calls(blocks):
            self.put(buffers, operation)

    def receive(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Fill blocks in order.

        Raises:
            TransportError: See :meth:`netloader.transports.base.Channel.recv`; what reporting a block raises.
        """
        for buffers, ends in calls(blocks):
            if len(ends) < 2:  # noqa: PLR2004 - one block, or a part of one: nothing to report before it is whole
                self.fill(buffers, operation)
                for _, place in ends:
                    operation.completed(place)
            else:
                self._fill_blocks(buffers, ends, operation)

    def put(self, buffers: Sequence[memoryview], operation: Operation) -> None:
        """Send the bytes of at most 1024 pieces of memory."""
        while buffers:
            buffers = after(buffers, self._move(self._sock.sendmsg, buffers, operation))

    def fill(self, buffers: Sequence[memoryview], operation: Operation) -> None:
        """Receive into at most 1024 pieces of memory."""
        receive = self._sock.recvmsg_into
        while buffers:
            moved = self._move(lambda rest: receive(rest, 0, socket.MSG_WAITALL)[0], buffers, operation)
            buffers = after(buffers, moved)

    def _fill_blocks(self, buffers: Sequence[memoryview], ends: Sequence[End], operation: Operation) -> None:
        """Receive several small blocks, and report each when it is whole: the next may take its time."""
        receive = self._sock.recvmsg_into
        done = reported = 0
        while True:
            while reported < len(ends) and ends[reported][0] <= done:
                operation.completed(ends[reported][1])
                reported += 1
            if not buffers:
                return
            moved = self._move(lambda rest: receive(rest)[0], buffers, operation)
            buffers = after(buffers, moved)
            done += moved

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

    @staticmethod
    def _move(move: Callable[[Sequence[memoryview]], int], buffers: Sequence[memoryview], operation: Operation) -> int:
        """Call `move` until it moves something; how many bytes that were."""
        while True:
            try:
                moved = move(buffers)
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
