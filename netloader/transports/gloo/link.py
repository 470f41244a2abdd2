"""One end of a pair whose gloo runs in a process of its own.

Blocks are copied between the caller's memory and memory that both processes map. The process never sees the memory of
the caller, so killing it is always possible, and ends everything that gloo does.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.gloo import messages as m
from netloader.transports.gloo import packet_filter
from netloader.transports.gloo.addresses import Address
from netloader.transports.gloo.processes import SessionProcess, Spawner
from netloader.transports.process_group import Link

__all__ = ["GlooLink"]

_SLOT = 1 << 20
"""Least size of staging memory: blocks of most models fit, so that staging memory is reused."""

_GONE = 5.0
"""Seconds that a killed process may take to end. It takes milliseconds."""

_log = logging.getLogger(__name__)

R = TypeVar("R", bound=m.Reply)


@dataclass(slots=True)
class _Posted:
    """An operation that was given to the process.

    Attributes:
        sends: Its direction.
        over: Whether it was waited for.
    """

    sends: bool
    over: bool = False


class GlooLink(Link):
    """See :class:`~netloader.transports.process_group.Link`.

    Args:
        spawner: Starts the process.
    """

    device = "cpu"
    lands_in_place = False

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._process: SessionProcess | None = None
        self._wire: socket.socket | None = None
        self._aborted = False
        self._lock = threading.Lock()  # abort() may come from any thread
        self._offsets: dict[int, int] = {}  # address of staging memory -> where it is in the shared memory
        self._size = 0

    # --- setting up ---------------------------------------------------------------------------------------------------

    def open(self, command: m.Open) -> Address:
        """Start the process; returns where its gloo listens.

        Raises:
            TransportError: Gloo can't listen, or the process can't be started.
        """
        process = self._spawner.start()
        with self._lock:
            self._process = process
            if self._aborted:
                process.kill()
        published = self._ask(process.sending, command, m.Published)
        if published.unfiltered:
            _log.warning(
                "the kernel can't filter connections to gloo's port %d: %s",
                published.address.port,
                published.unfiltered,
            )
        return published.address

    def meet(self, command: m.Meet) -> m.Connected:
        """Have gloo connect to the peer.

        Raises:
            PeerLost, TransferTimeout: Connecting failed.
        """
        return self._ask(self._running().sending, command, m.Connected)

    def settle(self) -> None:
        """Both sides confirmed their connection: accept no other connection, and let data through."""
        self._ask(self._running().sending, m.Settle(), m.Done)

    # --- moving -------------------------------------------------------------------------------------------------------

    def reaches(self, block: object) -> bool:
        """False: gloo's process does not see the caller's memory."""
        del block
        return False

    def stage(self, nbytes: int) -> torch.Tensor:
        """Staging memory that gloo's process maps too; see :class:`~netloader.transports.process_group.Link`."""
        size = max(_SLOT, 1 << (nbytes - 1).bit_length())
        with self._lock:
            process, offset = self._running(), self._size
            try:
                os.ftruncate(process.memory, offset + size)
                mapped = torch.frombuffer(mmap.mmap(process.memory, size, offset=offset), dtype=torch.uint8)
            except (OSError, ValueError) as error:
                raise TransportError(f"no memory for a block of {nbytes} bytes: {error}") from error
            self._size += size
            self._offsets[mapped.data_ptr()] = offset
        return mapped

    def send(self, tensor: torch.Tensor) -> _Posted:
        """Start sending; see :class:`~netloader.transports.process_group.Link`."""
        return self._post(tensor, sends=True)

    def recv(self, tensor: torch.Tensor) -> _Posted:
        """Start receiving; see :class:`~netloader.transports.process_group.Link`."""
        return self._post(tensor, sends=False)

    def finish(self, work: _Posted) -> None:
        """Wait for an operation; see :class:`~netloader.transports.process_group.Link`."""
        if work.over:
            return
        work.over = True
        self._ask(self._line(sends=work.sends), m.Finish(), m.Done)

    def progress(self) -> int:
        """Bytes that moved; see :class:`~netloader.transports.process_group.Link`."""
        with self._lock:
            return 0 if self._wire is None else packet_filter.progress(self._wire)

    def abort(self) -> None:
        """Disconnect from the peer, and kill the process."""
        with self._lock:
            self._aborted = True
            if self._wire is not None:
                with suppress(OSError):  # it has ended
                    self._wire.shutdown(socket.SHUT_RDWR)
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Free everything; see :class:`~netloader.transports.process_group.Link`."""
        self.abort()
        with self._lock:
            process, self._process = self._process, None
            if self._wire is not None:
                self._wire.close()
                self._wire = None
        if process is not None:
            if not process.gone(_GONE):
                _log.error("gloo's process still runs %g s after it was killed", _GONE)
            process.close()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _running(self) -> SessionProcess:
        if self._process is None:
            raise PeerLost("the group is closed")
        return self._process

    def _line(self, *, sends: bool) -> socket.socket:
        process = self._running()
        return process.sending if sends else process.receiving

    def _post(self, tensor: torch.Tensor, *, sends: bool) -> _Posted:
        self._tell(self._line(sends=sends), m.Post(self._offsets[tensor.data_ptr()], tensor.numel()))
        return _Posted(sends)

    def _ask(self, line: socket.socket, command: m.Command, kind: type[R]) -> R:
        """Give a command, and wait for the answer. It ends when the process ends, at the latest."""
        self._tell(line, command)
        try:
            data, descriptors, _, _ = socket.recv_fds(line, m.LONGEST, 1)
        except OSError as error:
            raise self._ended() from error
        for descriptor in descriptors:
            self._keep(socket.socket(fileno=descriptor))
        if not data:
            raise self._ended()
        try:
            reply = m.decode_reply(data)
        except msgspec.DecodeError as error:
            raise TransportError(f"gloo's process gave an answer that can't be read: {error}") from error
        if isinstance(reply, m.Failed):
            raise _ERRORS[reply.kind](reply.text, hint=reply.hint)
        if not isinstance(reply, kind):
            raise TransportError(f"gloo's process answered {type(reply).__name__}, not {kind.__name__}")
        return reply

    def _tell(self, line: socket.socket, command: m.Command) -> None:
        try:
            line.send(m.encode(command))
        except OSError as error:
            raise self._ended() from error

    def _keep(self, wire: socket.socket) -> None:
        with self._lock:
            self._wire = wire
            if self._aborted:
                with suppress(OSError):  # it has ended
                    wire.shutdown(socket.SHUT_RDWR)

    def _ended(self) -> TransportError:
        """Why the process does not answer."""
        with self._lock:
            process = self._process
            if self._aborted or process is None:
                return PeerLost("the link was closed")
        return TransportError(
            f"the process in which gloo ran for this session {process.obituary(_GONE)}",
            hint="a peer can cause this by violating gloo's protocol; other sessions are not affected",
        )


_ERRORS = {"lost": PeerLost, "timeout": TransferTimeout, "error": TransportError}
