"""Decides which clients a server redirects, and to which of its relays. No sockets.

The default is a chain: one client is served directly; each further one is redirected until it reaches the last relay.
Where the network is the bottleneck, a chain takes about as long as one transfer, however many clients there are.
Serving each client directly takes one transfer per client.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from netloader.core.addresses import Address, seen_from

__all__ = ["Redirects"]


@dataclass(frozen=True, slots=True)
class _Relay:
    """A client that is being served and relays the blocks it has."""

    holding: object
    host: str
    port: int


class Redirects:
    """The clients that a server serves, and which of them are relays.

    Args:
        fan_out: Clients served directly before further ones are redirected; 0 redirects no client.
    """

    def __init__(self, fan_out: int) -> None:
        self._fan_out = fan_out
        self._served: dict[Hashable, object] = {}
        self._relays: dict[Hashable, _Relay] = {}

    def join(self, session: Hashable, holding: object, host: str, port: int) -> None:
        """Add a client that is being served.

        Args:
            session: Its session.
            holding: The holding it pulls.
            host: Its host.
            port: Port on which it relays; 0 when it does not.
        """
        self._served[session] = holding
        if port:
            self._relays[session] = _Relay(holding, host, port)

    def leave(self, session: Hashable) -> None:
        """Remove a client that is not served any more. Idempotent."""
        self._served.pop(session, None)
        self._relays.pop(session, None)

    def relays_for(
        self,
        holding: object,
        avoid: Sequence[str],
        peer_host: str,
        local_host: str,
        moves: Callable[[Hashable], bool] = lambda _: True,
    ) -> tuple[str, ...]:
        """Relays to redirect a new client to, newest first; empty when it is to be served here.

        Args:
            holding: The holding it wants.
            avoid: Relays that failed for this client.
            peer_host: Host of the client.
            local_host: Host of this server, as the client sees it. A relay on this host has the same.
            moves: Whether the client of a session takes its blocks. One that does not is neither named nor counted.
        """
        direct = sum(served is holding and moves(session) for session, served in self._served.items())
        if self._fan_out == 0 or direct < self._fan_out:
            return ()
        found = []
        for session, relay in reversed(self._relays.items()):
            if relay.holding is not holding or not moves(session):
                continue
            found.append(seen_from(str(Address(relay.host, relay.port)), peer_host, local_host))
        return tuple(name for name in dict.fromkeys(found) if name not in avoid)
