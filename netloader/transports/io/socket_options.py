"""Socket options of a TCP connection that carries blocks."""

from __future__ import annotations

import ipaddress
import socket

from netloader.core.addresses import unmapped

__all__ = ["tune"]

_HOST_SEND_BYTES = 512 << 10
"""Size of the send buffer within a host. With the system's default (megabytes) a transfer needs up to 50 % more
processor time, probably because the bytes leave the caches before they are read (docs/decisions/0034-little-room.md).
"""

_NEAR = {4: 24, 6: 64}
"""Prefix length, by IP version, within which two private addresses count as one network."""

_Numeric = ipaddress.IPv4Address | ipaddress.IPv6Address


def tune(sock: socket.socket, local: str, peer: str) -> None:
    """Set options for bulk data: no delay of small writes, no pacing where it only costs, and small buffers in a host.

    Args:
        sock: A connected socket.
        local: Numeric address of this side.
        peer: Numeric address of the peer.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, theirs = ipaddress.ip_address(unmapped(local)), ipaddress.ip_address(unmapped(peer))
    one_host = ours == theirs or theirs.is_loopback
    if one_host:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _HOST_SEND_BYTES)
    # Within a host no packet is ever lost.
    if hasattr(socket, "TCP_CONGESTION") and (one_host or _paced_for_nothing(sock, ours, theirs)):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except OSError:
            return  # not permitted: the system's default works too, but is slower


def _paced_for_nothing(sock: socket.socket, ours: _Numeric, theirs: _Numeric) -> bool:
    """Whether the system's congestion control only slows down a transfer between these two hosts.

    On a private network a pacing algorithm (bbr) is half as fast. An algorithm made for such networks (dctcp) is kept.
    """
    if ours.version != theirs.version or not (ours.is_private and theirs.is_private):
        return False
    bits = ours.max_prefixlen - _NEAR[ours.version]
    current = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return int(ours) >> bits == int(theirs) >> bits and current.startswith(b"bbr")
