"""One direction of a channel within a host: read out of the sender's memory, or out of pipes of its pages.

A flow moves the blocks of one call at a time; everything blocks and runs in worker threads.
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

__all__ = ["Flow", "MemoryReader", "MemoryShower", "Pipe", "PipeReader", "PipeWriter", "Shared"]

_SHOWN, _READ = b"S", b"R"
"""What a message says: where blocks lie; blocks were read. Of each block it is said how many pieces it has and how many
bytes in all, and then where each piece lies and how many bytes it has."""

_MOST_SHOWN = 128
"""Blocks that may be shown and not yet read: their acknowledgements always fit into the socket."""

_SHOWN_TOGETHER = 16
"""Blocks that one message shows: each message costs both sides a system call."""

_READ_TOGETHER = 32
"""Blocks that are acknowledged together: each acknowledgement wakes the sender, which takes a processor for it."""

_COUNT = struct.Struct("=Q")
_WORD = 8
_MOST_WORDS = 2 * MOST_REGIONS

_MOST_PIPED = 128
"""Pieces that are put into a pipe, or taken out of it, by one call: as many as fill one when each lies in two pages."""

Work = Callable[[], None]


class Flow(Protocol):
    """One direction, at one of its ends."""

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> Sequence[Work | None]:
        """What is to be done for these blocks, each in the thread of its place, at once; None: nothing."""
        ...

    def cut(self) -> None:
        """End it for both sides; whoever waits in it comes back. From any thread."""
        ...

    def close(self) -> None:
        """Free what it holds, once no thread uses it. Idempotent."""
        ...


class MemoryShower:
    """The sender's end where the receiver reads its memory: says where each block lies, and waits until it was read."""

    def __init__(self, line: ControlSocket) -> None:
        self._line = line

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> list[Work]:
        """See :class:`Flow`."""
        return [lambda: self._show(blocks, operation)] if blocks else []

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._line.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._line.close()

    def _show(self, blocks: Sequence[BlockView], operation: Operation) -> None:
        unread = 0
        words = array("Q")
        for place, block in enumerate(blocks, 1):
            regions = block.regions()  # which the caller keeps alive until all were read
            words.extend((len(regions) // 2, block.nbytes))
            words += regions
            unread += 1
            if place % _SHOWN_TOGETHER == 0 or len(words) >= _MOST_WORDS or place == len(blocks):
                for start in range(0, len(words), _MOST_WORDS):
                    self._line.say(_SHOWN + words[start : start + _MOST_WORDS].tobytes(), operation)
                words = array("Q")
                while unread > _MOST_SHOWN:
                    unread -= self._read(operation, unread)
        while unread:
            unread -= self._read(operation, unread)

    def _read(self, operation: Operation, unread: int) -> int:
        """How many blocks more were read; waits until there are any."""
        return _were_read(self._line.hear(operation), unread, operation)


class MemoryReader:
    """The receiver's end where it reads the sender's memory, with several threads.

    Args:
        line: To the sender.
        pid: The sender's process, as the kernel named it; the line notices when it is no more.
        threads: Threads that read.
    """

    def __init__(self, line: ControlSocket, pid: int, threads: int) -> None:
        self._line = line
        self._pid = pid
        self._threads = threads
        self._turn = threading.Lock()  # whoever has it listens; one for all calls, so that they hear in their order
        self._lock = threading.Lock()
        # What was heard, and up to where it is being read; for whoever has the turn.
        self._shown: Regions[int] = array("Q")
        self._taken = 0
        self._read = 0  # blocks read and not yet acknowledged
        self._listening = False

    def begin(self, blocks: Sequence[BlockView], operation: Operation) -> list[Work]:
        """See :class:`Flow`."""
        rest = iter(enumerate(blocks))
        # All threads, however few the blocks: one that comes to the next call knows then that this one's are all heard.
        return [lambda: self._receive(rest, operation)] * self._threads if blocks else []

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._line.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._line.close()

    def _receive(self, rest: Iterator[tuple[int, BlockView]], operation: Operation) -> None:
        check = self._line.checker()
        while True:
            with self._turn:
                place, block = next(rest, (-1, None))
                if block is None:
                    break
                remote = self._next(block, operation)
            read(self._pid, remote, block.regions())
            # Only now is it certain that the sender, and no other process, was there and left its memory alone.
            check()
            self._acknowledge(1, operation, at_once=False)
            operation.moved()
            operation.completed(place)
        self._acknowledge(0, operation, at_once=True)

    def _acknowledge(self, count: int, operation: Operation, *, at_once: bool) -> None:
        """Say that `count` blocks more were read: now, or with those to come, unless somebody waits for the sender."""
        with self._lock:
            self._read += count
            if self._read and (at_once or self._listening or self._read >= _READ_TOGETHER):
                self._line.say(_READ + _COUNT.pack(self._read), operation)
                self._read = 0

    def _listen(self, operation: Operation) -> bytes:
        """The next message. The sender may wait for our acknowledgements before it says any more."""
        message = self._line.heard()
        if message is not None:
            return message
        with self._lock:
            self._listening = True
        try:
            self._acknowledge(0, operation, at_once=True)
            return self._line.hear(operation)
        finally:
            with self._lock:
                self._listening = False

    def _next(self, block: BlockView, operation: Operation) -> Regions[int]:
        """Where the bytes of the next block lie in the sender's memory."""
        count, nbytes = self._heard(2, operation)
        if nbytes != block.nbytes or count > nbytes:
            raise TransportError(f"the sender shows {nbytes} bytes as block {block.number}, which has {block.nbytes}")
        remote = self._heard(2 * count, operation)
        if total(remote) != nbytes:
            raise TransportError(f"the sender shows {total(remote)} bytes where it announced {nbytes}")
        return remote

    def _heard(self, count: int, operation: Operation) -> Regions[int]:
        """The next `count` words of what is shown."""
        while len(self._shown) - self._taken < count:
            message = self._listen(operation)
            if message[:1] != _SHOWN or len(message) % (2 * _WORD) != 1:
                raise TransportError(f"the sender said {message[:16]!r} where a block was to be shown")
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
    """The sender's end of a pipe of its own pages.

    Args:
        line: To the receiver, for this pipe alone.
        pipe: To write to.
        other: The end that the receiver has, too: a pipe that nobody can read from would raise a signal here.
    """

    def __init__(self, line: ControlSocket, pipe: PipeEnd, other: PipeEnd) -> None:
        self._line = line
        self._pipe = pipe
        self._other = other

    @property
    def far(self) -> int:
        """Descriptor of the receiver's end."""
        return self._other.fileno()

    def move(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Have these blocks read, in order."""
        # An empty one takes nothing from the pipe: its receiver may be done with it before it is sent.
        unread = sum(block.nbytes > 0 for _, block in blocks)
        for regions in _few(blocks, CALL_BYTES):
            rest = regions
            while rest:
                count = self._pipe.write(rest)
                # Heard in any case: a receiver that can't say more would stop reading.
                while (message := self._line.heard()) is not None:
                    unread -= _were_read(message, unread, operation)
                if count is None:
                    self._line.wait_for(self._pipe.fileno(), select.POLLOUT, operation)
                else:
                    operation.moved()
                    rest = left_of(rest, count)
        while unread:  # the pipe has our pages, not their bytes
            unread -= _were_read(self._line.hear(operation), unread, operation)

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._line.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._line.close()
        self._pipe.close()
        self._other.close()


class PipeReader:
    """The receiver's end of a pipe of the sender's pages.

    Args:
        line: To the sender, for this pipe alone.
        pipe: To read from.
    """

    def __init__(self, line: ControlSocket, pipe: PipeEnd) -> None:
        self._line = line
        self._pipe = pipe

    def move(self, blocks: Sequence[Placed], operation: Operation) -> None:
        """Fill these blocks, in order."""
        for placed in blocks:
            for regions in _few([placed], 1):
                rest = regions
                while rest:
                    rest = left_of(rest, self._fill(rest, operation))
            if placed[1].nbytes:
                self._line.say(_READ + _COUNT.pack(1), operation)
            operation.completed(placed[0])

    def cut(self) -> None:
        """See :class:`Flow`."""
        self._line.cut()

    def close(self) -> None:
        """See :class:`Flow`."""
        self._line.close()
        self._pipe.close()

    def _fill(self, regions: Regions[int], operation: Operation) -> int:
        while (count := self._pipe.read(regions)) is None:
            message = self._line.heard()
            if message is not None:
                raise TransportError(f"the sender said {message[:16]!r} where it has nothing to say")
            self._line.wait_for(self._pipe.fileno(), select.POLLIN, operation)
        if not count:
            raise PeerLost("the peer closed its side of the pipe")
        operation.moved()
        return count


class Shared:
    """Several pipes of one direction: blocks take turns on them.

    Args:
        pipes: At one end, in the order that both ends know.
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


def _few(blocks: Sequence[Placed], least: int) -> Iterator[Regions[int]]:
    """The pieces of blocks, no more at a time than fill a pipe: what did not fit is looked through again."""
    for regions, _ in calls(blocks, least):
        for start in range(0, len(regions), 2 * _MOST_PIPED):
            yield regions[start : start + 2 * _MOST_PIPED]


def _were_read(message: bytes, unread: int, operation: Operation) -> int:
    """How many blocks more the receiver has read, by its own word, of those that it has not."""
    count = _number(message, _READ)
    if not 0 < count <= unread:
        raise TransportError(f"the receiver read {count} blocks, {unread} were on their way")
    operation.moved()
    return count


def _number(message: bytes, kind: bytes) -> int:
    if message[:1] != kind or len(message) != 1 + _COUNT.size:
        raise TransportError(f"the peer said {message[:16]!r} where {kind!r} and a number were to come")
    number: int = _COUNT.unpack(message[1:])[0]
    return number
