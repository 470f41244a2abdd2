"""Authenticated data connections: a listener that accepts one peer by its key, and the client's side of it.

Everything here runs on an event loop with non-blocking sockets. Moving bytes afterwards is up to the transport.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import socket
from collections.abc import Callable, Sequence

import anyio

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.base import Setup

__all__ = [
    "KEY_BYTES",
    "Listener",
    "authenticate",
    "bound_keys",
    "connect_socket",
    "receive_exactly",
    "send_all",
    "socket_address",
    "start_connecting",
    "wait_connected",
]

KEY_BYTES = 16

_KEY_SECONDS = 5.0
"""Seconds that a connection may take to send its key. A peer sends it at once."""

_MAX_UNAUTHENTICATED = 16
"""Most connections that have not yet sent their key. The oldest is closed for a new one: a peer sends its key fast."""

_TRANSIENT_ERRORS = (errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR, errno.ENETDOWN, errno.EHOSTUNREACH)
"""Errors of ``accept`` that concern only one connection, which was lost before it was accepted."""


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """Family and address of a numeric host.

    Raises:
        TransportError: The host names an interface that this machine does not have.
    """
    if ":" not in host:
        return socket.AF_INET, (host, port)
    address, _, zone = host.partition("%")
    try:
        scope = 0 if not zone else int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    except OSError as error:
        raise TransportError(f"{host} names a network interface that this host does not have: {error}") from error
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


def start_connecting(sock: socket.socket, address: object) -> bool:
    """Start to connect a non-blocking socket. Returns whether :func:`wait_connected` has to be called.

    Raises:
        OSError: It can't be connected.
    """
    code = sock.connect_ex(address)  # type: ignore[arg-type]  # the type of an address depends on the family
    if code in (errno.EINPROGRESS, errno.EAGAIN):
        try:
            sock.getpeername()
        except OSError:
            return True
        return False  # within a host the connection is up already, although connect said "in progress"
    if code:
        raise OSError(code, errno.errorcode.get(code, "error"))
    return False


async def wait_connected(sock: socket.socket) -> None:
    """Wait until a socket is connected.

    Raises:
        OSError: It can't be connected.
    """
    await anyio.wait_writable(sock)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, errno.errorcode.get(code, "error"))


async def connect_socket(sock: socket.socket, address: object) -> None:
    """Connect a non-blocking socket.

    Raises:
        OSError: It can't be connected.
    """
    if start_connecting(sock, address):
        await wait_connected(sock)


def bound_keys(setup: Setup, key: bytes, answer: bytes) -> tuple[bytes, bytes]:
    """What the client sends and what the server answers on data connections; `key` and `answer` came in the offer."""
    return setup.bound(key, "client"), setup.bound(answer, "server")


async def authenticate(connections: Sequence[socket.socket], key: bytes, answer: bytes) -> None:
    """Client: send the key on each connection, and check the server's answer.

    Raises:
        PeerLost: A connection ended: the key was wrong, or the server gave up.
        TransportError: The answer does not prove that it comes from the server.
    """
    for index, sock in enumerate(connections):
        await send_all(sock, key + bytes([index]))
    for sock in connections:
        if not hmac.compare_digest(await receive_exactly(sock, KEY_BYTES), answer):
            raise TransportError("the answer from the server's data port is wrong: another program listens there")


class Listener:
    """Server: a listening socket that accepts one peer, with an agreed number of connections.

    A connection that comes from another host, has no key, or sends nothing is closed, without any other effect.

    Args:
        listener: Bound and listening. This object owns it from now on.
        key: What the peer has to send first.
        answer: What the peer is sent once all its connections are accepted.
        count: Number of connections.
        reject: Returns why a new connection can't be the peer's; None when it can.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        key: bytes,
        answer: bytes,
        count: int,
        reject: Callable[[socket.socket], str | None],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._key = key
        self._answer = answer
        self._reject = reject
        self._unauthenticated: dict[socket.socket, anyio.CancelScope] = {}
        self._accepted: list[socket.socket | None] = [None] * count
        self._decided = anyio.Event()
        self._error: TransportError | None = None
        self._closed = False

    async def wait(self, timeout: float) -> list[socket.socket]:
        """Wait for the peer's connections; returns them in order, non-blocking. The listener is closed in any case.

        Raises:
            TransferTimeout: The peer did not connect within `timeout` seconds.
            PeerLost: The peer connected and disconnected.
            TransportError: The system accepts no connections.
        """
        try:
            with anyio.move_on_after(timeout):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._accept, lambda connection: tasks.start_soon(self._examine, connection))
                    await self._decided.wait()
                    tasks.cancel_scope.cancel()
                if self._error is not None:
                    raise self._error
                connections = [one for one in self._accepted if one is not None]
                for one in connections:
                    await send_all(one, self._answer)
                self._accepted.clear()
                return connections
            raise TransferTimeout(
                f"the client did not open its data connections within {timeout:g} s",
                hint="a firewall between both hosts has to let the client reach the server's data ports",
            )
        finally:
            self.close()

    def close(self) -> None:
        """Close the listener and all connections that were not returned. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # a forked process may have a copy, in which nobody would accept
            self._listener.shutdown(socket.SHUT_RDWR)
        for one in (self._listener, *self._unauthenticated, *self._accepted):
            if one is not None:
                anyio.notify_closing(one)
                one.close()
        self._accepted.clear()

    async def _accept(self, examine: Callable[[socket.socket], object]) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(self._listener)
                continue
            except OSError as error:
                if error.errno in _TRANSIENT_ERRORS:
                    continue
                self._decide(TransportError(f"no data connection can be accepted: {error}"))
                return
            if self._reject(connection) is not None:
                connection.close()
                continue
            connection.setblocking(False)
            if len(self._unauthenticated) >= _MAX_UNAUTHENTICATED:
                next(iter(self._unauthenticated.values())).cancel()
            self._unauthenticated[connection] = anyio.CancelScope(deadline=anyio.current_time() + _KEY_SECONDS)
            examine(connection)
            await anyio.lowlevel.checkpoint()

    async def _examine(self, connection: socket.socket) -> None:
        index = None
        try:
            with self._unauthenticated[connection]:
                index = await self._read_key(connection)
        except PeerLost:
            index = None  # an unauthenticated connection ended
        finally:
            del self._unauthenticated[connection]
            if index is None:
                connection.close()
            else:
                self._accepted[index] = connection
        if index is None:
            return
        if None not in self._accepted:
            self._decide(None)
            return
        # The peer sends nothing before it gets the answer, so a readable connection means that it disconnected.
        await anyio.wait_readable(connection)
        self._decide(PeerLost("the client connected to the data port and disconnected"))

    async def _read_key(self, connection: socket.socket) -> int | None:
        """The index of this connection, if it is the peer's; else None."""
        said = await receive_exactly(connection, KEY_BYTES + 1)
        index = said[KEY_BYTES]
        if not hmac.compare_digest(said[:KEY_BYTES], self._key):
            return None
        return index if index < len(self._accepted) and self._accepted[index] is None else None

    def _decide(self, error: TransportError | None) -> None:
        if not self._decided.is_set():
            self._error = error
            self._decided.set()
