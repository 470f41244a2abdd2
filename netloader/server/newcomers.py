"""Connections on which nothing has arrived yet: accepted at once, and kept as bare sockets.

The kernel hands connections out in the order in which they came. So a client waits for all strangers before it, and
what one of them costs has to be little. A session costs about twenty-five times as much as a bare socket. It begins
with the first byte, and how fast sessions begin is limited apart from accepting.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from typing import Any

import anyio
from anyio.abc import SocketStream

from netloader.codecs import vllm_ascend
from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.server.budgets import Connections, Stage
from netloader.server.pace import Pace
from netloader.session.connection import host_of

__all__ = ["TURNED_AWAY", "Newcomer", "Newcomers"]

TURNED_AWAY = m.Refusal(
    code="busy",
    message="others want to connect, and this client has waited longest",
    hint="try again, or set WAIT on the client",
    retry_after=1.0,
)
"""What a client is told that has to go so that others can connect."""

_AT_ONCE = 32
"""Most connections that are accepted in one iteration of the event loop: one or two milliseconds."""

_AHEAD = 4
"""Of all strangers, one in so many may wait for the beginning of its session. With so many, no more are accepted: of a
flood of strangers that say something, most wait in the kernel, and none has to go for another one."""

_BURST = 1.0
"""Seconds of the pauses below that may be left out after a time without them: a thousand silent connections, which is
as many as wait in the kernel, do not delay the client behind them."""

_SILENT_PAUSE = 0.001
"""Seconds of pause for a silent connection that has to go. The time that each one may stay silent depends on it: 128 ms
under a lasting flood, with the default limit of 128."""

_CLOSED_PAUSE = 0.0002
"""The same for one that its peer closed: twice the time that it costs."""

_EXHAUSTED_PAUSE = 0.1
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of `accept` that mean that this host has run out of resources. Trying again at once would only spin."""


