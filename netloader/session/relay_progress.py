"""How far a relay is with the pull that feeds it."""

from __future__ import annotations

import secrets
from collections.abc import Hashable

import anyio

from netloader.core.ledger import BlockState, Ledger

__all__ = ["Supply"]


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
