"""A control socket: short messages between two processes of one host about blocks that are moved in another way.

All calls except ``cut`` block and run in worker threads.
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
"""Number of stall checks within the stall time."""


class ControlSocket:
    """A connected message socket, and the process at its other end.

    Args:
        sock: Connected, of type SEQPACKET. This object owns it from now on.
        process: Descriptor of the peer's process, or None where the system has none. This object owns it from now on.
            The socket alone does not show that the peer died, because a child process of the peer may keep it open.
        stall: Seconds without progress after which an operation fails.
    """

    def __init__(self, sock: socket.socket, process: int | None, stall: float) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._process = process
        self._tick = max(5, int(stall * 1000 / _TICKS))

    def send(self, message: bytes, operation: Operation) -> None:
        """Send one message.

        Raises:
            PeerLost: The peer closed the socket or died.
            TransferTimeout: The peer does not receive.
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

    def receive(self, operation: Operation) -> bytes:
        """Wait for the next message, and return it.

        Raises:
            PeerLost: The peer closed the socket or died.
            TransferTimeout: The peer sends nothing.
        """
        while (message := self.receive_now()) is None:
            self._wait(select.POLLIN, operation)
        return message

    def receive_now(self) -> bytes | None:
        """The next message, or None when there is none yet.

        Raises:
            PeerLost: The peer closed the socket or died.
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
        """For one thread: a function that checks that the peer is alive, and that neither side has closed the socket.

        Call it after reading the peer's memory. It raises :class:`PeerLost` when the bytes can't be trusted.
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
        """Shut the socket down for both sides, so that blocked calls return. Any thread may call it."""
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
        """Wait until `fd` is ready, or a message can be received.

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
        # A process that ends closes its socket too. Messages that it sent before are received first.
        elif all(fd == self._process for fd, _ in ready):
            raise PeerLost("the peer's process ended", hint="see its log")


def _lost(error: OSError) -> PeerLost:
    return PeerLost(f"the control socket to the peer broke: {error}")
