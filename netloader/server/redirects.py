"""Decides which clients a server redirects, and to which of its relays. No sockets.

The default is a chain: one client is served directly; each further one is redirected until it reaches the last relay.
Where the network is the bottleneck, a chain takes about as long as one transfer, however many clients there are.
Serving each client directly takes one transfer per client.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import anyio

from netloader.core.addresses import Address, seen_from

__all__ = ["Redirects"]

_LOOK_AGAIN = 0.1
"""Seconds between two looks at whether the clients that may be relays still use their turns."""


@dataclass(slots=True)
class _Relay:
    """A client that is being served and says that it relays the blocks it has."""

    holding: object
    host: str
    port: int
    checked: bool = False


class Redirects:
    """The clients that a server serves, and which of them are relays.

    A client is named as a relay only after :meth:`confirm`: it has received blocks, and was reached as a relay.

    Args:
        fan_out: Clients served directly before further ones are redirected; 0 redirects no client.
    """

    def __init__(self, fan_out: int) -> None:
        self._fan_out = fan_out
        self._served: dict[Hashable, object] = {}
        self._relays: dict[Hashable, _Relay] = {}
        self._changed = anyio.Event()

    def join(self, session: Hashable, holding: object, host: str, port: int) -> None:
        """Add a client that is being served.

        Args:
            session: Its session.
            holding: The holding it pulls.
            host: Its host.
            port: Port on which it says that it relays; 0 when it does not.
        """
        self._served[session] = holding
        if port:
            self._relays[session] = _Relay(holding, host, port)

    def confirm(self, session: Hashable) -> None:
        """The client relays at its address: name it to new clients. Does nothing if it has left."""
        relay = self._relays.get(session)
        if relay is not None:
            relay.checked = True
            self._notify()

    def deny(self, session: Hashable) -> None:
        """The client does not relay at its address: don't name it. It is served as before. Idempotent."""
        if self._relays.pop(session, None) is not None:
            self._notify()

    def leave(self, session: Hashable) -> None:
        """Remove a client that is not served any more. Idempotent."""
        self._served.pop(session, None)
        self.deny(session)

    def served(self, holding: object) -> int:
        """Clients that are being served with `holding`."""
        return sum(served is holding for served in self._served.values())

    def shares(self, holding: object) -> bool:
        """Whether one of them says that it relays."""
        return any(relay.holding is holding for relay in self._relays.values())

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
        if not self._full(holding, moves):
            return ()
        found = []
        for session, relay in reversed(self._relays.items()):
            if relay.holding is not holding or not relay.checked or not moves(session):
                continue
            found.append(seen_from(str(Address(relay.host, relay.port)), peer_host, local_host))
        return tuple(name for name in dict.fromkeys(found) if name not in avoid)

    def undecided(self, holding: object, moves: Callable[[Hashable], bool] = lambda _: True) -> bool:
        """Whether a new client would be redirected if one of the clients that are being served proved to be a relay.

        Args:
            holding: The holding it wants.
            moves: Whether the client of a session answered, or still may, and takes its blocks. Nobody waits for one
                that does not.
        """
        ours = {session: relay for session, relay in self._relays.items() if relay.holding is holding}
        return (
            self._full(holding, moves) and any(map(moves, ours)) and not any(relay.checked for relay in ours.values())
        )

    async def decided(self, holding: object, moves: Callable[[Hashable], bool], within: float) -> None:
        """Wait while :meth:`undecided`, for `within` seconds at most."""
        with anyio.move_on_after(within):
            while self.undecided(holding, moves):
                changed = self._changed
                with anyio.move_on_after(_LOOK_AGAIN):  # a client that does nothing more sets no event
                    await changed.wait()

    def _full(self, holding: object, moves: Callable[[Hashable], bool] = lambda _: True) -> bool:
        direct = sum(served is holding and moves(session) for session, served in self._served.items())
        return self._fan_out != 0 and direct >= self._fan_out

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
