"""What the kernel can keep from gloo: connections that nobody asked for.

Gloo takes whoever connects first and says the expected number for its peer, and one message that it does not expect
ends the process. So its listening socket gets a packet filter as soon as it is known: packets of the peer's host
only, and until both sides have compared their ends of the connection no bytes but that number. Once they have, it
takes no connection at all any more. Filters are classic BPF, which needs no privilege.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["End", "close_listener", "ends", "guard_listener", "lift", "listener", "progress", "visit"]

_ATTACH, _DETACH = 26, 27  # SO_ATTACH_FILTER, SO_DETACH_FILTER
_NET = 0xFFF00000  # SKF_NET_OFF: offsets from the IP header on
_PASS, _DROP = 0x7FFFFFFF, 0
_MOVED = struct.Struct("=QQ")
_MOVED_AT = 120  # tcpi_bytes_acked, tcpi_bytes_received in struct tcp_info (Linux 4.1)

Instruction = tuple[int, int, int, int]
End = tuple[str, int]
"""Numeric host and port."""


def _sockets() -> Iterator[socket.socket]:
    """Copies of all TCP sockets of this process. Gloo does not tell its descriptors; the kernel does."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(descriptor.name)))
        except OSError:
            continue  # closed meanwhile
        if copy.family in {socket.AF_INET, socket.AF_INET6} and copy.type == socket.SOCK_STREAM:
            yield copy
        else:
            copy.close()


def listener(host: str, port: int) -> socket.socket | None:
    """A copy of the socket that listens there."""
    found = None
    for copy in _sockets():
        if found is None and _listens(copy) and _end(copy.getsockname()) == (host, port):
            found = copy
        else:
            copy.close()
    return found


def ends(*, local: End | None = None, remote: End | None = None) -> list[tuple[socket.socket, End, End]]:
    """Copies of all connections with this local end, or this remote end; with both ends of each."""
    found: dict[tuple[End, End], socket.socket] = {}
    for copy in _sockets():
        try:
            here, there = _end(copy.getsockname()), _end(copy.getpeername())
        except OSError:  # not connected
            copy.close()
            continue
        wanted = (local is None or here == local) and (remote is None or there == remote)
        # A connection may have several descriptors: other threads make such copies, too.
        if wanted and (here, there) not in found:
            found[here, there] = copy
        else:
            copy.close()
    return [(copy, here, there) for (here, there), copy in found.items()]


def guard_listener(listening: socket.socket, peer: str, number: int) -> None:
    """Take packets from `peer` only, and no bytes but the 8 of `number`.

    Raises:
        OSError: This kernel has no such filters.
    """
    _attach(listening, [*_from(peer), *_saying(number)])


def close_listener(listening: socket.socket, taken: End | None) -> None:
    """Take no connection any more.

    Args:
        listening: The listener.
        taken: The far end of the connection that it took, if any. When that connection has died here, the kernel hands
            what still comes in on it to the listener, whose answer (a reset) is all that tells the far end.

    Raises:
        OSError: This kernel has no such filters.
    """
    _attach(listening, [(0x06, 0, 0, _DROP)] if taken is None else [*_from(taken[0]), *_under_way(taken[1])])


def visit(listening: socket.socket, number: int) -> None:
    """Connect to a guarded listener of our own, say the number, and hang up. Does not block.

    Raises:
        OSError: It can't be done; then nobody was let in either.
    """
    host, _, *zone = here = listening.getsockname()
    guard_listener(listening, _end(here)[0], number)
    with socket.socket(listening.family) as visitor:
        visitor.setblocking(False)
        visitor.bind((host, 0, *zone))
        visitor.connect_ex(here)
        visitor.send(struct.pack("=q", number))


def lift(connection: socket.socket) -> None:
    """Let everything through; a connection has inherited its listener's filter."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
    except FileNotFoundError:
        return  # there was none


def progress(connection: socket.socket) -> int:
    """Bytes that the peer acknowledged and that it sent, together; 0 where the kernel does not tell."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    return sum(_MOVED.unpack_from(info, _MOVED_AT)) if len(info) >= _MOVED_AT + _MOVED.size else 0


def _listens(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


def _end(name: tuple[str, int]) -> End:
    return name[0].partition("%")[0], name[1]


def _from(peer: str) -> list[Instruction]:
    """Drop what has another source address, or is not plain TCP over IP."""
    ip = ipaddress.ip_address(peer)
    if isinstance(ip, ipaddress.IPv4Address):
        return [(0x20, 0, 0, _NET + 12), (0x15, 1, 0, int(ip)), (0x06, 0, 0, _DROP)]
    program: list[Instruction] = [(0x30, 0, 0, _NET + 6), (0x15, 1, 0, socket.IPPROTO_TCP), (0x06, 0, 0, _DROP)]
    for index, word in enumerate(struct.unpack(">4I", ip.packed)):
        program += [(0x20, 0, 0, _NET + 8 + 4 * index), (0x15, 1, 0, word), (0x06, 0, 0, _DROP)]
    return program


def _under_way(port: int) -> list[Instruction]:
    """Pass packets of a connection from this port, but none that would open one."""
    return [
        (0x28, 0, 0, 0),  # source port
        (0x15, 0, 3, port),
        (0x30, 0, 0, 13),  # flags
        (0x45, 1, 0, 0x02),  # SYN
        (0x06, 0, 0, _PASS),
        (0x06, 0, 0, _DROP),
    ]


def _saying(number: int) -> list[Instruction]:
    """Pass packets without content, and those that hold exactly this number as gloo writes it."""
    first, second = struct.unpack(">2I", struct.pack("=q", number))
    return [
        (0x30, 0, 0, 12),  # length of the TCP header: the upper half of its byte 12, in words
        (0x54, 0, 0, 0xF0),
        (0x74, 0, 0, 2),
        (0x07, 0, 0, 0),  # kept in X
        (0x80, 0, 0, 0),  # length of the segment
        (0x1C, 0, 0, 0),  # less its header
        (0x15, 5, 0, 0),  # nothing in it: pass
        (0x15, 0, 5, 8),
        (0x40, 0, 0, 0),
        (0x15, 0, 3, first),
        (0x40, 0, 0, 4),
        (0x15, 0, 1, second),
        (0x06, 0, 0, _PASS),
        (0x06, 0, 0, _DROP),
    ]


def _attach(sock: socket.socket, program: list[Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _ATTACH, struct.pack("@HP", len(program), ctypes.addressof(buffer)))
