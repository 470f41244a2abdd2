"""Relays: clients that serve what they have while they pull the rest, and whom a server sends on to whom. No sockets.

A chain is the default: one client is served directly, the next ones are sent to it, and from there to the last one.
On links that are the bottleneck a chain costs about one transfer for all, where serving each costs one for each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from netloader.core.addresses import Address, seen_from

__all__ = ["Redirects"]


@dataclass(frozen=True, slots=True)
class _Child:
    """A client that is being served and passes on what it gets."""

    holding: object
    host: str
    port: int


class Redirects:
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