class Newcomer:
    """An accepted connection without a session.

    Attributes:
        sock: Its socket.
        host: Host of the peer.
        peer: Address of the peer.
    """

    __slots__ = ("host", "peer", "sock")

    def __init__(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        self.sock = sock
        self.host = host_of(address)
        self.peer = f"{self.host}:{address[1]}"


class Newcomers:
    """The connections of a server that have no session yet.

    Args:
        connections: The accounts of the server's connections.
        strangers: Most connections of clients that have not identified themselves.
        hello: Seconds within which the first byte has to arrive.
        pace: How fast sessions may begin.
        begin: Called with a connection whose session begins.
        make_room: Called when there is one more connection.
        stray: Called with a text about a connection that ended without having said anything.
        failed: Called with a text about a connection that could not be accepted.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        strangers: int,
        hello: float,
        pace: Pace,
        begin: Callable[[SocketStream], None],
        make_room: Callable[[], None],
        stray: Callable[[str], None],
        failed: Callable[[str], None],
    ) -> None:
        self._connections = connections
        self._ahead = max(1, strangers // _AHEAD)
        self._hello = hello
        self._pace = pace
        self._begin = begin
        self._make_room = make_room
        self._stray = stray
        self._failed = failed
        self._accepting = Pace(_BURST)
        self._silent: dict[Newcomer, float] = {}  # when each has to have said something, the oldest first
        self._ready: dict[Newcomer, None] = {}
        self._changed = anyio.Event()  # what is ready
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._turned_away = encode_frame(TURNED_AWAY)

    @property
    def peers(self) -> tuple[str, ...]:
        """The addresses of all."""
        return tuple(newcomer.peer for newcomer in (*self._silent, *self._ready))

    # --- tasks ------------------------------------------------------------------------------------------------------

    async def accept(self, listener: socket.socket) -> None:
        """Accept the connections of a listening socket, until it is closed."""
        count = 0
        while True:
            await self._until_wanted()
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                try:
                    await anyio.wait_readable(listener)
                except anyio.ClosedResourceError:
                    return
                continue
            except OSError as error:  # the peer closed, or no descriptors are left: go on accepting
                if listener.fileno() < 0:
                    return
                self._failed(str(error))
                await anyio.sleep(_EXHAUSTED_PAUSE if error.errno in _EXHAUSTED else 0.0)
                continue
            self._add(sock, address)
            count += 1
            if count % _AT_ONCE == 0:
                await anyio.lowlevel.checkpoint()

    async def begin_sessions(self) -> None:
        """Begin the sessions of those that have said something, in their order and not too fast."""
        while True:
            if pause := self._pace.wait(time.monotonic()):
                await anyio.sleep(pause)
                continue
            if not self._ready:
                await self._changed.wait()
                continue
            newcomer = next(iter(self._ready))
            self._leave(newcomer)
            try:
                stream = await SocketStream.from_socket(newcomer.sock)
            except (OSError, ValueError) as error:  # it was reset; anyio finds it unconnected then
                newcomer.sock.close()
                self._stray(f"{newcomer.peer}: {error}")
            except BaseException:
                newcomer.sock.close()
                raise
            else:
                self._begin(stream)

    async def _until_wanted(self) -> None:
        while True:
            if pause := self._accepting.wait(time.monotonic()):
                await anyio.sleep(pause)
            elif len(self._ready) >= self._ahead:
                await self._changed.wait()
            else:
                return

    # --- one connection ---------------------------------------------------------------------------------------------

    def _add(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        try:
            sock.setblocking(False)
            newcomer = Newcomer(sock, address)
        except OSError as error:  # the network interface is gone
            sock.close()
            self._stray(str(error))
            return
        self._silent[newcomer] = self._loop.time() + self._hello
        self._connections.enter(newcomer, newcomer.host, Stage.SILENT)
        self._listen(newcomer)
        if newcomer in self._silent:
            self._loop.add_reader(sock.fileno(), self._listen, newcomer)
            if self._timer is None:
                self._set_timer()
        self._make_room()

    def _listen(self, newcomer: Newcomer) -> None:
        """Find out whether it has said something, or has closed."""
        try:
            said = newcomer.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(newcomer, str(error))
            return
        if not said:
            self._gone(newcomer, "it closed the connection and had said nothing")
            return
        if said == vllm_ascend.FIRST_BYTE:
            self._gone(newcomer, "it is a client of vllm-ascend's own loader", vllm_ascend.NO_JOIN)
            return
        self._leave(newcomer)
        self._connections.enter(newcomer, newcomer.host, Stage.STRANGER)
        self._ready[newcomer] = None
        self._notify()

    def _gone(self, newcomer: Newcomer, why: str, last: bytes = b"") -> None:
        self._close(newcomer, last)
        self._accepting.spend(_CLOSED_PAUSE, time.monotonic())
        self._stray(f"{newcomer.peer}: {why}")

    def turn_away(self, newcomer: Newcomer) -> None:
        """Close a connection, because others want to connect."""
        self._accepting.spend(_SILENT_PAUSE, time.monotonic())
        self._close(newcomer, self._turned_away)

    def close(self, reason: str) -> None:
        """Close all of them, because the server ends."""
        frame = encode_frame(m.Goodbye(code="gone", reason=reason))
        for newcomer in (*self._silent, *self._ready):
            self._close(newcomer, frame)
        if self._timer is not None:
            self._timer.cancel()

    def _close(self, newcomer: Newcomer, last: bytes = b"") -> None:
        self._leave(newcomer)
        sock = newcomer.sock
        try:
            if last:
                sock.send(last)
                sock.recv(1 << 16)  # closing with unread input would send RST, and drop our message
        except OSError:
            pass  # nothing to read, or nobody there
        finally:
            sock.close()

    def _leave(self, newcomer: Newcomer) -> None:
        if self._silent.pop(newcomer, None) is not None:
            self._loop.remove_reader(newcomer.sock.fileno())
        elif newcomer in self._ready:
            del self._ready[newcomer]
            self._notify()
        self._connections.leave(newcomer)

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    # --- time -------------------------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        oldest = next(iter(self._silent.values()), None)
        self._timer = None if oldest is None else self._loop.call_at(oldest, self._expire)

    def _expire(self) -> None:
        """Close those that have said nothing in time."""
        now, text = self._loop.time(), f"it said nothing within {self._hello:g} s"
        late = encode_frame(m.Goodbye(code="timeout", reason=text))
        while self._silent and next(iter(self._silent.values())) <= now:
            newcomer = next(iter(self._silent))
            self._close(newcomer, late)
            self._stray(f"{newcomer.peer}: {text}")
        self._set_timer()
