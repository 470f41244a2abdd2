"""The handshake of two processes of one host: each tries to read the other's memory, and gets pipes where it can't."""

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
    MemorySender,
    Pipe,
    PipeReader,
    PipeSet,
    PipeWriter,
)

__all__ = ["Handshake", "credentials"]

_PROBE_BYTES = 32
_PIPES = b"pipes"
_MOST_PIPES = 16
_PEER = struct.Struct("=iII")

M = TypeVar("M", bound=msgspec.Struct)

_log = logging.getLogger("netloader")


class _MemoryProbe(msgspec.Struct, frozen=True):
    """Sent by each end: an address that the other end may try to read, and the bytes that are there."""

    address: Annotated[int, msgspec.Meta(ge=0)]
    content: Annotated[bytes, msgspec.Meta(min_length=_PROBE_BYTES, max_length=_PROBE_BYTES)]


class _ProbeResult(msgspec.Struct, frozen=True):
    """Sent by each end: why it can't read the other's memory; empty if it can."""

    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class Handshake:
    """Finds out which end may read the other's memory, and makes pipes where one may not.

    Neither end changes its own permissions. There is only one such setting in a process (Yama's permitted tracer), it
    can't be queried, and other parts of the process may rely on it.

    Args:
        outgoing: Connected to the other end's `incoming`. This object owns it from now on.
        incoming: Connected to the other end's `outgoing`. This object owns it from now on.
        pipes: Number of pipes to make when the other end may not read.
        stall: Stall time of the channel, in seconds.
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

    async def run(self, *, reading: bool) -> None:
        """Exchange the messages of the handshake.

        Raises:
            TransportError: The other end sent an invalid message.
            PeerLost: The other end disconnected.
        """
        self._pid = credentials(self._outgoing)[0]
        self._process = _descriptor(self._pid)
        content = secrets.token_bytes(_PROBE_BYTES)
        memory = ctypes.create_string_buffer(content, _PROBE_BYTES)
        await _send_message(self._outgoing, _MemoryProbe(ctypes.addressof(memory), content))
        hello = await _receive_message(self._incoming, _MemoryProbe)
        reason = self._try_to_read(hello) if reading else "it is switched off"
        await _send_message(self._incoming, _ProbeResult(reason))
        if (await _receive_message(self._outgoing, _ProbeResult)).reason:
            self._hand_over_pipes()
        if reason:
            await self._take_pipes()
            _log.info("shm: the peer's memory is not read (%s): bytes come through pipes", reason)
        del memory

    def flows(self, threads: int) -> tuple[Flow, Flow]:
        """The flows that send and receive. They own all sockets and pipes from now on.

        Raises:
            TransportError: This process has too many open descriptors.
        """
        outgoing: Flow
        if self._writers:
            outgoing = PipeSet(self._writers)
            self._outgoing.close()
        else:
            outgoing = MemorySender(self._control_socket(self._outgoing))
        try:
            incoming: Flow
            if self._readers:
                incoming = PipeSet(self._readers)
                self._incoming.close()
            else:
                incoming = MemoryReader(self._control_socket(self._incoming), self._pid, threads)
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

    def _control_socket(self, sock: socket.socket) -> ControlSocket:
        """A control socket to the peer, with its own descriptor of the peer's process."""
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
        """Make pipes, each with its own control socket, and send the other end its ends of them."""
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
                    self._writers.append(PipeWriter(self._control_socket(ours), writing, reading))
                    stack.pop_all()
            peer_fd = [writer.peer_fd for writer in self._writers]
            numbers = [fd for pipe, sock in zip(peer_fd, theirs, strict=True) for fd in (pipe, sock.fileno())]
            socket.send_fds(self._outgoing, [_PIPES], numbers)
        except OSError as error:
            raise TransportError(f"no pipes can be sent to the peer: {error}") from error
        finally:
            for sock in theirs:
                sock.close()

    async def _take_pipes(self) -> None:
        """Receive this side's ends of the pipes that the other end made."""
        numbers = await _receive_descriptors(self._incoming)
        taken = [
            (PipeEnd(pipe), socket.socket(fileno=sock)) for pipe, sock in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        with ExitStack() as stack:
            for pipe, sock in taken:
                stack.callback(pipe.close)
                stack.callback(sock.close)
            for pipe, sock in taken:
                self._readers.append(PipeReader(self._control_socket(sock), pipe))
            stack.pop_all()

    def _try_to_read(self, hello: _MemoryProbe) -> str:
        """Why the peer's memory can't be read; empty when it can."""
        if not self._pid:
            return "the peer's process is not visible from here: it is in another container"
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
            return "the bytes read differ from those that the peer stated"
        return ""


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel reports them. The process is 0 where it is not visible here."""
    pid, user, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, user


def _descriptor(pid: int) -> int | None:
    if not pid:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise PeerLost(f"the peer's process {pid} has ended") from error
        return None  # the system does not have such descriptors, or forbids them


async def _send_message(sock: socket.socket, message: msgspec.Struct) -> None:
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


async def _receive_message(sock: socket.socket, kind: type[M]) -> M:
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
            raise TransportError(f"the peer's message can't be read: {error}") from error


async def _receive_descriptors(sock: socket.socket) -> list[int]:
    """Receive pairs of descriptors: the reading end of a pipe, and a socket."""
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
        # The peer may be another release.
        raise TransportUnavailable(
            "the peer did not send the pipes that it announced", hint="run the same netloader release on both sides"
        )
