"""Packet filters that protect gloo's sockets from unauthenticated connections.

Gloo accepts the first connection that sends the expected number as its peer. An unexpected message ends its process,
and so the session. Therefore its listening socket gets a packet filter as soon as it is known. The filter passes only
packets of the peer's host, and no data except that number until both sides have compared the addresses of their
connection. After that it accepts no further connection. Filters are classic BPF, which needs no privilege.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterator

from netloader.transports.gloo.addresses import Endpoint

__all__ = [
    "close_listener",
    "connections",
    "find_listener",
    "guard_listener",
    "progress",
    "remove_filter",
]

_ATTACH, _DETACH = 26, 27  # SO_ATTACH_FILTER, SO_DETACH_FILTER
_NET = 0xFFF00000  # SKF_NET_OFF: offsets from the IP header on
_PASS, _DROP = 0x7FFFFFFF, 0
_MOVED = struct.Struct("=QQ")
_MOVED_AT = 120  # tcpi_bytes_acked, tcpi_bytes_received in struct tcp_info (Linux 4.1)

_DESCRIPTORS = 1024
"""Descriptors that are looked at. The process of a session opens some twenty, and the system gives the lowest ones."""

Instruction = tuple[int, int, int, int]


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of all TCP sockets of this process. Gloo does not expose its descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(min(limit, _DESCRIPTORS) if limit >= 0 else _DESCRIPTORS):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(number))
        except OSError:
            continue  # not open
        if copy.family in {socket.AF_INET, socket.AF_INET6} and copy.type == socket.SOCK_STREAM:
            yield copy
        else:
            copy.close()


def find_listener(host: str, port: int) -> socket.socket | None:
    """A duplicate of the socket that listens at this address; None when there is none."""
    found = None
    for copy in _sockets():
        if found is None and _listens(copy) and _end(copy.getsockname()) == (host, port):
            found = copy
        else:
            copy.close()
    return found


def connections(
    *, local: Endpoint | None = None, remote: Endpoint | None = None
) -> list[tuple[socket.socket, Endpoint, Endpoint]]:
    """Duplicates of all connections with this local or remote endpoint, each with both endpoints."""
    found: dict[tuple[Endpoint, Endpoint], socket.socket] = {}
    for copy in _sockets():
        try:
            here, there = _end(copy.getsockname()), _end(copy.getpeername())
        except OSError:  # not connected
            copy.close()
            continue
        wanted = (local is None or here == local) and (remote is None or there == remote)
        # A connection may have several descriptors, because there are duplicates.
        if wanted and (here, there) not in found:
            found[here, there] = copy
        else:
            copy.close()
    return [(copy, here, there) for (here, there), copy in found.items()]


def guard_listener(listening: socket.socket, peer: str, number: int) -> None:
    """Accept packets from `peer` only, and no data except the 8 bytes of `number`.

    Raises:
        OSError: This kernel has no such filters.
    """
    _attach(listening, [*_from(peer), *_only_number(number)])


def close_listener(listening: socket.socket) -> None:
    """Accept no more connections.

    Raises:
        OSError: This kernel has no such filters.
    """
    _attach(listening, [(0x06, 0, 0, _DROP)])


def remove_filter(connection: socket.socket) -> None:
    """Remove the filter that a connection inherited from its listener."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
    except FileNotFoundError:
        return  # there was none


def progress(connection: socket.socket) -> int:
    """Bytes that the peer acknowledged plus bytes that it sent; 0 where the kernel does not report them."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    return sum(_MOVED.unpack_from(info, _MOVED_AT)) if len(info) >= _MOVED_AT + _MOVED.size else 0


def _listens(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


def _end(name: tuple[str, int]) -> Endpoint:
    return name[0].partition("%")[0], name[1]


def _from(peer: str) -> list[Instruction]:
    """Drop packets with another source address, and packets that are not plain TCP over IP."""
    ip = ipaddress.ip_address(peer)
    if isinstance(ip, ipaddress.IPv4Address):
        return [(0x20, 0, 0, _NET + 12), (0x15, 1, 0, int(ip)), (0x06, 0, 0, _DROP)]
    program: list[Instruction] = [(0x30, 0, 0, _NET + 6), (0x15, 1, 0, socket.IPPROTO_TCP), (0x06, 0, 0, _DROP)]
    for index, word in enumerate(struct.unpack(">4I", ip.packed)):
        program += [(0x20, 0, 0, _NET + 8 + 4 * index), (0x15, 1, 0, word), (0x06, 0, 0, _DROP)]
    return program


def _only_number(number: int) -> list[Instruction]:
    """Pass packets without data, and those that hold exactly this number, as gloo writes it."""
    first, second = struct.unpack(">2I", struct.pack("=q", number))
    return [
        (0x30, 0, 0, 12),  # length of the TCP header in words: the upper half of its byte 12
        (0x54, 0, 0, 0xF0),
        (0x74, 0, 0, 2),
        (0x07, 0, 0, 0),  # kept in X
        (0x80, 0, 0, 0),  # length of the segment
        (0x1C, 0, 0, 0),  # minus its header
        (0x15, 5, 0, 0),  # no data: pass
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
