"""How a client reaches a source: its options, the terms of a session, the connection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import anyio

from netloader.codecs.frames import server_messages
from netloader.core.addresses import Address
from netloader.core.identity import Layout, Role
from netloader.core.messages import Ability, ServerMessage
from netloader.core.protocol import ClientTerms
from netloader.core.protocol.context import Timings
from netloader.errors import PeerLost
from netloader.session.connection import ControlConnection
from netloader.transports.base import Transport

__all__ = ["ClientOptions", "abilities_of", "client_terms", "connect"]

_NOT_THERE = "is the server running, and is this address the one in its log?"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How a pull behaves.

    Attributes:
        timeout: Seconds that the whole pull may take.
        wait: Seconds to keep trying sources that are not up, or answer "not ready" or "busy", and to wait for more.
        connect_timeout: Seconds that connecting to one source may take, and finding the first ones.
        tries: Tries at one source whose connection broke, before it is given up.
        stripe: Sources to pull from at once.
        follow: Go to a relay when a server sends us there.
        max_hops: Relays that blocks may pass through on their way here.
        role: What to ask about when there is no identity.
        layouts: Layouts that can be taken when there is no identity.
        token: Shared secret, or None.
        expect_root: Root that is required, in hex; empty to take that of the first source.
        unavailable: Why transports that were not handed over can't be used, by name; for the log.
        max_bytes: Largest model that is adopted.
        timings: Deadlines of each session.
        software: Name and version, told to servers.
    """

    timeout: float = 1200.0
    wait: float = 0.0
    connect_timeout: float = 10.0
    tries: int = 2
    stripe: int = 4
    follow: bool = True
    max_hops: int = 32
    role: Role = "target"
    layouts: tuple[Layout, ...] = ("raw", "processed", "checkpoint")
    token: bytes | None = field(default=None, repr=False)
    expect_root: str = ""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = 1 << 44
    timings: Timings = field(default_factory=Timings)
    software: str = ""


def abilities_of(transports: Iterable[Transport], device: str) -> tuple[Ability, ...]:
    """What of `transports` can run for tensors on `device`, as told to a server."""
    return tuple(Ability(t.name, dict(t.facts(device))) for t in transports if t.missing(device) is None)


def client_terms(options: ClientOptions, abilities: tuple[Ability, ...]) -> ClientTerms:
    """The terms of a session that does not know yet what it will find."""
    return ClientTerms(
        role=options.role,
        layouts=options.layouts,
        abilities=abilities,
        unavailable=options.unavailable,
        token=options.token,
        max_bytes=options.max_bytes,
        software=options.software,
        timings=options.timings,
    )


async def connect(source: Address, timeout: float) -> ControlConnection[ServerMessage]:
    """A control connection to `source`.

    Raises:
        PeerLost: It is not there, or did not answer in time.
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
    """The first concrete error below anyio's summary of all addresses that it tried."""
    cause = error.__cause__ if error.__cause__ is not None else error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause
