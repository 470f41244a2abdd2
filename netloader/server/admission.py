"""Admission control: a limited number of turns, and a queue for them in order of arrival."""

from __future__ import annotations

from collections.abc import Hashable

import anyio

__all__ = ["Admission"]


class Admission:
    """A limited number of turns, and a queue of limited length for them.

    All changes are synchronous, so a cancellation cannot lose a turn.

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
        """Whether `client` has a turn."""
        return client in self._taken

    def before(self, client: Hashable) -> int:
        """Number of clients ahead of `client` in the queue; 0 when it does not wait."""
        return list(self._waiting).index(client) if client in self._waiting else 0

    async def wait(self, client: Hashable) -> None:
        """Wait until `client`, which has entered, has a turn."""
        place = self._waiting.get(client)
        if place is not None:
            await place.wait()

    def leave(self, client: Hashable) -> None:
        """Remove `client` from the turns or the queue. A turn that becomes free goes to the next client. Idempotent."""
        self._waiting.pop(client, None)
        self._taken.discard(client)
        while self._waiting and len(self._taken) < self.total:
            first = next(iter(self._waiting))
            self._waiting.pop(first).set()
            self._taken.add(first)
