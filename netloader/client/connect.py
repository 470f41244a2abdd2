"""Connects a client to a source, and lists the client's abilities."""

from __future__ import annotations

from collections.abc import Iterable

import anyio

from netloader.codecs.frames import server_messages
from netloader.core.addresses import Address
from netloader.core.messages import Ability, ServerMessage
from netloader.errors import PeerLost
from netloader.session.connection import ControlConnection
from netloader.transports.base import Transport

__all__ = ["abilities_of", "connect"]

_NOT_THERE = "is the server running, and is this address the one in its log?"


def abilities_of(transports: Iterable[Transport], device: str) -> tuple[Ability, ...]:
    """The abilities to announce to a server: those of `transports` that can run for tensors on `device`."""
    return tuple(Ability(t.name, dict(t.facts(device))) for t in transports if t.missing(device) is None)


async def connect(source: Address, timeout: float) -> ControlConnection[ServerMessage]:
    """Open a control connection to `source`.

    Raises:
        PeerLost: The source cannot be reached, or did not answer within `timeout` seconds.
    """
    try:
        with anyio.fail_after(timeout):
            stream = await anyio.connect_tcp(source.host, source.port)
    except TimeoutError:
        raise PeerLost(f"{source} did not answer within {timeout:g} s", hint=_NOT_THERE) from None
    except OSError as error:
        raise PeerLost(f"{source} cannot be reached: {_root_cause(error)}", hint=_NOT_THERE) from error
    try:
        return ControlConnection(stream, server_messages())
    except PeerLost as error:
        await anyio.aclose_forcefully(stream)
        raise PeerLost(f"{source} cannot be reached: {error.message}", hint=_NOT_THERE) from error


def _root_cause(error: BaseException) -> BaseException:
    """The first error of a single address, from below the error in which anyio collects those of all addresses."""
    cause = error.__cause__ if error.__cause__ is not None else error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause
