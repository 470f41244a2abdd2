"""Addresses that a server announces and a client pulls from: ``host:port``, with IPv6 hosts in brackets."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import Self

from netloader.errors import ConfigError

__all__ = [
    "ALLOWED_ADDRESS",
    "ALLOWED_HOST",
    "Address",
    "is_loopback",
    "is_wildcard",
    "parse_address",
    "parse_host",
    "seen_from",
    "unmapped",
    "valid_addresses",
]

ALLOWED_HOST = "an IPv4 address, an IPv6 address or a host name"
ALLOWED_ADDRESS = "IPv4:port, hostname:port or [IPv6]:port, with a port from 1 to 65535"

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
# The C library reads "1.2.3", "0x7f.1" and "2130706433" as IPv4 addresses. Such forms are refused as likely mistakes.
_NUMERIC_LABEL = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_ZONE = re.compile(r"[A-Za-z0-9_.@~-]{1,32}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_HIGHEST_PORT = 65535
_LONGEST_NAME = 253


class Address(str):
    """Where a server listens: the text ``host:port``, which is also a valid key of ``PullReport.sources``.

    Different spellings of one address are equal: host names are written in lower case, and IPv6 addresses in their
    shortest form, in brackets. :func:`parse_address` reads the text back.

    Args:
        host: IPv4 address, IPv6 address (zone after ``%``) or host name.
        port: 1 to 65535.

    Raises:
        ConfigError: `host` or `port` is not valid.
    """

    __slots__ = ()
    __match_args__ = ("host", "port")

    def __new__(cls, host: str, port: int) -> Self:
        """Make an address of its two parts."""
        plain = parse_host(host)
        if type(port) is not int or not 1 <= port <= _HIGHEST_PORT:  # a bool is an int to isinstance
            raise ConfigError(field="port", value=port, allowed=f"an integer from 1 to {_HIGHEST_PORT}")
        return super().__new__(cls, f"[{plain}]:{port}" if ":" in plain else f"{plain}:{port}")

    @property
    def host(self) -> str:
        """IPv4 address, IPv6 address (no brackets, zone after ``%``) or host name."""
        return self.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        """1 to 65535."""
        return int(self.rpartition(":")[2])

    def __repr__(self) -> str:
        return f"Address(host={self.host!r}, port={self.port})"

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]  # for copies and pickles
        return self.host, self.port


def parse_address(text: object, *, field: str = "address") -> Address:
    """Read ``host:port``.

    Args:
        text: ``10.0.0.7:19374``, ``node-7.example:19374``, ``[fd00::7]:19374`` or ``[fe80::7%eth0]:19374``.
        field: Where the text was found (``SOURCE[1].sources[0]``); errors name it.

    Returns:
        The address, normalised.

    Raises:
        ConfigError: `text` is not an address. The message says which part is wrong.
    """

    def wrong(reason: str, hint: str = "") -> ConfigError:
        return ConfigError(field=field, value=text, allowed=ALLOWED_ADDRESS, reason=reason, hint=hint)

    if not isinstance(text, str):
        raise wrong(f"an address is text, this is of type {type(text).__name__}")
    if "://" in text:
        raise wrong("this is a URL", "leave out everything before the host, and any path after the port")
    host, colon, port = text.rpartition(":")
    if text.startswith("["):
        closing = text.find("]")
        if closing < 0:
            raise wrong("the bracket is not closed")
        if text[closing + 1 : closing + 2] != ":":
            raise wrong("the port is missing", "write [IPv6]:port")
        host, port = text[1:closing], text[closing + 2 :]
        if ":" not in host:
            raise wrong("only IPv6 addresses are written in brackets")
    elif not colon:
        raise wrong("the port is missing", "write host:port; the server's log names both")
    elif ":" in host:
        raise wrong("an IPv6 address needs brackets", "write [IPv6]:port")
    if not _PORT.fullmatch(port) or int(port) > _HIGHEST_PORT:
        raise wrong("the port is not a number from 1 to 65535 in plain digits")
    fault = _fault_of_host(host)
    if fault:
        raise wrong(fault)
    return Address(host, int(port))


def parse_host(text: object, *, field: str = "host") -> str:
    """Read a host without a port; an IPv6 address may stand in brackets.

    Args:
        text: IPv4 address, IPv6 address or host name.
        field: Where the text was found; errors name it.

    Returns:
        The host in the form that :class:`Address` keeps.

    Raises:
        ConfigError: `text` is not a host.
    """
    if not isinstance(text, str):
        wrong_type = f"a host is text, this is of type {type(text).__name__}"
        raise ConfigError(field=field, value=text, allowed=ALLOWED_HOST, reason=wrong_type)
    host = text[1:-1] if text.startswith("[") and text.endswith("]") and ":" in text else text
    reason = _fault_of_host(host)
    if reason:
        raise ConfigError(field=field, value=text, allowed=ALLOWED_HOST, reason=reason)
    return str(ipaddress.IPv6Address(host)) if ":" in host else host.lower()


def unmapped(host: str) -> str:
    """A numeric address without the prefix (``::ffff:``) that a dual-stack socket puts before an IPv4 address."""
    return host.removeprefix("::ffff:") if "." in host else host


def is_wildcard(host: str) -> bool:
    """Whether `host` means every address of this machine (``0.0.0.0``, ``::``), so that no client can connect to it."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address. Names are not resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def seen_from(source: str, peer_host: str, local_host: str) -> str:
    """An address in a form that a peer can use: a loopback address is replaced by the address that the peer uses.

    Args:
        source: The address as this process uses it.
        peer_host: Address of the peer.
        local_host: Address of this host, as the peer sees it.
    """
    try:
        address = parse_address(source)
    except ConfigError:
        return source
    if is_loopback(address.host) and not is_loopback(peer_host):
        return str(Address(local_host, address.port))
    return source


def _fault_of_host(host: str) -> str | None:
    """What is wrong with `host`; None when nothing is."""
    if not host:
        return "the host is missing"
    if ":" in host:
        return _fault_of_ipv6(host)
    if not host.isascii():
        return "a host name with non-ASCII letters must be written in its xn-- form"
    labels = host.removesuffix(".").split(".")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError as error:
            return f"not an IPv4 address ({error})"
        return None
    if len(host) > _LONGEST_NAME:
        return f"a host name has at most {_LONGEST_NAME} characters"
    for label in labels:
        if not _LABEL.fullmatch(label):
            return f"{label[:64]!r} can't be part of a host name"
    return None


def _fault_of_ipv6(host: str) -> str | None:
    address, percent, zone = host.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        return f"{zone[:40]!r} is not an IPv6 zone"
    try:
        ipaddress.IPv6Address(address)
    except ValueError as error:
        return f"not an IPv6 address ({str(error)[:100]})"
    return None


def valid_addresses(texts: Iterable[str]) -> Iterator[Address]:
    """The addresses that a peer named; what makes no sense is left out."""
    for text in texts:
        try:
            yield parse_address(text)
        except ConfigError:
            continue
