"""One direction of a channel within a host: the receiver reads the sender's memory, or pipes with the sender's pages.

A flow moves the blocks of one call at a time. All calls block and run in worker threads.
"""

from __future__ import annotations

import select
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from netloader.codecs.regions import Regions, left_of, total
from netloader.errors import PeerLost, TransportError
from netloader.transports.base import BlockView
from netloader.transports.io.operation import Operation
from netloader.transports.io.stream import CALL_BYTES, Placed, calls, share
from netloader.transports.io.syscalls import MOST_REGIONS
from netloader.transports.shm.control_socket import ControlSocket
from netloader.transports.shm.pipe import PipeEnd
from netloader.transports.shm.process_memory import read

__all__ = ["Flow", "MemoryReader", "MemorySender", "Pipe", "PipeReader", "PipeSet", "PipeWriter"]

_SHOWN, _READ = b"S", b"R"
"""The kinds of messages: addresses of blocks, and acknowledgement of read blocks. For each block, the first kind holds
the number of regions and the total bytes, then the address and size of each region."""

_MAX_UNACKNOWLEDGED = 128
"""Most blocks that are announced and not yet acknowledged, so that acknowledgements always fit into the socket."""

_BLOCKS_PER_MESSAGE = 16
"""Most blocks that one message announces, because each message costs both sides a system call."""

_BLOCKS_PER_ACK = 32
"""Blocks that are acknowledged together, because each acknowledgement wakes the sender."""

_COUNT = struct.Struct("=Q")
_WORD = 8
_MOST_WORDS = 2 * MOST_REGIONS

_PIPE_REGIONS = 128
"""Most regions that one call puts into a pipe or takes out of it: they fill a pipe when each touches two pages."""

Work = Callable[[], None]


class Flow(Protocol):
    """One direction, at one of its ends."""

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> Sequence[Work | None]:
        """The work for these blocks: a function for each thread, to run in parallel; None: no work for that thread."""
        ...

    def cut(self) -> None:
        """Shut it down for both sides, so that blocked calls return. Any thread may call it."""
        ...

    def close(self) -> None:
        """Free its resources, once no thread uses it. Idempotent."""
        ...


