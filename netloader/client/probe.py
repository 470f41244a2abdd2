"""The probe: asks a source what it holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from netloader.client.connect import abilities_of, connect
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.core.messages import ServerMessage
from netloader.core.options import PullOptions
from netloader.core.protocol import ClientTerms, Session, Side
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.errors import TransferTimeout
from netloader.session.driver import SessionDriver
from netloader.transports.base import Transport

__all__ = ["Probe", "probe_source"]


@dataclass(frozen=True, slots=True)
class Probe:
    """The answer of a source to a probe.

    Attributes:
        announcement: The announcement of its holding.
        software: Name and version of its software.
        seconds: Duration of the probe.
        transports: Names of the transports that it can use, preferred first.
    """

    announcement: e.Announcement
    software: str
    seconds: float
    transports: tuple[str, ...] = ()


class _ProbeSession(SessionDriver[ServerMessage]):
    """A client session that ends after the announcement."""

    def perform(self, effect: f.Effect) -> None:
        match effect:
            case f.Pin():
                self.feed(e.Finished("probed"))
            case _:
                super().perform(effect)


async def probe_source(
    source: Address, identity: ModelIdentity | None, transports: Sequence[Transport], options: PullOptions
) -> Probe:
    """Ask a source what it holds, without taking a turn.

    Args:
        source: The server.
        identity: Names the role and layout. The server does not refuse a probe whose identity differs; the caller
            compares the answer.
        transports: Announced to the server as abilities.
        options: Deadlines, token, role and layouts.

    Returns:
        The answer of the source.

    Raises:
        NetloaderError: The source cannot be reached, refused, or violated the protocol.
    """
    began = time.monotonic()
    with anyio.move_on_after(options.timeout):
        connection = await connect(source, options.connect_timeout)
        terms = ClientTerms(options, identity, abilities=abilities_of(transports, "cpu"), probe=True)
        session = Session(Side.CLIENT, client=terms)
        await _ProbeSession(session, connection, device="cpu", label=f"source {source}").run()
        if session.error is not None:
            raise session.error
        if session.announcement is not None:
            seconds = time.monotonic() - began
            return Probe(session.announcement, session.peer_software, seconds, session.peer_transports)
    raise TransferTimeout(f"{source} did not say what it holds within {options.timeout:g} s")
