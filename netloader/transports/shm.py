"""Blocks within one host: the receiver reads them straight out of the sender's memory, where the system allows that.

Both ends meet at an abstract Unix socket, which has no file and is gone with its process, prove themselves by a key
that only the control connection carried, and have the kernel's word on who the other is. Then each tries to read a few
bytes of the other's memory. Where that works, the sender of blocks only says where they lie and waits until they were
read. Where it is forbidden, the sender puts its pages into pipes, which it hands over through that socket.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import hmac
import logging
import os
import secrets
import socket
import stat
import struct
import sys
import threading
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

import anyio
import anyio.lowlevel
import msgspec

from netloader.errors import PeerLost, TransferTimeout, TransportError, TransportUnavailable
from netloader.transports._crew import Crew
from netloader.transports._flows import Flow, MemoryReader, MemoryShower, Pipe, PipeReader, PipeWriter, Shared
from netloader.transports._landing import Operation
from netloader.transports._line import LONGEST_MESSAGE, Line
from netloader.transports._pipe import PipeEnd
from netloader.transports._readv import allow_reader, needs_permission, read
from netloader.transports._sockets import KEY_BYTES, Door, dial, knock
from netloader.transports._state import ChannelState
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup

__all__ = ["ShmTransport"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")

_PROBE_BYTES = 32
_MANY_PROCESSORS = 16
_PIPES = b"pipes"
_MOST_PIPES = 16
_PEER = struct.Struct("=iII")

M = TypeVar("M", bound=msgspec.Struct)

_log = logging.getLogger("netloader")

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class _Offer(msgspec.Struct, frozen=True):
    """What the client needs: the socket's name, what to say there, and what it will hear."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
    key: Key
    answer: Key


class _Hello(msgspec.Struct, frozen=True):
    """Each end to the other: where it may try to read, and what it should find there."""

    address: Annotated[int, msgspec.Meta(ge=0)]
    content: Annotated[bytes, msgspec.Meta(min_length=_PROBE_BYTES, max_length=_PROBE_BYTES)]


class _Verdict(msgspec.Struct, frozen=True):
    """Each end to the other: why it can't read; empty if it can."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class _Permission:
    """Where the system wants to be told who may read this process (Yama), it can be told one process at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader = 0
        self._channels = 0

    def give(self, pid: int) -> bool:
        """Let process `pid` read this one, unless another is allowed to."""
        with self._lock:
            if self._channels and self._reader != pid:
                return False
            self._reader = pid
            self._channels += 1
            allow_reader(pid)
            return True

    def take_back(self) -> None:
        """One channel to the reader is closed."""
        with self._lock:
            self._channels -= 1
            if not self._channels:
                allow_reader(0)


class _ShmPending:
    """A server's door, and what was said about it."""

    def __init__(self, door: Door, setup: Setup) -> None:
        self.door = door
        self.setup = setup

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        self.door.close()


class _ShmChannel:
    """Two flows, one for each direction, and the threads that work on them."""

    depth: ClassVar[int] = 2
    """A thread goes on with the next call while others still work on this one."""

    def __init__(self, outgoing: Flow, incoming: Flow, stall: float, permission: _Permission | None) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._stall = stall
        self._permission = permission
        self._state = ChannelState("shm channel", self.depth)
        self._crew = Crew("shm", self._cut)

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
        with anyio.CancelScope(shield=True):
            await self._state.idle()
            await self._crew.aclose()
        self._outgoing.close()
        self._incoming.close()
        permission, self._permission = self._permission, None
        if permission is not None:
            permission.take_back()

    def _cut(self) -> None:
        self._outgoing.cut()
        self._incoming.cut()


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
        self._permission = _Permission()

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

    async def offer(self, setup: Setup) -> tuple[bytes, Pending]:
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
        door = Door(listener, key=offer.key, answer=offer.answer, count=2, stranger=_stranger)
        return msgspec.msgpack.encode(offer), _ShmPending(door, setup)

    async def accept(self, pending: Pending) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        if not isinstance(pending, _ShmPending):
            raise TransportError(f"this is no offer of the shm transport: {type(pending).__name__}")
        outgoing, incoming = await pending.door.wait(pending.setup.timeout)
        return await self._meet(outgoing, incoming, pending.setup, serving=True)

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
        meeting = _Meeting(outgoing, incoming, self._permission if serving else None, pipes, setup.stall)
        try:
            with anyio.fail_after(setup.timeout):
                await meeting.hold(reading=self._reading)
            return meeting.channel(self._threads_here())
        except BaseException as error:
            meeting.give_up()
            if isinstance(error, TimeoutError):
                raise TransferTimeout(f"the peer did not say how to move bytes within {setup.timeout:g} s") from None
            raise

    def _threads_here(self) -> int:
        if self._threads is not None:
            return self._threads
        return 4 if len(os.sched_getaffinity(0)) >= _MANY_PROCESSORS else 2


