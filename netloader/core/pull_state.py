"""What a pull knows of one session, and of what failed. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from netloader.core.addresses import Address
from netloader.core.plan import Plan
from netloader.errors import AttemptFailed, NetloaderError, RefusedError

__all__ = ["Failures", "SessionState"]

_WINDOW_BYTES = (32 << 20, 2 << 30)
"""Bytes asked for ahead, at first and at most: enough to keep a fast link busy while requests travel."""

_WINDOW_SECONDS = 0.5
"""What may be asked for ahead, in seconds at the rate seen: what others may have to wait for when a source is slow."""

_IMPATIENCE = 2.0
"""Seconds without a block after which a source may be left when another one could take over its blocks."""

_LATE = 4
"""A block that takes this many times as long as blocks took until now is overdue."""


@dataclass(slots=True, eq=False)
class SessionState:
    """One conversation with one source, and how fast it brings blocks."""

    number: int
    source: Address
    queued: bool = False
    open: bool = False
    finished: bool = False
    leaving: bool = False
    slow: bool = False
    dismissed: bool = False
    parked: bool = False  # nothing to do until blocks of other sessions become pending again
    denied: str = ""
    elsewhere: tuple[str, ...] = ()
    blocks: int = 0
    nbytes: int = 0
    began: float = 0.0
    moved: float = 0.0

    @property
    def seconds_per_byte(self) -> float:
        """How long a byte took on average; 0 before one came."""
        return max(self.moved - self.began, 1e-3) / self.nbytes if self.nbytes else 0.0

    def window(self, plan: Plan) -> int:
        """Bytes that may be asked for ahead."""
        if not self.nbytes:
            return _WINDOW_BYTES[0]
        return int(min(max(_WINDOW_SECONDS / self.seconds_per_byte, 2 * plan.block_bytes), _WINDOW_BYTES[1]))

    def overdue_at(self, plan: Plan) -> float:
        """When the next block has taken much longer than one takes at the rate seen."""
        # A source that brought nothing yet is given more time: it may be at the far end of a slow line.
        usual = plan.block_bytes * self.seconds_per_byte if self.nbytes else _IMPATIENCE
        return self.moved + max(_IMPATIENCE, _LATE * usual)


@dataclass(slots=True)
class Failures:
    """Tries that failed: for each source and kind of failure the last one, and how many there were."""

    retries: int = 0
    by_kind: dict[tuple[str, str], AttemptFailed] = field(default_factory=dict)

    def add(self, source: str, error: NetloaderError) -> bool:
        """Account for one; whether it is the first of its kind."""
        self.retries += 1
        key = (source, error.code if isinstance(error, RefusedError) else type(error).__name__)
        known = self.by_kind.get(key)
        self.by_kind[key] = AttemptFailed(source, error, times=1 if known is None else known.times + 1)
        return known is None
