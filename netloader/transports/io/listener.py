"""Stream sockets that exactly one peer gets: a door that opens to whoever knows the key, and the knock on it.

Everything here runs on an event loop with sockets that never block; what moves bytes afterwards is the transport's.
"""

from __future__ import annotations

import errno
import hmac
import socket
from collections.abc import Callable, Sequence

import anyio

from netloader.errors import PeerLost, TransferTimeout, TransportError

__all__ = [
    "KEY_BYTES",
    "Listener",
    "begin_dialling",
    "connected",
    "dial",
    "knock",
    "receive_exactly",
    "send_all",
    "socket_address",
]

KEY_BYTES = 16

_KEY_SECONDS = 5.0
"""Seconds that a connection may take to send its key: peers send it at once."""

_VISITORS = 16
"""Connections without a key yet, at most; the oldest makes room, since the peer is quick and strangers are not."""

_PASSING = (errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR, errno.ENETDOWN, errno.EHOSTUNREACH)
"""What ``accept`` says about a connection that was gone before it was accepted."""


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """Family and address of a numeric host.

    Raises:
        TransportError: The host names an interface that is not here.
    """
    if ":" not in host:
        return socket.AF_INET, (host, port)
    address, _, zone = host.partition("%")
    try:
        scope = 0 if not zone else int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    except OSError as error:
        raise TransportError(f"{host} names a network interface that is not here: {error}") from error
    return socket.AF_INET6, (address, port, 0, scope)


async def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of `data`.

    Raises:
        PeerLost: The connection broke.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            await anyio.wait_writable(sock)
        except OSError as error:
            raise PeerLost(f"the peer's data connection broke: {error}") from error


async def receive_exactly(sock: socket.socket, nbytes: int) -> bytes:
    """Receive `nbytes` bytes.

    Raises:
        PeerLost: The connection ended before.
    """
    data = b""
    while len(data) < nbytes:
        try:
            part = sock.recv(nbytes - len(data))
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        except OSError as error:
            raise PeerLost(f"the peer's data connection broke: {error}") from error
        if not part:
            raise PeerLost("the peer closed its data connection while it was being set up")
        data += part
    return data


def begin_dialling(sock: socket.socket, address: object) -> bool:
    """Begin to connect a socket that does not block; whether :func:`connected` has to wait for it.

    Raises:
        OSError: It can't be connected.
    """
    code = sock.connect_ex(address)  # type: ignore[arg-type]  # whatever the family calls an address
    if code in (errno.EINPROGRESS, errno.EAGAIN):
        try:
            sock.getpeername()
        except OSError:
            return True
        return False  # within a host it takes no time, only the answer was given before that was known
    if code:
        raise OSError(code, errno.errorcode.get(code, "error"))
    return False


async def connected(sock: socket.socket) -> None:
    """Wait until a socket is connected.

    Raises:
        OSError: It can't be connected.
    """
    await anyio.wait_writable(sock)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, errno.errorcode.get(code, "error"))


async def dial(sock: socket.socket, address: object) -> None:
    """Connect a socket that does not block.

    Raises:
        OSError: It can't be connected.
    """
    if begin_dialling(sock, address):
        await connected(sock)


async def knock(connections: Sequence[socket.socket], key: bytes, answer: bytes) -> None:
    """Client: show the key on each connection, and see that what answers is the server.

    Raises:
        PeerLost: A connection ended: the key was wrong, or the server gave up.
        TransportError: Someone else answers there.
    """
    for index, sock in enumerate(connections):
        await send_all(sock, key + bytes([index]))
    for sock in connections:
        if not hmac.compare_digest(await receive_exactly(sock, KEY_BYTES), answer):
            raise TransportError("what answers at the server's data port is not the server")


class Listener:
    """Server: a listening socket that lets in one peer, with as many connections as agreed.

    A connection that comes from elsewhere, knows no key, or says nothing costs itself, nothing else.

    Args:
        listener: Bound and listening; owned from here on.
        key: What the peer has to send first.
        answer: What it is told once all its connections are there.
        count: How many of them.
        stranger: Why a connection is not the peer's, judged before it says anything; None when it may be.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        key: bytes,
        answer: bytes,
        count: int,
        stranger: Callable[[socket.socket], str | None],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._key = key
        self._answer = answer
        self._stranger = stranger
        self._visitors: dict[socket.socket, anyio.CancelScope] = {}
        self._let_in: list[socket.socket | None] = [None] * count
        self._decided = anyio.Event()
        self._error: TransportError | None = None
        self._closed = False

    async def wait(self, timeout: float) -> list[socket.socket]:
        """The peer's connections in their order, non-blocking; the door is closed then, whatever happens.

        Raises:
            TransferTimeout: The peer did not come within `timeout` seconds.
            PeerLost: It came and went.
            TransportError: The system lets nobody in.
        """
        try:
            with anyio.move_on_after(timeout):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._accept, lambda visitor: tasks.start_soon(self._examine, visitor))
                    await self._decided.wait()
                    tasks.cancel_scope.cancel()
                if self._error is not None:
                    raise self._error
                connections = [one for one in self._let_in if one is not None]
                for one in connections:
                    await send_all(one, self._answer)
                self._let_in.clear()
                return connections
            raise TransferTimeout(
                f"the client did not open its data connections within {timeout:g} s",
                hint="a firewall between both hosts has to let the client reach the server's data ports",
            )
        finally:
            self.close()

    def close(self) -> None:
        """Close the door and whatever came through it and was not handed out. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for one in (self._listener, *self._visitors, *self._let_in):
            if one is not None:
                anyio.notify_closing(one)
                one.close()
        self._let_in.clear()

    async def _accept(self, examine: Callable[[socket.socket], object]) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(self._listener)
                continue
            except OSError as error:
                if error.errno in _PASSING:
                    continue
                self._decide(TransportError(f"no data connection can be accepted: {error}"))
                return
            if self._stranger(visitor) is not None:
                visitor.close()
                continue
            visitor.setblocking(False)
            if len(self._visitors) >= _VISITORS:
                next(iter(self._visitors.values())).cancel()
            self._visitors[visitor] = anyio.CancelScope(deadline=anyio.current_time() + _KEY_SECONDS)
            examine(visitor)
            await anyio.lowlevel.checkpoint()

    async def _examine(self, visitor: socket.socket) -> None:
        index = None
        try:
            with self._visitors[visitor]:
                index = await self._read_key(visitor)
        except PeerLost:
            index = None  # a stranger that left
        finally:
            del self._visitors[visitor]
            if index is None:
                visitor.close()
            else:
                self._let_in[index] = visitor
        if index is None:
            return
        if None not in self._let_in:
            self._decide(None)
            return
        # The peer says nothing more before it is answered: what makes this readable is its end.
        await anyio.wait_readable(visitor)
        self._decide(PeerLost("the client came to the data port and left again"))

    async def _read_key(self, visitor: socket.socket) -> int | None:
        """Which of its connections this is, if it is the peer's."""
        said = await receive_exactly(visitor, KEY_BYTES + 1)
        index = said[KEY_BYTES]
        if not hmac.compare_digest(said[:KEY_BYTES], self._key):
            return None
        return index if index < len(self._let_in) and self._let_in[index] is None else None

    def _decide(self, error: TransportError | None) -> None:
        if not self._decided.is_set():
            self._error = error
            self._decided.set()
