"""What the process of one session does: it carries out the commands of the process that serves or pulls.

It ends when the other end of its sockets closes. Whatever gloo does on behalf of the peer happens here.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

import torch

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.gloo import messages as m
from netloader.transports.gloo.addresses import Address
from netloader.transports.gloo.group import Group, Work

__all__ = ["run_session"]


def run_session(sending: socket.socket, receiving: socket.socket, memory: int) -> None:
    """Carry out the commands of a session until the sockets close.

    Args:
        sending: Socket for setting up, then for operations that send.
        receiving: Socket for operations that receive.
        memory: Descriptor of the memory that holds blocks. It grows while the session runs.
    """
    group = _set_up(sending)
    if group is None:
        return
    slots = _Slots(memory)
    other = threading.Thread(
        target=_move, args=(receiving, slots, group.recv, group.finish), name="netloader-gloo-recv", daemon=True
    )
    other.start()
    _move(sending, slots, group.send, group.finish)


def _set_up(line: socket.socket) -> Group | None:
    """Make the group. None when the other process gave up, or was told why it failed."""
    command = _next(line)
    if not isinstance(command, m.Open):
        return None
    group = Group(command.rank, command.host, command.peer, command.connecting)
    theirs: list[Address] = []

    def published(address: Address) -> None:
        line.send(m.encode(m.Published(address, group.unfiltered)))

    def meet() -> tuple[Address, int]:
        command = _next(line)
        if not isinstance(command, m.Meet):
            raise PeerLost("setting up was cancelled")
        theirs.append(command.address)
        return command.address, command.zone

    try:
        group.open(published, meet)
        dialled, guests, wire = group.ends(theirs[0])
        descriptors = [] if wire is None else [wire.fileno()]
        socket.send_fds(line, [m.encode(m.Connected(dialled, guests))], descriptors)
        if not isinstance(_next(line), m.Settle):
            return None
        group.settle(wire)
    except TransportError as error:
        line.send(m.encode(_failed(error)))
        return None
    line.send(m.encode(m.Done()))
    if wire is not None:
        wire.close()
    return group


class _Slots:
    """The memory that holds blocks, as far as it is mapped here."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._mapped = torch.empty(0, dtype=torch.uint8)

    def part(self, offset: int, nbytes: int) -> torch.Tensor:
        """A part of it. Operations keep an older mapping alive."""
        with self._lock:
            if offset + nbytes > self._mapped.numel():
                size = os.fstat(self._descriptor).st_size
                self._mapped = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)
            return self._mapped[offset : offset + nbytes]


def _move(
    line: socket.socket, slots: _Slots, start: Callable[[torch.Tensor], Work], finish: Callable[[Work], None]
) -> None:
    """Carry out the operations of one direction, in order."""
    works: deque[Work | TransportError] = deque()
    while command := _next(line):
        if isinstance(command, m.Post):
            try:
                works.append(start(slots.part(command.offset, command.nbytes)))
            except TransportError as error:
                works.append(error)  # reported when it is waited for
        elif isinstance(command, m.Finish):
            line.send(m.encode(_outcome(works.popleft(), finish)))


def _outcome(work: Work | TransportError, finish: Callable[[Work], None]) -> m.Reply:
    if isinstance(work, TransportError):
        return _failed(work)
    try:
        finish(work)
    except TransportError as error:
        return _failed(error)
    return m.Done()


def _next(line: socket.socket) -> m.Command | None:
    """The next command; None when the other end has closed."""
    data = line.recv(m.LONGEST)
    return m.decode_command(data) if data else None


def _failed(error: TransportError) -> m.Failed:
    if isinstance(error, PeerLost):
        return m.Failed("lost", error.message, error.hint)
    return m.Failed("timeout" if isinstance(error, TransferTimeout) else "error", error.message, error.hint)
