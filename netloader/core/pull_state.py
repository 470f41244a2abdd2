"""The state that a pull keeps for each session, and its count of failures. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.addresses import Address
from netloader.core.plan import Plan
from netloader.errors import (
    AttemptFailed,
    DiscoveryError,
    NetloaderError,
    RefusedError,
    VerificationError,
    next_step,
    shown,
)

__all__ = ["Failures", "FirstFiles", "SessionState"]

_WINDOW_BYTES = (32 << 20, 2 << 30)
"""Bytes requested ahead, at first and at most: enough to keep a fast link busy while requests travel."""

_WINDOW_SECONDS = 0.5
"""How many seconds' worth of blocks may be requested ahead, at the measured rate.

Other sources may have to wait this long for the blocks of a source that became slow."""

_SHARED_SECONDS = 0.1
"""The same where sources differ in what they have: what was requested early can't be requested of a faster one, and
others wait until this client has it to give."""

_IMPATIENCE = 2.0
"""Least seconds without a block before a session with a source is ended because another source is idle."""

_LATE = 4
"""A block is overdue when it takes this many times as long as the average block so far."""


@dataclass(slots=True, eq=False)
class SessionState:
    """One session with one source, and the rate at which it delivers blocks."""

    number: int
    source: Address
    relay: bool = False  # reached by redirection
    pin: int | None = None  # number of the pin that decides what its source has to hold
    reached: bool = False  # its source was connected to
    queued: bool = False
    open: bool = False
    finished: bool = False
    leaving: bool = False
    abandoned: bool = False  # a relay that was too slow: neither its turn nor its announcement counts any more
    ended: bool = False
    slow: bool = False
    dismissed: bool = False
    parked: bool = False  # nothing to do until blocks become pending again, or its source has one that is
    parked_at: float = 0.0
    starved: bool = False  # it was finished because its source had nothing that was needed
    denied: str = ""
    elsewhere: tuple[str, ...] = ()
    blocks: int = 0
    nbytes: int = 0
    began: float = 0.0
    moved: float = 0.0

    @property
    def seconds_per_byte(self) -> float:
        """Average seconds per byte; 0 before the first block."""
        return max(self.moved - self.began, 1e-3) / self.nbytes if self.nbytes else 0.0

    def window(self, plan: Plan, *, shared: bool = False) -> int:
        """Bytes that may be requested ahead.

        Args:
            plan: The blocks.
            shared: Whether there are several sources, and they differ in what they have.
        """
        if not self.nbytes:
            return plan.block_bytes if shared else _WINDOW_BYTES[0]
        seconds = _SHARED_SECONDS if shared else _WINDOW_SECONDS
        least = 1 if shared else 2
        return int(min(max(seconds / self.seconds_per_byte, least * plan.block_bytes), _WINDOW_BYTES[1]))

    def overdue_at(self, plan: Plan) -> float:
        """The time from which the next block counts as overdue."""
        # A source that has delivered nothing yet gets more time, because its network may be slow.
        usual = plan.block_bytes * self.seconds_per_byte if self.nbytes else _IMPATIENCE
        return self.moved + max(_IMPATIENCE, _LATE * usual)


@dataclass(slots=True)
class Failures:
    """Failed attempts: for each source and kind of failure the last error, and how often it occurred."""

    retries: int = 0
    by_kind: dict[tuple[str, str], AttemptFailed] = field(default_factory=dict)

    def advice(self, wait: float) -> str:
        """What to say of waiting, after a pull with these failures gave up; empty if waiting could not help.

        Args:
            wait: Seconds that the pull was allowed to wait.
        """
        causes = [failed.cause for failed in self.by_kind.values()]
        if not any(isinstance(c, DiscoveryError) or next_step(c, progressed=False) == "later" for c in causes):
            return ""
        return f"WAIT ({wait:g} s) has passed" if wait > 0 else "set WAIT to wait for sources that are not there yet"

    def add(self, source: str, error: NetloaderError, generation: str = "") -> bool:
        """Count a failure. Returns whether it is the first of its kind."""
        self.retries += 1
        key = (source, error.code if isinstance(error, RefusedError) else type(error).__name__)
        known = self.by_kind.get(key)
        self.by_kind[key] = AttemptFailed(source, error, 1 if known is None else known.times + 1, generation)
        return known is None


class FirstFiles:
    """What the weight files of the first source say about themselves: every further source has to hold the same."""

    def __init__(self) -> None:
        self._pinned = False
        self._metadata: Mapping[str, str] | None = None

    def pin(self, metadata: Mapping[str, str] | None) -> None:
        """Take the metadata of the first source; None when it is not stated."""
        self._pinned, self._metadata = True, metadata

    def compare(self, stated: Mapping[str, str] | None) -> tuple[str, ...]:
        """Compare the metadata of a source with that of the first one; pins it if there was none.

        Returns:
            A note when only one of the two states it, so that they can't be compared.

        Raises:
            VerificationError: They differ.
        """
        if not self._pinned:
            self.pin(stated)
        ours = self._metadata
        if ours == stated:
            return ()
        if stated is None:
            return ("it does not state the metadata of its files: that of the first source is kept",)
        if ours is None:
            return ("it states the metadata of its files, and the first source does not: none is kept",)
        key = min(key for key in {**ours, **stated} if ours.get(key) != stated.get(key))
        here, there = (shown(of[key], 60) if key in of else "missing" for of in (ours, stated))
        raise VerificationError(
            f"the metadata of its weight files is another: {shown(key, 60)} is {there}, and {here} at the first source",
            hint="the two hold other files, although the tensors are equal; give sources of one checkpoint only",
        )
