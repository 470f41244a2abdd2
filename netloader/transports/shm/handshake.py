"""How two processes of one host find out which may read the other's memory, and make pipes where one may not."""

from __future__ import annotations

import ctypes
import errno
import hmac
import logging
import os
import secrets
import socket
import stat
import struct
from array import array
from contextlib import ExitStack
from typing import Annotated, TypeVar

import anyio
import msgspec

from netloader.errors import PeerLost, TransportError, TransportUnavailable
from netloader.transports.shm.control_socket import LONGEST_MESSAGE, ControlSocket
from netloader.transports.shm.pipe import PipeEnd
from netloader.transports.shm.process_memory import read
from netloader.transports.shm.remote_memory import (
    Flow,
    MemoryReader,
    MemoryShower,
    Pipe,
    PipeReader,
    PipeWriter,
    Shared,
)

__all__ = ["Handshake", "credentials"]

_PROBE_BYTES = 32
_PIPES = b"pipes"
_MOST_PIPES = 16
_PEER = struct.Struct("=iII")

M = TypeVar("M", bound=msgspec.Struct)

_log = logging.getLogger("netloader")


class _Hello(msgspec.Struct, frozen=True):
    """Each end to the other: where it may try to read, and what it should find there."""

    address: Annotated[int, msgspec.Meta(ge=0)]
    content: Annotated[bytes, msgspec.Meta(min_length=_PROBE_BYTES, max_length=_PROBE_BYTES)]


class _Verdict(msgspec.Struct, frozen=True):
    """Each end to the other: why it can't read; empty if it can."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class Handshake:
    """Both ends find out which of them may read the other's memory, and make pipes where one may not.

    Neither changes what it allows: there is one such setting (Yama's permitted tracer) in a whole process, it can't be
    asked for, and other parts of the process may rely on it.

    Args:
        outgoing: Leads to the other end's `incoming`; owned from here on.
        incoming: Leads to the other end's `outgoing`; owned from here on.
        pipes: How many to make where the other end may not read.
        stall: For the channel.
    """

    def __init__(
        self,
        outgoing: socket.socket,
        incoming: socket.socket,
        pipes: int,
        stall: float,
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._pipes = pipes
        self._stall = stall
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
        self._pid = credentials(self._outgoing)[0]
        self._process = _descriptor(self._pid)
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

    def flows(self, threads: int) -> tuple[Flow, Flow]:
        """What sends and what receives; they take over everything.

        Raises:
            TransportError: This process has no descriptors left.
        """
        outgoing: Flow
        if self._writers:
            outgoing = Shared(self._writers)
            self._outgoing.close()
        else:
            outgoing = MemoryShower(self._line(self._outgoing))
        try:
            incoming: Flow
            if self._readers:
                incoming = Shared(self._readers)
                self._incoming.close()
            else:
                incoming = MemoryReader(self._line(self._incoming), self._pid, threads)
        except BaseException:
            outgoing.close()
            raise
        self._forget_process()
        return outgoing, incoming

    def give_up(self) -> None:
        """Free everything."""
        self._outgoing.close()
        self._incoming.close()
        self._forget_process()
        pipes: list[Pipe] = [*self._writers, *self._readers]
        for pipe in pipes:
            pipe.close()

    def _line(self, sock: socket.socket) -> ControlSocket:
        """A line to the peer, which knows its process by a descriptor of its own."""
        try:
            process = None if self._process is None else os.dup(self._process)
        except OSError as error:
            raise TransportError(f"no channel can be opened: {error}", hint="raise the limit of open files") from error
        return ControlSocket(sock, process, self._stall)

    def _forget_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.close(process)

    def _hand_over_pipes(self) -> None:
        """Make pipes, each with a line of its own, and give the other end its ends of them."""
        theirs: list[socket.socket] = []
        try:
            for _ in range(self._pipes):
                with ExitStack() as stack:
                    reading, writing = PipeEnd.pair()
                    stack.callback(reading.close)
                    stack.callback(writing.close)
                    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    theirs.append(other)
                    stack.callback(ours.close)
                    self._writers.append(PipeWriter(self._line(ours), writing, reading))
                    stack.pop_all()
            far = [writer.far for writer in self._writers]
            numbers = [fd for pipe, sock in zip(far, theirs, strict=True) for fd in (pipe, sock.fileno())]
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
        with ExitStack() as stack:
            for pipe, sock in taken:
                stack.callback(pipe.close)
                stack.callback(sock.close)
            for pipe, sock in taken:
                self._readers.append(PipeReader(self._line(sock), pipe))
            stack.pop_all()

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


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, by the kernel's word; the process is 0 where it can't be seen from here."""
    pid, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, user


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
            data, numbers, _, _ = socket.recv_fds(sock, 16, 2 * _MOST_PIPES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            await anyio.wait_readable(sock)
            continue
        except OSError as error:
            raise PeerLost(f"the peer left while a channel was being set up: {error}") from error
        kinds = [stat.S_IFMT(os.fstat(number).st_mode) for number in numbers]
        if data == _PIPES and kinds and kinds == [stat.S_IFIFO, stat.S_IFSOCK] * (len(kinds) // 2):
            for number in numbers:
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
