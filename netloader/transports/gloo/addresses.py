"""Where the two gloo of a pair listen, as both sides write it over the control connection."""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated

import msgspec

from netloader.errors import TransportError

__all__ = ["Address", "Endpoint", "plain_host", "source_for", "zone_of"]

_Number = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

Endpoint = tuple[str, int]
"""Numeric host and port."""


class Address(msgspec.Struct, frozen=True, tag=True, tag_field="is", omit_defaults=True):
    """The address at which one side's gloo listens.

    Attributes:
        host: Numeric address, without zone.
        port: The port.
        pairs: For each rank, the number that identifies it when it connects.
        dials_from: Numeric address from which this side connects to the peer, if it is not `host`. A host with several
            addresses connects from its primary one, wherever it listens. Peers of release 0.1 neither send nor read it.
    """

    host: str
    port: int
    pairs: tuple[_Number, ...]
    dials_from: str = ""

    @property
    def dialler(self) -> str:
        """The address from which this side connects."""
        return self.dials_from or self.host


def plain_host(host: str) -> str:
    """A numeric address in canonical form, without zone, so that two of them can be compared.

    Raises:
        TransportError: It is not a numeric address.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError as error:
        raise TransportError(f"{host!r} is not a numeric address") from error
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(address if mapped is None else mapped)


def zone_of(host: str) -> int:
    """Number of the interface in a link-local IPv6 address with zone; 0 in any other address.

    Raises:
        TransportError: There is no such interface.
    """
    zone = host.partition("%")[2]
    try:
        return socket.if_nametoindex(zone) if zone else 0
    except OSError as error:
        raise TransportError(f"there is no network interface {zone!r}, which the address {host!r} names") from error


def source_for(peer: str, otherwise: str) -> str:
    """The address from which the system connects to `peer` when nothing else is asked for. Nothing is sent.

    Args:
        peer: Numeric address, with its zone if it has one.
        otherwise: The answer where the system has none.
    """
    plain = plain_host(peer)
    zone = zone_of(peer)
    try:
        with socket.socket(socket.AF_INET6 if ":" in plain else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setblocking(False)  # it would not wait anyway
            probe.connect((plain, 9, 0, zone) if ":" in plain else (plain, 9))
            return plain_host(probe.getsockname()[0])
    except OSError:
        return plain_host(otherwise)  # no route: connecting will say so
