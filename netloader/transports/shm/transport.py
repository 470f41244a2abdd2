"""Blocks within one host: the receiver reads them straight out of the sender's memory, where the system allows that.

Both ends meet at an abstract Unix socket, which has no file and is gone with its process, prove themselves by a key
that only the control connection carried, and have the kernel's word on who the other is. Then each tries to read a few
bytes of the other's memory. Where that works, the sender of blocks only says where they lie and waits until they were
read. Where it is forbidden, the sender puts its pages into pipes, which it hands over through that socket.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import anyio
import anyio.lowlevel
import msgspec

from netloader.errors import TransferTimeout, TransportError, TransportUnavailable
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup
from netloader.transports.io.channel_state import ChannelState
from netloader.transports.io.listener import KEY_BYTES, Listener, dial, knock
from netloader.transports.io.operation import Operation
from netloader.transports.io.thread_pool import ThreadPool
from netloader.transports.shm.handshake import Handshake, credentials
from netloader.transports.shm.remote_memory import Flow

__all__ = ["ShmTransport"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")

_MANY_PROCESSORS = 16

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class _Offer(msgspec.Struct, frozen=True):
    """What the client needs: the socket's name, what to say there, and what it will hear."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
    key: Key
    answer: Key


class _ShmPending:
    """A server's door, and what is said about it."""

    def __init__(self, offer: bytes, door: Listener, setup: Setup, meet: Callable[..., Awaitable[Channel]]) -> None:
        self.offer = offer
        self._door = door
        self._setup = setup
        self._meet = meet

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        outgoing, incoming = await self._door.wait(self._setup.timeout)
        return await self._meet(outgoing, incoming, self._setup, serving=True)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        self._door.close()


class _ShmChannel:
    """Two flows, one for each direction, and the threads that work on them."""

    depth = 2
    """A thread goes on with the next call while others still work on this one."""
    whole_blocks = False

    def __init__(self, outgoing: Flow, incoming: Flow, stall: float) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._stall = stall
        self._state = ChannelState("shm channel", self.depth)
        self._crew = ThreadPool("shm", self._cut)

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("send", self._cut):
            operation = Operation("the peer takes no bytes", blocks, None, self._stall, self._cut)
            await self._crew.carry_out("send", operation, self._outgoing.begin(blocks, operation))

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        async with self._state.operation("recv", self._cut):
            operation = Operation("the peer sends nothing", blocks, landed, self._stall, self._cut)
            await self._crew.carry_out("recv", operation, self._incoming.begin(blocks, operation))

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        self._state.end("it was closed", closed=True)
        self._cut()
        await self._crew.aclose(self._free)
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
        reading: Whether this side may read the other's memory; False: everything comes through pipes.
        threads: Threads that read, and pipes that a server makes; by default 2, or 4 where there are many processors.
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
        """The running system, its network (where abstract sockets have their names) and the user: all have to agree."""
        del device
        system = hashlib.sha256(b"netloader " + _BOOT.read_bytes().strip()).hexdigest()[:32]
        return {"host": system, "network namespace": str(_NETWORK.stat().st_ino), "user": str(os.geteuid())}

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        await anyio.lowlevel.checkpoint()
        offer = _Offer(
            f"netloader-{secrets.token_hex(16)}", secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind("\0" + offer.name)
            listener.listen(8)
        except OSError as error:
            listener.close()
            raise TransportError(f"no socket can be opened for clients of this host: {error}") from error
        door = Listener(listener, key=offer.key, answer=offer.answer, count=2, stranger=_stranger)
        return _ShmPending(msgspec.msgpack.encode(offer), door, setup, self._meet)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        try:
            wanted = msgspec.msgpack.decode(offer, type=_Offer)
        except msgspec.DecodeError as error:
            raise TransportError(f"the server's offer of a shm channel makes no sense: {error}") from error
        sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        try:
            with anyio.fail_after(setup.timeout):
                for sock in sockets:
                    sock.setblocking(False)
                    await _dial(sock, wanted.name)
                await knock(sockets, wanted.key, wanted.answer)
        except BaseException as error:
            for sock in sockets:
                sock.close()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"the server did not answer within {setup.timeout:g} s") from None
            raise
        incoming, outgoing = sockets
        return await self._meet(outgoing, incoming, setup, serving=False)

    async def _meet(self, outgoing: socket.socket, incoming: socket.socket, setup: Setup, *, serving: bool) -> Channel:
        """Find out how bytes can go each way, and make the channel. Owns the sockets."""
        # A client sends nothing, as a rule: it needs no more than one pipe.
        pipes = self._threads_here() if serving else 1
        meeting = Handshake(outgoing, incoming, pipes, setup.stall)
        try:
            with anyio.fail_after(setup.timeout):
                await meeting.hold(reading=self._reading)
            return _ShmChannel(*meeting.flows(self._threads_here()), setup.stall)
        except BaseException as error:
            meeting.give_up()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"the peer did not say how to move bytes within {setup.timeout:g} s") from None
            raise

    def _threads_here(self) -> int:
        if self._threads is not None:
            return self._threads
        return 4 if len(os.sched_getaffinity(0)) >= _MANY_PROCESSORS else 2


async def _dial(sock: socket.socket, name: str) -> None:
    try:
        await dial(sock, "\0" + name)
    except OSError as error:
        # Refused also where the name is another system's, whatever both sides said about themselves.
        raise TransportUnavailable(f"the server can't be reached within this host: {error}") from error
    reason = _stranger(sock)
    if reason is not None:
        raise TransportUnavailable(f"who answers in the server's place can't be trusted: {reason}")


def _stranger(visitor: socket.socket) -> str | None:
    user = credentials(visitor)[1]
    return None if user == os.geteuid() else f"it is user {user}"
