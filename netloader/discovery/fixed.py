"""The provider of a fixed list of sources."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

from netloader.core.addresses import Address, parse_address
from netloader.core.sources import Source
from netloader.discovery.base import Appeared, SourceChange
from netloader.errors import ConfigError

__all__ = ["FixedSources"]


class FixedSources:
    """A provider of a fixed list of sources, in the order to try.

    Args:
        sources: Addresses (``host:port``, ``[ipv6]:port``), or sources with labels and load.

    Attributes:
        sources: As given.

    Raises:
        ConfigError: One of them is not an address, or `sources` is a single string.
    """

    def __init__(self, sources: Iterable[str | Address | Source]) -> None:
        if isinstance(sources, str):
            raise ConfigError(field="sources", value=sources, allowed="a list of addresses (host:port)")
        self.sources = tuple(_source(one, f"sources[{place}]") for place, one in enumerate(sources))

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """Yield each source, then end."""
        for source in self.sources:
            yield Appeared(source)


def _source(one: str | Address | Source, field: str) -> Source:
    if isinstance(one, Source):
        return one
    return Source(one if isinstance(one, Address) else parse_address(one, field=field))
