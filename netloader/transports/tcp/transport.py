"""The tcp transport: blocks over TCP, directly between socket and tensor memory. It works everywhere.

For each session the server listens on a separate port, at the local address of the control connection. It accepts only
the client of that session, which authenticates by a key that was sent over the control connection. After that the
connections carry only the bytes of the blocks, because both sides know their sizes. The bytes are not encrypted.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import anyio
import anyio.lowlevel
import msgspec

from netloader.core.addresses import unmapped
from netloader.errors import PeerLost, TransferTimeout, TransportError, TransportUnavailable
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup
from netloader.transports.io.channel_state import ChannelState
from netloader.transports.io.listener import (
    KEY_BYTES,
    Listener,
    authenticate,
    bound_keys,
    socket_address,
    start_connecting,
    wait_connected,
)
from netloader.transports.io.operation import Operation
from netloader.transports.io.socket_options import tune
from netloader.transports.io.stream import Placed, Stream, share
from netloader.transports.io.thread_pool import ThreadPool

__all__ = ["TcpTransport"]

_MOST_LANES = 16
_MANY_PROCESSORS = 16

_CONNECT_SECONDS = 5.0
"""Seconds that connecting to a data port may take. The port is open before the client hears of it, and the control
connection shows that the host can be reached, so only something that drops packets takes longer."""

_FIREWALL = "a firewall between both hosts has to let the client reach the server's data ports"

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class _TcpOffer(msgspec.Struct, frozen=True):
    """What the client needs: the port, the number of connections, the key to send, and the answer to expect."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    lanes: Annotated[int, msgspec.Meta(ge=1, le=_MOST_LANES)]
    key: Key
    answer: Key


class _TcpPending:
    """A server's half-open channel: its listener, and the offer."""

    def __init__(
        self,
        offer: bytes,
        data_listener: Listener,
        setup: Setup,
        channel: Callable[[Sequence[socket.socket], Setup], Channel],
    ) -> None:
        self.offer = offer
        self._listener = data_listener
        self._setup = setup
        self._channel = channel

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        return self._channel(await self._listener.wait(self._setup.timeout), self._setup)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        self._listener.close()


class _TcpChannel:
    """A channel: several connections, each with a thread for each direction in use. Blocks are sent round robin."""

    depth = 2
    """Two, so that a lane can start on the next call while others still work on this one."""
    whole_blocks = False

    def __init__(self, connections: Sequence[socket.socket], setup: Setup, staged: int | None) -> None:
        for sock in connections:
            tune(sock, setup.local_host, setup.peer_host)
        self._stall = setup.stall
        self._lanes = [_lane(sock, setup, staged) for sock in connections]
        self._state = ChannelState("tcp channel", self.depth)
        self._pool = ThreadPool("tcp", self._cut)
        self._moved = {"send": 0, "recv": 0}
        self._receives = 0  # stays above 0, when one is cut short

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("send", self._cut):
            operation = Operation("the peer takes no bytes", blocks, None, self._stall, self._cut)
            shares = self._shares("send", blocks)
            works = [
                partial(lane.send, mine, operation) if mine else None
                for lane, mine in zip(self._lanes, shares, strict=True)
            ]
            await self._pool.run_all("send", operation, works)

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("recv", self._cut):
            self._receives += 1
            operation = Operation("the peer sends nothing", blocks, landed, self._stall, self._cut)
            shares = self._shares("recv", blocks)
            works = [
                partial(lane.receive, mine, operation) if mine else None
                for lane, mine in zip(self._lanes, shares, strict=True)
            ]
            await self._pool.run_all("recv", operation, works)
            self._receives -= 1

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        self._state.end("it was closed", closed=True)
        self._cut()
        await self._pool.aclose(self._free)
        await self._state.idle()

    def _shares(self, direction: str, blocks: Sequence[BlockView]) -> list[list[Placed]]:
        shares = share(blocks, self._moved[direction], len(self._lanes))
        self._moved[direction] += len(blocks)
        return shares

    def _cut(self) -> None:
        for lane in self._lanes:
            lane.cut()

    def _free(self) -> None:
        for lane in self._lanes:
            lane.close(reset=self._receives > 0)


