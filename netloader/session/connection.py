"""The control connection: frames over a TCP stream."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from typing import Any, Generic, TypeVar

import anyio
from anyio.abc import SocketAttribute, SocketStream

from netloader.codecs.frames import LARGE_FRAME, FrameDecoder
from netloader.core.addresses import unmapped
from netloader.core.keys import FrameSeal
from netloader.core.messages import ClientMessage, ServerMessage
from netloader.errors import PeerLost

__all__ = ["ControlConnection", "host_of"]

M = TypeVar("M", bound=ClientMessage | ServerMessage)

_BROKEN = (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)

_UNACKED_MS = 20_000
"""Milliseconds that data may stay unacknowledged. After that the kernel closes the connection."""

_KEEPALIVE = (10, 5, 3)
"""TCP keepalive: idle seconds before the first probe, seconds between probes, number of probes. Together they detect a
host that is down within 25 s."""

_READ_BYTES = 1 << 18


def _tune(raw: socket.socket) -> None:
    """Set the socket options: send without delay, and detect a peer whose host is down."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, count = _KEEPALIVE
    for option, value in (
        ("TCP_KEEPIDLE", idle),
        ("TCP_KEEPINTVL", interval),
        ("TCP_KEEPCNT", count),
        ("TCP_USER_TIMEOUT", _UNACKED_MS),
    ):
        if hasattr(socket, option):  # other systems lack these options or name them differently
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def host_of(address: tuple[Any, ...]) -> str:
    """The host of a socket's address. A link-local IPv6 address is of no use without its zone, which is kept."""
    host, zone = unmapped(str(address[0])), address[3] if len(address) > 3 else 0  # noqa: PLR2004 - host, port, flow, zone
    return f"{host}%{socket.if_indextoname(zone)}" if zone else host


def _broken(error: Exception) -> PeerLost:
    cause = error.__cause__ if error.__cause__ is not None else error
    return PeerLost(f"the control connection broke: {str(cause) or type(cause).__name__}")


class ControlConnection(Generic[M]):
    """One control connection.

    Args:
        stream: A connected TCP stream. This object owns it from now on, unless the constructor raises.
        decoder: Decoder for the messages of the peer.

    Raises:
        PeerLost: The peer has closed the connection already.
    """

    def __init__(self, stream: SocketStream, decoder: FrameDecoder[M]) -> None:
        self._stream = stream
        self._decoder = decoder
        self._greeted = False
        raw = stream.extra(SocketAttribute.raw_socket)
        try:
            _tune(raw)
            peer, local = raw.getpeername(), raw.getsockname()
            self.local_host = host_of(local)
            self.peer_host, self.peer_port = host_of(peer), int(peer[1])
        except OSError as error:
            raise PeerLost(
                f"the peer went away while it connected: {error}", hint="is it up, and a netloader server?"
            ) from error
        self._raw = raw

    async def receive(self) -> list[M]:
        """The next messages; waits for at least one.

        Raises:
            PeerLost: The connection ended.
            RemoteProtocolError: The peer sent bytes that are not a message.
        """
        # What came with the greeting is decoded only now; this raises if an invalid frame followed the last messages.
        messages = self._decoder.feed(b"", greeting=not self._greeted)
        while not messages:
            try:
                data = await self._stream.receive(_READ_BYTES)
            except anyio.EndOfStream:
                cut = f", in the middle of a frame ({self._decoder.pending} bytes)" if self._decoder.pending else ""
                raise PeerLost(f"the peer closed the control connection{cut}") from None
            except _BROKEN as error:
                raise _broken(error) from error
            if not self._greeted or self._decoder.pending + len(data) <= LARGE_FRAME:
                messages = self._decoder.feed(data, greeting=not self._greeted)
            else:
                messages = await self._in_steps(self._decoder.feed_in_steps(data))
        self._greeted = True
        return messages

    async def _in_steps(self, steps: Generator[None, None, list[M]]) -> list[M]:
        """Decode a long frame in threads, one step at a time, so that a cancellation takes effect after each."""

        def step() -> list[M] | None:
            try:
                next(steps)
            except StopIteration as end:
                messages: list[M] = end.value
                return messages
            return None

        while True:
            messages = await anyio.to_thread.run_sync(step)
            if messages is not None:
                return messages

    def take_greeting(self) -> bytes:
        """Body of the peer's first message, as it came, which :meth:`receive` returned alone. It is forgotten then."""
        body, self._decoder.first_body = self._decoder.first_body, b""
        return body

    def authenticate(self, key: bytes) -> None:
        """Accept only authentic frames from here on, also of those that came already and were not returned."""
        self._decoder.authenticate(FrameSeal(key))

    def send_now(self, frame: bytes) -> bytes:
        """Send as much of a frame as the socket takes without blocking, and return the rest.

        Not while :meth:`send` runs. This saves a change of tasks for each message, at both ends (decision 45).
        """
        try:
            # By its number, which is -1 once the stream has closed it: asyncio hands out no socket that sends.
            return frame[os.write(self._raw.fileno(), frame) :]
        except OSError:  # the buffer is full, or the connection broke: `send` finds out which
            return frame

    async def send(self, frame: bytes) -> None:
        """Send a frame, or the rest of one.

        Raises:
            PeerLost: The connection ended.
        """
        try:
            await self._stream.send(frame)
        except _BROKEN as error:
            raise _broken(error) from error

    async def finish(self) -> None:
        """Shut down the sending direction and wait for the peer's FIN. Received bytes are discarded.

        Raises:
            PeerLost: The connection broke.
        """
        try:
            await self._stream.send_eof()
            while True:
                await self._stream.receive(_READ_BYTES)
        except anyio.EndOfStream:
            return
        except _BROKEN as error:
            raise _broken(error) from error

    async def aclose(self) -> None:
        """Close the connection at once. Idempotent. Bytes that the peer has not received are lost."""
        await anyio.aclose_forcefully(self._stream)
