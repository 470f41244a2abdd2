"""The shm transport: within one host, the receiver reads blocks directly from the sender's memory, where permitted.

Both ends connect through an abstract Unix socket, which has no file and disappears with its process. They authenticate
by a key that was sent over the control connection, and the kernel tells each end the process and user of the other.
Then each end tries to read a few bytes of the other's memory. Where that works, the sender of blocks only sends their
addresses and waits until they were read. Where it is forbidden, the sender puts its pages into pipes, which it passes
to the other end through that socket.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import anyio
import anyio.lowlevel
import msgspec

from netloader.errors import TransferTimeout, TransportError, TransportUnavailable
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup
from netloader.transports.io.channel_state import ChannelState
from netloader.transports.io.listener import KEY_BYTES, Listener, authenticate, bound_keys, connect_socket
from netloader.transports.io.operation import Operation
from netloader.transports.io.thread_pool import ThreadPool
from netloader.transports.shm.handshake import Handshake, credentials
from netloader.transports.shm.remote_memory import Flow

__all__ = ["ShmTransport"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")

_MANY_PROCESSORS = 16


@cache
def _system(boot: Path) -> str:
    """A name of the running system. It is read once: a server needs no descriptor for it at each connection."""
    return hashlib.sha256(b"netloader " + boot.read_bytes().strip()).hexdigest()[:32]


Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class _ShmOffer(msgspec.Struct, frozen=True):
    """What the client needs: the socket's name, the key to send, and the answer to expect."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
    key: Key
    answer: Key


class _ShmPending:
    """A server's half-open channel: its listener, and the offer."""

    def __init__(
        self, offer: bytes, data_listener: Listener, setup: Setup, meet: Callable[..., Awaitable[Channel]]
    ) -> None:
        self.offer = offer
        self._listener = data_listener
        self._setup = setup
        self._meet = meet

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        outgoing, incoming = await self._listener.wait(self._setup.timeout)
        return await self._meet(outgoing, incoming, self._setup, serving=True)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        self._listener.close()


class _ShmChannel:
    """A channel: two flows, one for each direction, and their threads."""

    depth = 2
    """Two, so that a thread can start on the next call while others still work on this one."""
    whole_blocks = False

    def __init__(self, outgoing: Flow, incoming: Flow, stall: float) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._stall = stall
        self._state = ChannelState("shm channel", self.depth)
        self._pool = ThreadPool("shm", self._cut)

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("send", self._cut):
            operation = Operation("the peer takes no bytes", blocks, None, self._stall, self._cut)
            await self._pool.run_all("send", operation, self._outgoing.begin(blocks, operation))

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("recv", self._cut):
            operation = Operation("the peer sends nothing", blocks, landed, self._stall, self._cut)
            await self._pool.run_all("recv", operation, self._incoming.begin(blocks, operation))

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        self._state.end("it was closed", closed=True)
        self._cut()
        await self._pool.aclose(self._free)
        await self._state.idle()

    def _cut(self) -> None:
        self._outgoing.cut()
        self._incoming.cut()

    def _free(self) -> None:
        self._outgoing.close()
        self._incoming.close()


class ShmTransport:
    """Moves blocks between two processes of one host and one user; for tensors in the CPU's memory.

    Args:
        reading: Whether this side tries to read the other's memory. If False, all blocks come through pipes.
        threads: Number of reading threads, and of pipes that a server makes; by default 2, or 4 with many processors.
    """

    name = "shm"

    def __init__(self, *, reading: bool = True, threads: int | None = None) -> None:
        self._reading = reading
        self._threads = threads

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        if device.partition(":")[0] != "cpu":
            return f"it moves bytes in the CPU's memory only, not on {device}"
        if sys.platform != "linux":
            return f"it needs Linux, not {sys.platform}"
        return next((f"{path} can't be read" for path in (_BOOT, _NETWORK) if not path.exists()), None)

    def facts(self, device: str) -> Mapping[str, str]:
        """The running system, its network namespace (which abstract sockets belong to), and the user."""
        del device
        return {"host": _system(_BOOT), "network namespace": str(_NETWORK.stat().st_ino), "user": str(os.geteuid())}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        await anyio.lowlevel.checkpoint()
        offer = _ShmOffer(
            f"netloader-{secrets.token_hex(16)}", secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind("\0" + offer.name)
            listener.listen(8)
        except OSError as error:
            listener.close()
            raise TransportError(f"no socket can be opened for clients of this host: {error}") from error
        key, answer = bound_keys(setup, offer.key, offer.answer)
        data_listener = Listener(listener, key=key, answer=answer, count=2, reject=_reject)
        return _ShmPending(msgspec.msgpack.encode(offer), data_listener, setup, self._meet)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        try:
            wanted = msgspec.msgpack.decode(offer, type=_ShmOffer)
        except msgspec.DecodeError as error:
            raise TransportError(f"the server's offer of a shm channel is invalid: {error}") from error
        sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        try:
            with anyio.fail_after(setup.timeout):
                for sock in sockets:
                    sock.setblocking(False)
                    await _connect(sock, wanted.name)
                await authenticate(sockets, *bound_keys(setup, wanted.key, wanted.answer))
        except BaseException as error:
            for sock in sockets:
                sock.close()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"the server did not answer within {setup.timeout:g} s") from None
            raise
        incoming, outgoing = sockets
        return await self._meet(outgoing, incoming, setup, serving=False)

    async def _meet(self, outgoing: socket.socket, incoming: socket.socket, setup: Setup, *, serving: bool) -> Channel:
        """Run the handshake, and make the channel. Owns the sockets."""
        # A client normally sends nothing, so one pipe is enough.
        pipes = self._threads_here() if serving else 1
        handshake = Handshake(outgoing, incoming, pipes, setup.stall)
        try:
            with anyio.fail_after(setup.timeout):
                await handshake.run(reading=self._reading)
            return _ShmChannel(*handshake.flows(self._threads_here()), setup.stall)
        except BaseException as error:
            handshake.give_up()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"the peer did not finish the handshake within {setup.timeout:g} s") from None
            raise

    def _threads_here(self) -> int:
        if self._threads is not None:
            return self._threads
        return 4 if len(os.sched_getaffinity(0)) >= _MANY_PROCESSORS else 2


async def _connect(sock: socket.socket, name: str) -> None:
    try:
        await connect_socket(sock, "\0" + name)
    except OSError as error:
        # Also where the name belongs to another system, although both sides stated equal facts.
        raise TransportUnavailable(f"the server can't be reached within this host: {error}") from error
    reason = _reject(sock)
    if reason is not None:
        raise TransportUnavailable(f"the process that answers at the server's socket is not trusted: {reason}")


def _reject(connection: socket.socket) -> str | None:
    user = credentials(connection)[1]
    return None if user == os.geteuid() else f"it belongs to user {user}"