class TcpTransport:
    """Moves blocks over TCP; for tensors of every device that torch can copy from and to.

    Args:
        lanes: Connections of one channel, chosen by the server; by default 2, or 4 with many processors. One connection
            keeps one processor busy at each end. While the blocks of one connection are hashed, the others go on.
        staged: For tests: move blocks of the CPU through staging memory of this many bytes for each lane.
    """

    name = "tcp"

    def __init__(self, lanes: int | None = None, *, staged: int | None = None) -> None:
        if lanes is not None and not 1 <= lanes <= _MOST_LANES:
            raise TransportError(f"lanes is {lanes}, allowed: 1 to {_MOST_LANES}")
        self._lanes = lanes
        self._staged = staged

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        return "the meta device has no bytes" if device.partition(":")[0] == "meta" else None

    def facts(self, device: str) -> Mapping[str, str]:
        """None: a peer that reached the control port may be able to reach a data port."""
        del device
        return {}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        await anyio.lowlevel.checkpoint()
        lanes = _lanes_for() if self._lanes is None else self._lanes
        family, address = socket_address(setup.local_host, 0)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind(address)
            listener.listen(2 * _MOST_LANES)
            port = int(listener.getsockname()[1])
        except OSError as error:
            listener.close()
            raise TransportError(f"no data port can be opened at {setup.local_host}: {error}") from error
        offer = _TcpOffer(port, lanes, secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES))
        key, answer = bound_keys(setup, offer.key, offer.answer)
        data_listener = Listener(
            listener,
            key=key,
            answer=answer,
            count=lanes,
            reject=lambda connection: _reject(connection, setup.peer_host),
        )
        return _TcpPending(msgspec.msgpack.encode(offer), data_listener, setup, self._channel)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        try:
            wanted = msgspec.msgpack.decode(offer, type=_TcpOffer)
        except msgspec.DecodeError as error:
            raise TransportError(f"the server's offer of a tcp channel is invalid: {error}") from error
        connections: list[socket.socket] = []
        try:
            with anyio.fail_after(setup.timeout):
                await _connect_all(connections, wanted, setup)
                await authenticate(connections, *bound_keys(setup, wanted.key, wanted.answer))
        except BaseException as error:
            for sock in connections:
                sock.close()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(
                    f"the server's data port {wanted.port} at {setup.peer_host} did not answer within "
                    f"{setup.timeout:g} s",
                    hint=_FIREWALL,
                ) from None
            raise
        return self._channel(connections, setup)

    def _channel(self, connections: Sequence[socket.socket], setup: Setup) -> Channel:
        try:
            return _TcpChannel(connections, setup, self._staged)
        except BaseException:
            for sock in connections:
                sock.close()
            raise


def _lane(sock: socket.socket, setup: Setup, staged: int | None) -> Stream:
    if staged is None and setup.device.partition(":")[0] == "cpu":
        return Stream(sock, setup.stall)
    from netloader.transports.tcp.staged import StagedStream

    return StagedStream(sock, setup.stall, setup.device, staged)


def _lanes_for() -> int:
    return 4 if len(os.sched_getaffinity(0)) >= _MANY_PROCESSORS else 2


async def _connect_all(connections: list[socket.socket], offer: _TcpOffer, setup: Setup) -> None:
    """Open the connections that the offer asks for, adding each to `connections` before it is used."""
    where = f"the server's data port {offer.port} at {setup.peer_host}"
    family, address = socket_address(setup.peer_host, offer.port)
    _, own = socket_address(setup.local_host, 0)
    waited_for: list[socket.socket] = []
    try:
        for _ in range(offer.lanes):
            sock = socket.socket(family, socket.SOCK_STREAM)
            connections.append(sock)
            sock.setblocking(False)
            sock.bind(own)  # the server accepts only the address that the control connection comes from
            if start_connecting(sock, address):
                waited_for.append(sock)
        with anyio.move_on_after(_CONNECT_SECONDS) as connecting:
            for sock in waited_for:
                await wait_connected(sock)
    except OSError as error:
        raise PeerLost(f"{where} can't be reached: {error}", hint=_FIREWALL) from error
    if connecting.cancelled_caught:  # the control connection is up, so this host is: another transport may work
        raise TransportUnavailable(f"{where} did not answer within {_CONNECT_SECONDS:g} s", hint=_FIREWALL)


def _reject(connection: socket.socket, expected: str) -> str | None:
    try:
        host = unmapped(str(connection.getpeername()[0]))
    except OSError as error:
        return f"it was closed: {error}"
    return None if host == unmapped(expected.partition("%")[0]) else f"it comes from {host}"
