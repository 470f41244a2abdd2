"""How long a pull may spend on relays while the server that named them could serve it. No I/O; time is an argument."""

from __future__ import annotations

__all__ = ["RedirectBudget"]

_SECONDS = 5.0
"""Seconds that all relays of a pull may take together until the first verified block, and may be slow afterwards."""

_LEAST_RATE = 1 << 20
"""Bytes per second that relays have to deliver on average: each verified byte of theirs buys this much time back."""

_FIRST_SECONDS = 0.75
_FIRST_RATE = 4 << 20
"""Seconds from the first request for blocks to the first verified block of the pull, and the bytes per second below
which large blocks may take longer. A relay that is named has verified blocks, so its first one is only transferred."""

_LEAST_BLOCKS = 1.25
"""Blocks' worth of time, at the least rate, that is allowed where blocks are so large that `_SECONDS` is less."""


class RedirectBudget:
    """The time that relays may take without delivering, for all relays of a pull together.

    Time is spent while :meth:`run` says so, and verified bytes of relays earn it back, up to the initial amount. So a
    relay that only lets this client wait uses it up, as do forty that name each other, or one that sends a byte now and
    then. Once it is used up it stays used up: the client asks the servers themselves.

    Until the first block of the pull is verified, the budget also ends soon after a relay was asked for blocks. What
    comes before that, such as the way down a chain that is just forming, has the whole budget.
    """

    def __init__(self) -> None:
        self._left = _SECONDS
        self._since: float | None = None  # time is being spent since then
        self._used_up = False
        self._first_until: float | None = None

    def run(self, *, running: bool, now: float) -> None:
        """Say whether time is being spent from `now` on."""
        if self._since is not None:
            self._left -= max(0.0, now - self._since)
        self._since = now if running else None

    def asked(self, block_bytes: int, now: float) -> None:
        """A relay was asked for blocks of `block_bytes`, and nothing is verified yet."""
        if self._first_until is None:
            self._first_until = now + max(_FIRST_SECONDS, block_bytes / _FIRST_RATE)

    def begun(self) -> None:
        """The first block of the pull is verified, whoever delivered it."""
        self._first_until = None

    def earn(self, nbytes: int, block_bytes: int) -> None:
        """Relays delivered `nbytes` verified bytes, in blocks of `block_bytes`."""
        most = max(_SECONDS, _LEAST_BLOCKS * block_bytes / _LEAST_RATE)
        self._left = min(most, self._left + nbytes / _LEAST_RATE)

    @property
    def ends_at(self) -> float | None:
        """When the budget will be used up, if nothing is delivered before; None while no time is being spent."""
        if self._since is None or self._used_up:
            return None
        ends_at = self._since + max(0.0, self._left)
        return ends_at if self._first_until is None else min(ends_at, max(self._since, self._first_until))

    def used_up(self, now: float) -> bool:
        """Whether it has just been used up: true once."""
        ends_at = self.ends_at
        self._used_up = self._used_up or (ends_at is not None and now >= ends_at)
        return ends_at is not None and self._used_up
