"""What a pull knows of one source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.addresses import Address
from netloader.errors import ConfigError

__all__ = ["Candidate", "Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights may be pulled from, as whoever found it knows it.

    Attributes:
        address: Where its server listens.
        labels: What else is known, for people and for observers. Only of a source that is one of many, the labels
            decide how near it is (:mod:`netloader.core.choice`).
        load: How busy it is; 0 for idle or unknown. Of sources that are equal otherwise, the one with the least load is
            tried first, so all providers of one pull should use one scale (clients that it serves, say).
        generation: Names one run of the server, where that is known. Another generation at the same address is another
            server. If a generation cannot be reached, or is of no use, one pull does not try it again at its address.
        one_of_many: Whether it was found in a registry, in no order that means anything. Such sources are tried after
            the others, and each client has its own order of them.

    Raises:
        ConfigError: `load` is negative or no number.
    """

    address: Address
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    load: float = 0.0
    generation: str = ""
    one_of_many: bool = False

    def __post_init__(self) -> None:
        if not (self.load >= 0 and math.isfinite(self.load)):
            raise ConfigError(field="load", value=self.load, allowed="a number from 0 on")


@dataclass(slots=True)
class Candidate:
    """A source that may still be of use."""

    tries: int
    until: float
    pause: float
    order: int
    via: Address | None = None
    source: Source | None = None  # None: named by a server, and not found
    preferred: tuple[float, ...] = ()  # sort key among the sources that were found
    follower: Source | None = None  # another server at this address, which began while a session ran with this one
    late: int = 0  # it gave us up as too slow, or is one of many and was not ready: tried after others, in this order
    due: float = 0.0
    running: bool = False
    lost: bool = False  # no longer offered: dropped when its session ends
    resting: bool = False  # its session ran out of blocks; tried again when blocks become pending again
    last_resort: bool = False  # slower than others; tried again when none of those is left
    hops: int = 0  # how many redirections led to it
    held: bool = False  # it holds other weights than an unproven source; tried again if that one proves false
    waits_for: frozenset[Address] = frozenset()  # relays that it named; tried again when they are gone

    @property
    def rank(self) -> tuple[bool, bool, int, tuple[float, ...], int]:
        """Sort key for the order of attempts: relays first, sources that were too slow last, then the preferred."""
        return self.last_resort, self.via is None, self.late, self.preferred, self.order

    @property
    def generation(self) -> str:
        """The run of the server; empty when it is not known."""
        return "" if self.source is None else self.source.generation