class MemorySender:
    """The sender's end when the receiver reads its memory: sends the blocks' addresses, waits until all are read."""

    def __init__(self, control: ControlSocket) -> None:
        self._control = control

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> list[Work]:
        """See :class:`Flow`."""
        return [lambda: self._send_regions(blocks, operation)] if blocks else []

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._control.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._control.close()

    def _send_regions(self, blocks: Sequence[BlockView], operation: Operation) -> None:
        unread = 0
        words = array("Q")
        for place, block in enumerate(blocks, 1):
            regions = block.regions()  # the caller keeps the memory alive until all blocks were read
            words.extend((len(regions) // 2, block.nbytes))
            words += regions
            unread += 1
            if place % _BLOCKS_PER_MESSAGE == 0 or len(words) >= _MOST_WORDS or place == len(blocks):
                for start in range(0, len(words), _MOST_WORDS):
                    self._control.send(_SHOWN + words[start : start + _MOST_WORDS].tobytes(), operation)
                words = array("Q")
                while unread > _MAX_UNACKNOWLEDGED:
                    unread -= self._read(operation, unread)
        while unread:
            unread -= self._read(operation, unread)

    def _read(self, operation: Operation, unread: int) -> int:
        """Wait until more blocks were read, and return how many."""
        return _acknowledged_blocks(self._control.receive(operation), unread, operation)


class MemoryReader:
    """The receiver's end when it reads the sender's memory, with several threads.

    Args:
        control: Control socket to the sender. It detects when the sender's process ends.
        pid: The sender's process, as the kernel reports it.
        threads: Number of threads that read.
    """

    def __init__(self, control: ControlSocket, pid: int, threads: int) -> None:
        self._control = control
        self._pid = pid
        self._threads = threads
        self._receive_lock = (
            threading.Lock()
        )  # whoever has it listens; one for all calls, so that they hear in their order
        self._lock = threading.Lock()
        # What was heard, and up to where it is being read; for whoever has the turn.
        self._shown: Regions[int] = array("Q")
        self._taken = 0
        self._read = 0  # blocks read and not yet acknowledged
        self._listening = False

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> list[Work]:
        """See :class:`Flow`."""
        rest = iter(enumerate(blocks))
        # Every thread takes part, even with few blocks: a thread that starts on the next call then knows that all
        # messages of this call were received.
        return [lambda: self._receive(rest, operation)] * self._threads if blocks else []

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._control.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._control.close()

    def _receive(self, rest: Iterator[tuple[int, BlockView]], operation: Operation) -> None:
        check = self._control.checker()
        while True:
            with self._receive_lock:
                place, block = next(rest, (-1, None))
                if block is None:
                    break
                remote = self._next(block, operation)
            read(self._pid, remote, block.regions())
            # Only now is it certain that the bytes came from the sender's process, and that it still held the block.
            check()
            self._acknowledge(1, operation, at_once=False)
            operation.moved()
            operation.completed(place)
        self._acknowledge(0, operation, at_once=True)

    def _acknowledge(self, count: int, operation: Operation, *, at_once: bool) -> None:
        """Count `count` more blocks as read. Acknowledge at once, or together with later ones if no thread waits."""
        with self._lock:
            self._read += count
            if self._read and (at_once or self._listening or self._read >= _BLOCKS_PER_ACK):
                self._control.send(_READ + _COUNT.pack(self._read), operation)
                self._read = 0

    def _listen(self, operation: Operation) -> bytes:
        """Wait for the next message. The sender may need this side's acknowledgements before it sends one."""
        message = self._control.receive_now()
        if message is not None:
            return message
        with self._lock:
            self._listening = True
        try:
            self._acknowledge(0, operation, at_once=True)
            return self._control.receive(operation)
        finally:
            with self._lock:
                self._listening = False

    def _next(self, block: BlockView, operation: Operation) -> Regions[int]:
        """The addresses of the next block in the sender's memory."""
        count, nbytes = self._words(2, operation)
        if nbytes != block.nbytes or count > nbytes:
            raise TransportError(f"the sender announced {nbytes} bytes as block {block.number} of {block.nbytes} bytes")
        remote = self._words(2 * count, operation)
        if total(remote) != nbytes:
            raise TransportError(f"the sender announced {nbytes} bytes, but its regions have {total(remote)}")
        return remote

    def _words(self, count: int, operation: Operation) -> Regions[int]:
        """The next `count` words of the announced addresses."""
        while len(self._shown) - self._taken < count:
            message = self._listen(operation)
            if message[:1] != _SHOWN or len(message) % (2 * _WORD) != 1:
                raise TransportError(f"the sender sent {message[:16]!r} instead of the address of a block")
            self._shown, self._taken = self._shown[self._taken :], 0
            self._shown.frombytes(message[1:])
        self._taken += count
        return self._shown[self._taken - count : self._taken]


class Pipe(Protocol):
    """One end of one pipe."""

    def move(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Move these blocks, in order."""
        ...

    def cut(self) -> None:
        """See :class:`Flow`."""
        ...

    def close(self) -> None:
        """See :class:`Flow`."""
        ...


class PipeWriter:
    """The sender's end of a pipe with its own pages.

    Args:
        control: Control socket to the receiver, for this pipe only.
        pipe: The writing end.
        other: The reading end, which the receiver has too. Kept open, because writing to a pipe without a reader raises
            a signal.
    """

    def __init__(self, control: ControlSocket, pipe: PipeEnd, other: PipeEnd) -> None:
        self._control = control
        self._pipe = pipe
        self._other = other

    @property
    def peer_fd(self) -> int:
        """Descriptor of the receiver's end."""
        return self._other.fileno()

    def move(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Send these blocks, in order, and wait until they were read."""
        # An empty block takes nothing from the pipe, so its receiver may acknowledge it before it is sent.
        unread = sum(block.nbytes > 0 for _, block in blocks)
        for regions in _batches(blocks, CALL_BYTES):
            rest = regions
            while rest:
                count = self._pipe.write(rest)
                # Always receive acknowledgements: a receiver that can't send more of them would stop reading.
                while (message := self._control.receive_now()) is not None:
                    unread -= _acknowledged_blocks(message, unread, operation)
                if count is None:
                    self._control.wait_for(self._pipe.fileno(), select.POLLOUT, operation)
                else:
                    operation.moved()
                    rest = left_of(rest, count)
        while unread:  # the pipe refers to this process's pages, so they must not change before they are read
            unread -= _acknowledged_blocks(self._control.receive(operation), unread, operation)

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._control.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._control.close()
        self._pipe.close()
        self._other.close()


class PipeReader:
    """The receiver's end of a pipe with the sender's pages.

    Args:
        control: Control socket to the sender, for this pipe only.
        pipe: The reading end.
    """

    def __init__(self, control: ControlSocket, pipe: PipeEnd) -> None:
        self._control = control
        self._pipe = pipe

    def move(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Fill these blocks, in order."""
        for placed in blocks:
            for regions in _batches([placed], 1):
                rest = regions
                while rest:
                    rest = left_of(rest, self._fill(rest, operation))
            if placed[1].nbytes:
                self._control.send(_READ + _COUNT.pack(1), operation)
            operation.completed(placed[0])

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._control.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._control.close()
        self._pipe.close()

    def _fill(self, regions: Regions[int], operation: Operation) -> int:
        while (count := self._pipe.read(regions)) is None:
            message = self._control.receive_now()
            if message is not None:
                raise TransportError(f"the sender sent {message[:16]!r}, which is not expected here")
            self._control.wait_for(self._pipe.fileno(), select.POLLIN, operation)
        if not count:
            raise PeerLost("the peer closed its side of the pipe")
        operation.moved()
        return count


class PipeSet:
    """Several pipes of one direction. Blocks are distributed over them, round robin.

    Args:
        pipes: The pipes at one end, in the same order as at the other end.
    """

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self._pipes = pipes
        self._moved = 0

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> list[Work | None]:
        """See :class:`Flow`."""
        shares = share(blocks, self._moved, len(self._pipes))
        self._moved += len(blocks)
        return [
            partial(pipe.move, mine, operation) if mine else None
            for pipe, mine in zip(self._pipes, shares, strict=True)
        ]

    def cut(self) -> None:
        """See :class:`Flow`."""
        for pipe in self._pipes:
            pipe.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        for pipe in self._pipes:
            pipe.close()


def _batches(blocks: Sequence[Placed], least: int) -> Iterator[Regions[int]]:
    """The regions of blocks, in batches that fill a pipe, because regions that did not fit are processed again."""
    for regions, _ in calls(blocks, least):
        for start in range(0, len(regions), 2 * _PIPE_REGIONS):
            yield regions[start : start + 2 * _PIPE_REGIONS]


def _acknowledged_blocks(message: bytes, unread: int, operation: Operation) -> int:
    """The number of blocks that an acknowledgement counts; at most `unread`."""
    count = _number(message, _READ)
    if not 0 < count <= unread:
        raise TransportError(f"the receiver acknowledged {count} blocks, only {unread} were in flight")
    operation.moved()
    return count


def _number(message: bytes, kind: bytes) -> int:
    if message[:1] != kind or len(message) != 1 + _COUNT.size:
        raise TransportError(f"the peer sent {message[:16]!r} instead of {kind!r} and a number")
    number: int = _COUNT.unpack(message[1:])[0]
    return number
