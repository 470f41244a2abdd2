"""Relays: clients that serve what they have while they pull the rest, and whom a server sends on to whom. No sockets.

A chain is the default: one client is served directly, the next ones are sent to it, and from there to the last one.
On links that are the bottleneck a chain costs about one transfer for all, where serving each costs one for each.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import anyio

from netloader.core.addresses import Address, is_loopback, parse_address
from netloader.core.ledger import BlockState, Ledger
from netloader.errors import ConfigError

__all__ = ["Relays", "Supply", "seen_from"]


def seen_from(source: str, peer_host: str, local_host: str) -> str:
    """An address as a peer can use it: one on this very host goes by the name that the peer has for this host.

    Args:
        source: The address as we use it.
        peer_host: Address of the peer.
        local_host: Our address, as the peer sees it.
    """
    try:
        address = parse_address(source)
    except ConfigError:
        return source
    if is_loopback(address.host) and not is_loopback(peer_host):
        return str(Address(local_host, address.port))
    return source


class Supply:
    """What a relay has so far, and where the rest comes from.

    Args:
        ledger: The account of the pull that feeds it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.node = secrets.token_hex(8)
        self._ledger = ledger
        self._upstream: dict[Hashable, tuple[str, ...]] = {}
        self._changed = anyio.Event()

    def has(self, number: int) -> bool:
        """Whether block `number` is there and verified."""
        return self._ledger.plan is not None and self._ledger.state(number) is BlockState.VERIFIED

    @property
    def complete(self) -> bool:
        """Whether all blocks are there."""
        return self._ledger.complete

    @property
    def live(self) -> bool:
        """Whether everything is there, or somebody is sending the rest."""
        return self.complete or bool(self._upstream)

    @property
    def chain(self) -> tuple[str, ...]:
        """Names of the relays that blocks still pass through on their way here, directly or not; each once."""
        if self.complete:
            return ()
        return tuple(dict.fromkeys(node for chain in self._upstream.values() for node in chain))

    def feeds(self, session: Hashable, chain: tuple[str, ...]) -> None:
        """A session with a server began, or the server gets its blocks from elsewhere now.

        Args:
            session: Whose.
            chain: The server's own name, when it is a relay, and those that it gets blocks from.
        """
        self._upstream[session] = chain
        self.notify()

    def ended(self, session: Hashable) -> None:
        """A session ended. Idempotent."""
        if self._upstream.pop(session, None) is not None:
            self.notify()

    def notify(self) -> None:
        """Blocks were verified, or the upstream changed: wake whoever waits."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()


@dataclass(frozen=True, slots=True)
class _Child:
    """A client that is being served and passes on what it gets."""

    holding: object
    host: str
    port: int


class Relays:
    """Whom a server serves, and which of those pass on what they get.

    Args:
        fan_out: Clients served directly before newcomers are sent on; 0 to send nobody on.
    """

    def __init__(self, fan_out: int) -> None:
        self._fan_out = fan_out
        self._served: dict[Hashable, object] = {}
        self._children: dict[Hashable, _Child] = {}

    def join(self, session: Hashable, holding: object, host: str, port: int) -> None:
        """A client is being served.

        Args:
            session: Its session.
            holding: What it gets.
            host: Its address.
            port: Where it serves in turn; 0 when it does not.
        """
        self._served[session] = holding
        if port:
            self._children[session] = _Child(holding, host, port)

    def leave(self, session: Hashable) -> None:
        """A client is not served any more. Idempotent."""
        self._served.pop(session, None)
        self._children.pop(session, None)

    def instead(self, holding: object, avoid: Sequence[str], peer_host: str, local_host: str) -> tuple[str, ...]:
        """Where to send a newcomer, newest relay first; empty when it is to be served here.

        Args:
            holding: What it wants.
            avoid: Relays that failed it.
            peer_host: Its address.
            local_host: Our address, as it sees it: that of a relay on this very host, too.
        """
        direct = sum(served is holding for served in self._served.values())
        if self._fan_out == 0 or direct < self._fan_out:
            return ()
        found = []
        for child in reversed(self._children.values()):
            if child.holding is not holding:
                continue
            found.append(seen_from(str(Address(child.host, child.port)), peer_host, local_host))
        return tuple(name for name in dict.fromkeys(found) if name not in avoid)
