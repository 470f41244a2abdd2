"""The progress of a relay's own pull, as the relay's server needs it."""

from __future__ import annotations

import secrets
from collections.abc import Hashable

import anyio

from netloader.core.ledger import BlockState, Ledger

__all__ = ["Supply"]


class Supply:
    """Which blocks a relay has, and which relays the other blocks come through.

    Args:
        ledger: The ledger of the relay's own pull.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.node = secrets.token_hex(8)
        self._ledger = ledger
        self._upstream: dict[Hashable, tuple[str, ...]] = {}
        self._changed = anyio.Event()

    def has(self, number: int) -> bool:
        """Whether block `number` is verified."""
        return self._ledger.plan is not None and self._ledger.state(number) is BlockState.VERIFIED

    @property
    def blocks(self) -> int:
        """The verified blocks: bit n stands for block n."""
        return self._ledger.verified_mask

    @property
    def complete(self) -> bool:
        """Whether all blocks are verified."""
        return self._ledger.complete

    @property
    def live(self) -> bool:
        """Whether all blocks are verified, or the pull has a session with a source."""
        return self.complete or bool(self._upstream)

    @property
    def chain(self) -> tuple[str, ...]:
        """Names of all relays between this one and the seed, each once; empty when all blocks are verified."""
        if self.complete:
            return ()
        return tuple(dict.fromkeys(node for chain in self._upstream.values() for node in chain))

    def feeds(self, session: Hashable, chain: tuple[str, ...]) -> None:
        """Record the chain of a session with a source. Called again when the chain changes.

        Args:
            session: The session.
            chain: The name of the source, if it is a relay, and the relays that its blocks come through.
        """
        self._upstream[session] = chain
        self.notify()

    def ended(self, session: Hashable) -> None:
        """Remove a session that ended. Idempotent."""
        if self._upstream.pop(session, None) is not None:
            self.notify()

    def notify(self) -> None:
        """Wake all waiting tasks, because blocks were verified or the chain changed."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()
