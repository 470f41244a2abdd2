"""Discovery: contracts to find sources, to publish a source and to claim work; and the fixed list of sources."""

from __future__ import annotations

from netloader.core.sources import Source
from netloader.discovery.base import (
    Appeared,
    Backend,
    Claim,
    Claims,
    Holder,
    Listed,
    Publication,
    Publisher,
    SourceChange,
    SourceProvider,
    Vanished,
    Wanted,
)
from netloader.discovery.fixed import FixedSources

__all__ = [
    "Appeared",
    "Backend",
    "Claim",
    "Claims",
    "FixedSources",
    "Holder",
    "Listed",
    "Publication",
    "Publisher",
    "Source",
    "SourceChange",
    "SourceProvider",
    "Vanished",
    "Wanted",
]
