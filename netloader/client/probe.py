"""Asking a source what it holds."""

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
    """What a source said about itself.

    Attributes:
        announcement: What it holds.
        software: Its name and version.
        seconds: How long asking took.
        transports: Names of what it can send over, preferred first.
    """

    announcement: e.Announcement
    software: str
    seconds: float
    transports: tuple[str, ...] = ()


class _Looker(SessionDriver[ServerMessage]):
    """A client session that only looks."""

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
        identity: Compared by the caller, not here; a probe is told about what differs, not refused.
        transports: Offered to the server, so that both sides' abilities show.
        options: Deadlines, token, role and layouts.

    Returns:
        What it holds.

    Raises:
        NetloaderError: It is not there, it refused, or it broke the rules.
    """
    began = time.monotonic()
    with anyio.move_on_after(options.timeout):
        connection = await connect(source, options.connect_timeout)
        terms = ClientTerms(options, identity, abilities=abilities_of(transports, "cpu"), probe=True)
        session = Session(Side.CLIENT, client=terms)
        await _Looker(session, connection, device="cpu", label=f"source {source}").run()
        if session.error is not None:
            raise session.error
        if session.announcement is not None:
            seconds = time.monotonic() - began
            return Probe(session.announcement, session.peer_software, seconds, session.peer_transports)
    raise TransferTimeout(f"{source} did not say what it holds within {options.timeout:g} s")
