"""The listening sockets of a server: binding them, and closing them so that their port is free."""

from __future__ import annotations

import errno
import logging
import os
import socket
import weakref
from collections.abc import Sequence

from netloader.errors import ConfigError

__all__ = ["Listening"]

_log = logging.getLogger("netloader")

_BACKLOG = 1024


class Listening:
    """The bound sockets of a server.

    A process that is forked from this one has copies of them, which would keep the port open after this server ended:
    clients would connect to a port where nobody accepts. So a forked process closes its copies, and :meth:`close` shuts
    the sockets down for all copies, whoever has them.

    Args:
        host: Address to bind, None for all of IPv6 and IPv4.
        port: Port to bind, 0 for a free one.

    Attributes:
        sockets: The sockets, which do not block: one, which may be a dual-stack socket.

    Raises:
        ConfigError: The address can't be bound.
    """

    def __init__(self, host: str | None, port: int) -> None:
        self.sockets: Sequence[socket.socket] = _bind(host, port)
        own = weakref.ref(self)

        def forked() -> None:
            copy = own()
            if copy is not None:
                for one in copy.sockets:
                    one.close()

        os.register_at_fork(after_in_child=forked)

    def close(self) -> None:
        """Stop listening and close the sockets. Idempotent."""
        for one in self.sockets:
            if one.fileno() >= 0:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError as error:
                    if error.errno != errno.ENOTCONN:  # shut down before
                        raise
                one.close()


def _bind(host: str | None, port: int) -> list[socket.socket]:
    """Bind the listening sockets. For all addresses: one dual-stack socket, or an IPv4 socket on a host without IPv6.

    Raises:
        ConfigError: The address can't be bound.
    """
    try:
        if host is None:
            if socket.has_dualstack_ipv6():
                try:
                    return [_listening(socket.AF_INET6, ("", port), dualstack=True)]
                except OSError as error:
                    _log.debug("no dual-stack socket, using IPv4 only: %s", error)
            return [_listening(socket.AF_INET, ("", port))]
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )[0]
        return [_listening(family, address)]
    except OSError as error:
        port_is_wrong = error.errno in (errno.EADDRINUSE, errno.EACCES) or (host is None and port)
        raise ConfigError(
            field="LISTEN_PORT" if port_is_wrong else "LISTEN_HOST",
            value=f"{host or '*'}:{port}",
            allowed="an address of this machine with a free port",
            reason=str(error),
            hint="choose another port, or omit it for a free one" if port_is_wrong else "omit it for all addresses",
        ) from error


def _listening(family: socket.AddressFamily, address: tuple[object, ...], *, dualstack: bool = False) -> socket.socket:
    made = socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=dualstack)
    made.setblocking(False)
    return made
