"""Short messages between two processes of one host about blocks that are moved some other way.

Everything here blocks, except for ``cut``, and runs in worker threads.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable

from netloader.errors import PeerLost
from netloader.transports.io.operation import Operation

__all__ = ["LONGEST_MESSAGE", "ControlSocket"]

LONGEST_MESSAGE = 1 << 15

_TICKS = 8
"""Looks at the clock within the stall time."""


class ControlSocket:
    """One connected socket of messages, and whom it leads to.

    Args:
        sock: Connected, of type SEQPACKET; owned from here on.
        process: Descriptor of the peer's process, or None where the system has none; owned from here on. The socket
            alone doesn't tell when the peer died: a child of it may hold it open.
        stall: Seconds without progress after which an operation fails.
    """

    def __init__(self, sock: socket.socket, process: int | None, stall: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._process = process
        self._tick = max(5, int(stall * 1000 / _TICKS))

    def say(self, message: bytes, operation: Operation) -> None:
        """Send one message.

        Raises:
            PeerLost: The peer cut the line or died.
            TransferTimeout: It does not listen.
        """
        while True:
            try:
                self._sock.send(message)
            except BlockingIOError:
                self._wait(select.POLLOUT, operation)
            except OSError as error:
                raise _lost(error) from error
            else:
                return

    def hear(self, operation: Operation) -> bytes:
        """The next message; waits for it.

        Raises:
            PeerLost: The peer cut the line or died.
            TransferTimeout: It says nothing.
        """
        while (message := self.heard()) is None:
            self._wait(select.POLLIN, operation)
        return message

    def heard(self) -> bytes | None:
        """The next message, if there is one.

        Raises:
            PeerLost: The peer cut the line or died.
        """
        try:
            message = self._sock.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _lost(error) from error
        if not message:
            raise PeerLost("the peer closed its side of the channel")
        return message

    def checker(self) -> Callable[[], None]:
        """For one thread: what sees that the peer is there, and that neither side has cut the line.

        It is called after something was read, and raises :class:`PeerLost` when that can't be relied on.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        if self._process is not None:
            poll.register(self._process, select.POLLIN)

        def check() -> None:
            if poll.poll(0):
                raise PeerLost("the peer ended while its memory was being read")

        return check

    def cut(self) -> None:
        """End the line for both sides; whoever waits on it comes back. From any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    def close(self) -> None:
        """Free the descriptors, once no thread uses them any more. Idempotent."""
        self._sock.close()
        process, self._process = self._process, None
        if process is not None:
            os.close(process)

    def wait_for(self, fd: int, event: int, operation: Operation) -> None:
        """Wait until `fd` is ready, or there is something to hear.

        Raises:
            PeerLost: The peer died.
            TransferTimeout: Nothing moves.
        """
        self._wait(select.POLLIN, operation, (fd, event))

    def _wait(self, event: int, operation: Operation, other: tuple[int, int] | None = None) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        if other is not None:
            poll.register(*other)
        if self._process is not None:
            poll.register(self._process, select.POLLIN)
        ready = poll.poll(self._tick)
        if not ready:
            operation.check_stall()
        # A dying process closes its socket, too: what it said before that is heard first.
        elif all(fd == self._process for fd, _ in ready):
            raise PeerLost("the peer's process ended", hint="see its log")


def _lost(error: OSError) -> PeerLost:
    return PeerLost(f"the line to the peer broke: {error}")
