"""The probe: asks a source what it holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import anyio

from netloader.client.connect import abilities_of, connect
from netloader.client.foreign import explained
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.core.messages import ServerMessage
from netloader.core.options import PullOptions
from netloader.core.protocol import ClientTerms, Session, Side
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.events import Announcement
from netloader.errors import RootMismatch, TransferTimeout
from netloader.session.driver import SessionDriver
from netloader.transports.base import Transport

__all__ = ["Probe", "probe_source", "relay_at"]


@dataclass(frozen=True, slots=True)
class Probe:
    """The answer of a source to a probe.

    Attributes:
        announcement: The announcement of its holding.
        software: Name and version of its software.
        seconds: Duration of the probe.
        transports: Names of the transports that it can use, preferred first.
        node: Its name among relays; empty when it holds everything itself.
    """

    announcement: Announcement
    software: str
    seconds: float
    transports: tuple[str, ...] = ()
    node: str = ""


class _ProbeSession(SessionDriver[ServerMessage]):
    """A client session that ends after the announcement."""

    node = ""

    def chain(self, node: str, relays: tuple[str, ...]) -> None:  # noqa: ARG002 - part of the contract
        self.node = node

    def perform(self, effect: f.Effect) -> None:
        match effect:
            case f.Pin():
                self.feed(e.Finished("probed"))
            case _:
                super().perform(effect)


async def probe_source(
    source: Address,
    identity: ModelIdentity | None,
    transports: Sequence[Transport],
    options: PullOptions,
    known: Announcement | None = None,
) -> Probe:
    """Ask a source what it holds, without taking a turn.

    Args:
        source: The server.
        identity: Names the role and layout. The server does not refuse a probe whose identity differs; the caller
            compares the answer.
        transports: Announced to the server as abilities.
        options: Deadlines, token, role and layouts.
        known: What it is expected to hold: it need not send the same manifest again.

    Returns:
        The answer of the source.

    Raises:
        NetloaderError: The source cannot be reached, refused, or violated the protocol.
    """
    began = time.monotonic()
    with anyio.move_on_after(options.timeout):
        manifest, digest = (None, "") if known is None else (known.manifest, known.manifest_digest)
        connection = await connect(source, options.connect_timeout, manifest)
        abilities = abilities_of(transports, "cpu")
        terms = ClientTerms(options, identity, manifest, digest, abilities=abilities, probe=True)
        session = Session(Side.CLIENT, client=terms)
        driver = _ProbeSession(session, connection, device="cpu", label=f"source {source}")
        await driver.run()
        if error := await explained(session.error, session, source):
            raise error
        if session.announcement is not None:
            seconds = time.monotonic() - began
            return Probe(session.announcement, session.peer_software, seconds, session.peer_transports, driver.node)
    raise TransferTimeout(f"{source} did not say what it holds within {options.timeout:g} s")


async def relay_at(address: Address, known: Announcement, options: PullOptions) -> str:
    """Ask the relay at `address` for its name.

    Args:
        address: Where it listens.
        known: What it relays.
        options: Deadlines and token.

    Returns:
        The name that its announcement has; empty when it is no relay.

    Raises:
        NetloaderError: It cannot be reached, refused, or relays something else.
    """
    identity = known.identity
    asked = replace(options, role=identity.role, layouts=(identity.layout,))
    probe = await probe_source(address, None, (), asked, known)
    if probe.announcement.root != known.root:
        raise RootMismatch(known.root, probe.announcement.root, "this server")
    return probe.node
