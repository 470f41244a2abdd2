"""Which blocks each source has, and in which order a session requests them. No I/O.

A relay that is still pulling tells its clients which blocks it has, and is asked for nothing else. So nobody waits for
a block at a source that waits for others, whoever pulls from whom, and two relays may pull from each other.

As soon as sources differ in what they have, the rarest block is requested first, and ties are broken at random.
Clients that ask for the same blocks at the same time would have nothing to give to each other. A server that holds
everything tells its clients which blocks it has sent already; the others come first, so that each block leaves the
server once before any leaves it twice. While all sources hold everything, the lowest block is requested first.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from netloader.core.plan import Ranges, mask_of

__all__ = ["BlockOrder"]


class BlockOrder:
    """What is known of the sources of one pull, by session.

    Args:
        rng: Breaks ties between blocks that are equally rare.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._parts: dict[int, int] = {}  # what each source has, of those that tell it
        self._sent: dict[int, int] = {}  # what each source has sent to others
        self._at_least: list[int] = []  # at n: the blocks that more than n of the sources in `_parts` have

    @property
    def differs(self) -> bool:
        """Whether the sources differ in what they have, or have sent."""
        return bool(self._parts or self._sent)

    def begin(self, session: int, *, partial: bool, shared: bool) -> None:
        """A source announced what it holds.

        Args:
            session: Its session.
            partial: Whether it tells which blocks it has. It has none until :meth:`has`.
            shared: Whether it serves others that pass on what they have.
        """
        if partial:
            self._parts.setdefault(session, 0)
        elif shared:
            self._sent.setdefault(session, 0)

    def partial(self, session: int) -> bool:
        """Whether the source tells which blocks it has. Any other source is asked for every block."""
        return session in self._parts

    def can_give(self, session: int, blocks: int) -> bool:
        """Whether the source has any of `blocks`, a mask."""
        return bool(self._parts.get(session, blocks) & blocks)

    def has(self, session: int, ranges: Ranges) -> None:
        """The source has these blocks, too. Ignored for a source that holds everything."""
        if session not in self._parts:
            return
        more = mask_of(ranges) & ~self._parts[session]
        self._parts[session] |= more
        for count, known in enumerate(self._at_least):
            self._at_least[count], more = known | more, known & more
        if more:
            self._at_least.append(more)

    def sent(self, session: int, ranges: Ranges) -> None:
        """The source has sent these blocks to other clients."""
        self._sent[session] = self._sent.get(session, 0) | mask_of(ranges)

    def end(self, session: int) -> None:
        """The session ended. Idempotent."""
        self._sent.pop(session, None)
        less = self._parts.pop(session, 0)
        for count in reversed(range(len(self._at_least))):
            known = self._at_least[count]
            self._at_least[count], less = known & ~less, less & ~known
        while self._at_least and not self._at_least[-1]:
            self._at_least.pop()

    def order(self, session: int, pending: int) -> Iterable[int] | None:
        """The blocks of `pending` that the source can give, in the order in which to request them.

        Returns:
            The blocks; None for all of them, the lowest first: the sources do not differ.
        """
        if not self.differs:
            return None
        return self._rarest_first(self._parts.get(session, pending) & pending, self._sent.get(session, 0))

    def _rarest_first(self, blocks: int, sent: int) -> Iterator[int]:
        for group in (blocks & ~sent, blocks & sent):
            left = group
            for common in (*self._at_least, 0):  # what fewer sources have comes first
                rare = left & ~common
                left &= common
                yield from self._at_random(rare)

    def _at_random(self, blocks: int) -> Iterator[int]:
        while blocks:
            start = self._rng.randrange(blocks.bit_length())
            above = blocks >> start
            lowest = above & -above
            yield start + lowest.bit_length() - 1
            blocks ^= lowest << start
