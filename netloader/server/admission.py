"""Who is served now and who waits: first come, first served."""

from __future__ import annotations

from collections.abc import Hashable

import anyio

__all__ = ["Admission"]


class Admission:
    """A limited number of turns, and a queue of limited length for them.

    Changing the account never waits, so there is no moment at which a cancelled client could lose a turn.

    Args:
        total: Turns that may be taken at once.
        queue: Clients that may wait for one.
    """

    def __init__(self, total: int, queue: int) -> None:
        self.total = total
        self._queue = queue
        self._taken: set[Hashable] = set()
        self._waiting: dict[Hashable, anyio.Event] = {}

    @property
    def taken(self) -> int:
        """Turns that are taken."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Clients that wait."""
        return len(self._waiting)

    def enter(self, client: Hashable) -> bool:
        """Give `client` a turn or a place in the queue; False when there is neither."""
        if not self._waiting and len(self._taken) < self.total:
            self._taken.add(client)
        elif len(self._waiting) < self._queue:
            self._waiting[client] = anyio.Event()
        else:
            return False
        return True

    def has(self, client: Hashable) -> bool:
        """Whether it is the turn of `client`."""
        return client in self._taken

    def before(self, client: Hashable) -> int:
        """Clients in the queue before `client`; 0 when it does not wait."""
        return list(self._waiting).index(client) if client in self._waiting else 0

    async def wait(self, client: Hashable) -> None:
        """Wait for the turn of `client`, which has entered."""
        place = self._waiting.get(client)
        if place is not None:
            await place.wait()

    def leave(self, client: Hashable) -> None:
        """Take `client` out, wherever it is; a turn that it had goes to the next one. Idempotent."""
        self._waiting.pop(client, None)
        self._taken.discard(client)
        while self._waiting and len(self._taken) < self.total:
            first = next(iter(self._waiting))
            self._waiting.pop(first).set()
            self._taken.add(first)
