"""Connects a client to a source, and lists the client's abilities."""

from __future__ import annotations

import os
from collections.abc import Iterable

import anyio

from netloader.codecs.announcements import OTHER_BYTES
from netloader.codecs.frames import SERVER_FRAME_CAP, server_messages
from netloader.core.addresses import Address
from netloader.core.manifest import Manifest
from netloader.core.messages import Ability, ServerMessage
from netloader.errors import PeerLost
from netloader.session.connection import ControlConnection
from netloader.transports.base import Transport

__all__ = ["abilities_of", "connect"]

_NOT_THERE = "is the server running, and is this address the one in its log?"

_TENSOR_BYTES = 2048
"""Bytes that an announcement may take for each tensor of the client: much more than any real one does. The server's
manifest may be another one, and the client should still be able to say in what it differs."""


def abilities_of(transports: Iterable[Transport], device: str) -> tuple[Ability, ...]:
    """The abilities to announce to a server: those of `transports` that can run for tensors on `device`."""
    return tuple(Ability(t.name, dict(t.facts(device))) for t in transports if t.missing(device) is None)


def _frame_cap(manifest: Manifest | None) -> int:
    """Most bytes to accept in one frame: a client that knows its tensors need not hold a much longer announcement."""
    if manifest is None:
        return SERVER_FRAME_CAP
    return min(SERVER_FRAME_CAP, OTHER_BYTES + _TENSOR_BYTES * len(manifest.tensors))


async def connect(
    source: Address, timeout: float, manifest: Manifest | None = None
) -> ControlConnection[ServerMessage]:
    """Open a control connection to `source`.

    Args:
        source: The source.
        timeout: Seconds that connecting may take.
        manifest: The tensors that the client fills; None if it takes what the source holds.

    Raises:
        PeerLost: The source cannot be reached, or did not answer within `timeout` seconds.
    """
    try:
        with anyio.fail_after(timeout):
            stream = await anyio.connect_tcp(source.host, source.port)
    except TimeoutError:
        raise PeerLost(f"{source} did not answer within {timeout:g} s", hint=_NOT_THERE) from None
    except OSError as error:
        raise PeerLost(f"{source} cannot be reached: {_reason(error)}", hint=_NOT_THERE) from error
    try:
        return ControlConnection(stream, server_messages(_frame_cap(manifest)))
    except PeerLost as error:
        await anyio.aclose_forcefully(stream)
        raise PeerLost(f"{source} cannot be reached: {error.message}", hint=_NOT_THERE) from error


def _reason(error: OSError) -> str:
    """Why no address could be connected to, without repeating the address.

    The reason is in the first error of a single address, below the one in which anyio collects those of all addresses.
    """
    cause: BaseException = error if error.__cause__ is None else error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    code = cause.errno if isinstance(cause, OSError) else None
    return os.strerror(code) if code is not None and code > 0 else str(cause)  # name look-ups have codes below 0
