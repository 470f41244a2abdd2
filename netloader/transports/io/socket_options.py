"""How a TCP connection that carries blocks paces itself."""

from __future__ import annotations

import ipaddress
import socket

from netloader.core.addresses import unmapped

__all__ = ["tune"]

_HOST_SEND_BYTES = 512 << 10
"""Room for bytes on their way within a host. With what the system would give (megabytes) the same bytes cost up to half
as much processor time again: they seem to leave the caches before they are read (docs/decisions/0034-little-room.md).
"""

_NEAR = {4: 24, 6: 64}
"""Bits of two private addresses that are equal on one network, by version of IP."""

_Numeric = ipaddress.IPv4Address | ipaddress.IPv6Address


def tune(sock: socket.socket, local: str, peer: str) -> None:
    """Set up a connection for bulk data: no waiting for more, no pacing where that only costs, little on its way.

    Args:
        sock: Connected.
        local: Our numeric address.
        peer: The peer's.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours, theirs = ipaddress.ip_address(unmapped(local)), ipaddress.ip_address(unmapped(peer))
    one_host = ours == theirs or theirs.is_loopback
    if one_host:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _HOST_SEND_BYTES)
    # Within a host nothing is ever lost.
    if hasattr(socket, "TCP_CONGESTION") and (one_host or _paced_for_nothing(sock, ours, theirs)):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except OSError:
            return  # not allowed here: the system's choice works too, only slower


def _paced_for_nothing(sock: socket.socket, ours: _Numeric, theirs: _Numeric) -> bool:
    """Whether the system's congestion control costs more than it gives between these two hosts.

    On a private network, what keeps its own pace (bbr) is half as fast; what was made for such a network (dctcp) is
    left alone.
    """
    if ours.version != theirs.version or not (ours.is_private and theirs.is_private):
        return False
    bits = ours.max_prefixlen - _NEAR[ours.version]
    current = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return int(ours) >> bits == int(theirs) >> bits and current.startswith(b"bbr")