class _Meeting:
    """Both ends find out which of them may read the other's memory, and make pipes where one may not.

    Args:
        outgoing: Leads to the other end's `incoming`; owned from here on.
        incoming: Leads to the other end's `outgoing`; owned from here on.
        permission: To be read, where that is this end's to give.
        pipes: How many to make where the other end may not read.
        stall: For the channel.
    """

    def __init__(
        self,
        outgoing: socket.socket,
        incoming: socket.socket,
        permission: _Permission | None,
        pipes: int,
        stall: float,
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._permission = permission
        self._pipes = pipes
        self._stall = stall
        self._given = False
        self._pid = 0
        self._process: int | None = None
        self._writers: list[PipeWriter] = []
        self._readers: list[PipeReader] = []

    async def hold(self, *, reading: bool) -> None:
        """Say and hear what there is to be known.

        Raises:
            TransportError: The other end says what makes no sense.
            PeerLost: It went away.
        """
        self._pid = _credentials(self._outgoing)[0]
        self._process = _descriptor(self._pid)
        if self._permission is not None and self._pid and needs_permission():
            self._given = self._permission.give(self._pid)
        content = secrets.token_bytes(_PROBE_BYTES)
        memory = ctypes.create_string_buffer(content, _PROBE_BYTES)
        await _say(self._outgoing, _Hello(ctypes.addressof(memory), content))
        hello = await _hear(self._incoming, _Hello)
        reason = self._try_to_read(hello) if reading else "it is switched off"
        await _say(self._incoming, _Verdict(reason))
        if (await _hear(self._outgoing, _Verdict)).reason:
            self._hand_over_pipes()
        if reason:
            await self._take_pipes()
            _log.info("shm: the peer's memory is not read (%s): bytes come through pipes", reason)
        del memory

    def channel(self, threads: int) -> Channel:
        """The channel; takes over everything."""
        outgoing: Flow
        incoming: Flow
        if self._writers:
            outgoing = Shared(self._writers)
            self._outgoing.close()
        else:
            outgoing = MemoryShower(self._line(self._outgoing))
        if self._readers:
            incoming = Shared(self._readers)
            self._incoming.close()
        else:
            incoming = MemoryReader(self._line(self._incoming), self._pid, threads)
        self._forget_process()
        return _ShmChannel(outgoing, incoming, self._stall, self._permission if self._given else None)

    def give_up(self) -> None:
        """Free everything."""
        self._outgoing.close()
        self._incoming.close()
        self._forget_process()
        pipes: list[Pipe] = [*self._writers, *self._readers]
        for pipe in pipes:
            pipe.close()
        if self._given and self._permission is not None:
            self._permission.take_back()

    def _line(self, sock: socket.socket) -> Line:
        """A line to the peer, which knows its process by a descriptor of its own."""
        return Line(sock, None if self._process is None else os.dup(self._process), self._stall)

    def _forget_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.close(process)

    def _hand_over_pipes(self) -> None:
        """Make pipes, each with a line of its own, and give the other end its ends of them."""
        theirs: list[socket.socket] = []
        try:
            for _ in range(self._pipes):
                reading, writing = PipeEnd.pair()
                try:
                    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                except OSError:
                    reading.close()
                    writing.close()
                    raise
                theirs.append(other)
                self._writers.append(PipeWriter(self._line(ours), writing, reading))
            numbers = [
                fd for writer, sock in zip(self._writers, theirs, strict=True) for fd in (writer.far, sock.fileno())
            ]
            socket.send_fds(self._outgoing, [_PIPES], numbers)
        except OSError as error:
            raise TransportError(f"no pipes can be given to the peer: {error}") from error
        finally:
            for sock in theirs:
                sock.close()

    async def _take_pipes(self) -> None:
        """Take our ends of the pipes that the other end made."""
        numbers = await _hear_descriptors(self._incoming)
        taken = [
            (PipeEnd(pipe), socket.socket(fileno=sock)) for pipe, sock in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        while taken:
            pipe, sock = taken[0]
            try:
                self._readers.append(PipeReader(self._line(sock), pipe))
            except OSError as error:
                for pipe, sock in taken:
                    pipe.close()
                    sock.close()
                raise TransportError(f"the peer's pipes can't be used: {error}") from error
            del taken[0]

    def _try_to_read(self, hello: _Hello) -> str:
        """Why the peer's memory can't be read; empty when it can."""
        if not self._pid:
            return "the peer's process can't be seen from here: it is in another container"
        if self._process is None:
            return "this kernel has no process descriptors"
        found = ctypes.create_string_buffer(_PROBE_BYTES)
        try:
            read(
                self._pid,
                array("Q", (hello.address, _PROBE_BYTES)),
                array("Q", (ctypes.addressof(found), _PROBE_BYTES)),
            )
        except TransportError as error:
            return str(error)
        if not hmac.compare_digest(found.raw, hello.content):
            return "what was read there is not what the peer said"
        return ""


async def _dial(sock: socket.socket, name: str) -> None:
    try:
        await dial(sock, "\0" + name)
    except OSError as error:
        # Refused also where the name is another system's, whatever both sides said about themselves.
        raise TransportUnavailable(f"the server can't be reached within this host: {error}") from error
    reason = _stranger(sock)
    if reason is not None:
        raise TransportUnavailable(f"who answers in the server's place can't be trusted: {reason}")


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, by the kernel's word; the process is 0 where it can't be seen from here."""
    pid, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, user


def _stranger(visitor: socket.socket) -> str | None:
    user = _credentials(visitor)[1]
    return None if user == os.geteuid() else f"it is user {user}"


def _descriptor(pid: int) -> int | None:
    if not pid:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise PeerLost(f"the peer's process {pid} is gone") from error
        return None  # the system doesn't know such descriptors, or forbids them


async def _say(sock: socket.socket, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    while True:
        try:
            sock.send(data)
        except BlockingIOError:
            await anyio.wait_writable(sock)
        except OSError as error:
            raise PeerLost(f"the peer left while a channel was being set up: {error}") from error
        else:
            return


async def _hear(sock: socket.socket, kind: type[M]) -> M:
    while True:
        try:
            data = sock.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        except OSError as error:
            raise PeerLost(f"the peer left while a channel was being set up: {error}") from error
        if not data:
            raise PeerLost("the peer left while a channel was being set up")
        try:
            return msgspec.msgpack.decode(data, type=kind)
        except msgspec.DecodeError as error:
            raise TransportError(f"the peer said what makes no sense: {error}") from error


async def _hear_descriptors(sock: socket.socket) -> list[int]:
    """Pairs of a pipe to read from and a socket."""
    while True:
        try:
            data, numbers, _, _ = socket.recv_fds(sock, 16, 2 * _MOST_PIPES)
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        except OSError as error:
            raise PeerLost(f"the peer left while a channel was being set up: {error}") from error
        kinds = [stat.S_IFMT(os.fstat(number).st_mode) for number in numbers]
        if data == _PIPES and kinds and kinds == [stat.S_IFIFO, stat.S_IFSOCK] * (len(kinds) // 2):
            for number in numbers:
                os.set_inheritable(number, False)
                os.set_blocking(number, False)
            return list(numbers)
        for number in numbers:
            os.close(number)
        if not data:
            raise PeerLost("the peer left while a channel was being set up")
        # Such as another release, of which this one's tcp may know.
        raise TransportUnavailable(
            "the peer passed no pipes where some were to come", hint="run the same netloader release on both sides"
        )
