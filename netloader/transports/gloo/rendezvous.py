"""The rendezvous of a gloo group of two, without a store that listens on a port. It runs in the process of the session.

A group asks its store for one value of the peer: the address of its listening socket. This store returns this side's
address, and waits for the peer's. Both are sent over the control connection as plain data. What gloo reads is built
here from checked numbers, so gloo never parses bytes of the peer, and connects only to an allowed address.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from netloader.errors import TransportError
from netloader.transports.gloo.addresses import Address

__all__ = ["LocalStore", "Rendezvous", "from_blob", "to_blob"]

_SIZE = struct.Struct("=Q")
_SOCKADDR = 128  # struct sockaddr_storage
_DEVICE = _SOCKADDR + 8  # and the number of a pair, -1 in the address of a device
_V4 = struct.Struct("=H2s4s")
_V6 = struct.Struct("=H2s4s16sI")


def from_blob(blob: bytes) -> Address:
    """Parse the address that this torch's gloo publishes.

    Raises:
        TransportError: Its format is not the known one: another version of gloo.
    """
    try:
        (hostname,) = _SIZE.unpack_from(blob)
        rest = blob[_SIZE.size + hostname :]
        (length,) = _SIZE.unpack_from(rest)
        sockaddr, numbers = rest[_SIZE.size :][:length], rest[_SIZE.size :][length:]
        pairs = struct.unpack(f"={len(numbers) // 8}q", numbers)
        if len(sockaddr) != _DEVICE or not pairs:
            raise struct.error("wrong lengths")
        (family,) = struct.unpack_from("=H", sockaddr)
        if family == socket.AF_INET:
            _, port, packed = _V4.unpack_from(sockaddr)
        elif family == socket.AF_INET6:
            _, port, _, packed, _ = _V6.unpack_from(sockaddr)
        else:
            raise struct.error(f"address family {family}")
    except struct.error as error:
        raise TransportError(
            f"gloo of torch {torch.__version__} publishes its address in an unknown format: {error}",
            hint="use another transport, or a torch that this version of netloader was tested with",
        ) from error
    return Address(str(ipaddress.ip_address(packed)), int.from_bytes(port, "big"), pairs)


def to_blob(address: Address, zone: int = 0) -> bytes:
    """Write an address in gloo's format.

    Args:
        address: The peer's.
        zone: Number of the interface, for a link-local IPv6 address.
    """
    ip = ipaddress.ip_address(address.host)
    port = address.port.to_bytes(2, "big")
    if isinstance(ip, ipaddress.IPv4Address):
        sockaddr = _V4.pack(socket.AF_INET, port, ip.packed)
    else:
        sockaddr = _V6.pack(socket.AF_INET6, port, bytes(4), ip.packed, zone)
    device = sockaddr.ljust(_SOCKADDR, b"\0") + struct.pack("=q", -1)
    pairs = struct.pack(f"={len(address.pairs)}q", *address.pairs)
    return _SIZE.pack(0) + _SIZE.pack(len(device)) + device + pairs


class LocalStore(Store):
    """A store for a group of one: it holds the values that were set, and never waits."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        """Store a value."""
        self._values[_short(key)] = bytes(value)

    def get(self, key: str) -> bytes:
        """The value of `key`, which has to be set."""
        return self._values[_short(key)]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Does nothing: all keys are set already, or :meth:`get` waits."""

    def has_extended_api(self) -> bool:
        """False: there are only the basic operations."""
        return False


class Rendezvous(LocalStore):
    """The store of one end of a pair.

    Args:
        rank: Rank of this side, 0 or 1.
        published: Called with this side's address, before any other process knows it.
        peer: Waits for the peer's address, which was checked, and the number of its interface. What it raises comes out
            of the constructor of the group.
    """

    def __init__(
        self, rank: int, published: Callable[[Address], None], peer: Callable[[], tuple[Address, int]]
    ) -> None:
        super().__init__()
        self._ours, self._theirs = str(rank), str(1 - rank)
        self._published = published
        self._peer = peer

    def set(self, key: str, value: Any) -> None:
        """Called by gloo with its own address."""
        super().set(key, value)
        if _short(key) == self._ours:
            self._published(from_blob(bytes(value)))

    def get(self, key: str) -> bytes:
        """Called by gloo for an address: this side's or the peer's."""
        if _short(key) == self._theirs and self._theirs not in self._values:
            self._values[self._theirs] = to_blob(*self._peer())
        return super().get(key)


def _short(key: str) -> str:
    """The key without the number of gloo's context, which precedes the rank: there is only one context here."""
    return key.rpartition("/")[2]
