"""An address at which other hosts may reach a server of this host."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import socket
import struct
from pathlib import Path

from netloader.core.addresses import is_loopback, is_wildcard, parse_host

__all__ = ["own_host"]

_log = logging.getLogger("netloader")

_FAR = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses that are never assigned (RFC 5737, RFC 3849)."""

_GET_FLAGS, _GET_ADDRESS = 0x8913, 0x8915  # SIOCGIFFLAGS, SIOCGIFADDR
_UP = 1  # IFF_UP
_REQUEST = struct.Struct("16s24s")  # struct ifreq: name, and a union
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
_GLOBAL = "00"  # scope in that file; unique local addresses (fd00::/8) have it too


def own_host(bound: str, asked: str | None = None) -> str:
    """A host address at which other hosts may reach a server.

    For a server bound to all addresses, it is the one from which the kernel would send to other networks. No packet is
    sent to find it. On a host without a route to other networks, it is that of an interface that is up. If there is
    none, it is the loopback address, and the log has a warning.

    Args:
        bound: Address to which the server is bound.
        asked: What it was asked to bind to; None for all addresses.
    """
    if not is_wildcard(bound):
        return parse_host(asked) if asked and "%" in asked else bound  # the kernel's text lacks the zone
    families = [socket.AF_INET, socket.AF_INET6]
    if asked is not None:  # a wildcard of one family only
        families = [socket.AF_INET6 if ":" in bound else socket.AF_INET]
    for find in (_routed, _of_an_interface):
        for family in families:
            host = find(family)
            if host and not is_loopback(host) and not is_wildcard(host):
                return host
    loopback = "::1" if families == [socket.AF_INET6] else "127.0.0.1"
    _log.warning(
        "netloader: the server listens on all addresses, but none was found that other hosts could reach: it is "
        "announced as %s, for this host only; to announce another address, bind to it",
        loopback,
    )
    return loopback


def _routed(family: socket.AddressFamily) -> str:
    """The address from which the kernel would send to other networks; empty when there is no route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.setblocking(False)
            probe.connect((_FAR[family], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _of_an_interface(family: socket.AddressFamily) -> str:
    """An address of an interface that is up; empty when there is none. Link-local IPv6 addresses don't count."""
    if family == socket.AF_INET6:
        return _ipv6_of_an_interface()
    try:
        interfaces = socket.if_nameindex()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in interfaces:
                host = _ipv4_of(asking, name)
                if host and not is_loopback(host):
                    return host
    except OSError:
        return ""
    return ""


def _ipv4_of(asking: socket.socket, interface: str) -> str:
    request = _REQUEST.pack(interface.encode(), b"")
    try:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(asking, _GET_FLAGS, request), 16)
        if not flags & _UP:
            return ""
        return socket.inet_ntoa(fcntl.ioctl(asking, _GET_ADDRESS, request)[20:24])
    except OSError:  # it has no IPv4 address, or has just vanished
        return ""


def _ipv6_of_an_interface() -> str:
    try:
        lines = _IPV6_ADDRESSES.read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    fields = [line.split() for line in lines]
    found = [ipaddress.IPv6Address(bytes.fromhex(one[0])) for one in fields if len(one) > 3 and one[3] == _GLOBAL]  # noqa: PLR2004 - address, index, prefix, scope
    return str(found[0]) if found else ""
