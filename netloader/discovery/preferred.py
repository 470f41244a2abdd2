"""The sources of a registry, in the order in which one client prefers them, beside those that it was given."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import replace

from netloader.core.addresses import Address, is_loopback
from netloader.core.choice import BOOT, Here, Preference, preference
from netloader.core.sources import Source
from netloader.discovery.base import Appeared, Listed, SourceChange, SourceProvider, Vanished
from netloader.discovery.combined import MergedSources

__all__ = ["Preferred", "given_and_found"]


def given_and_found(
    given: SourceProvider, found: SourceProvider, here: Here, own: Callable[[], Collection[Address]] = tuple
) -> SourceProvider:
    """The sources that were given, and behind them those that a registry names.

    What a registry says of an address that was given is not heeded.

    Args:
        given: The sources that were given.
        found: Those of the registry.
        here: Where this client runs.
        own: Addresses of this process, from which it must not pull.
    """
    return MergedSources([given, Preferred(found, here, own)])


class Preferred:
    """The sources of a registry, where their order means nothing.

    They are yielded when the registry has listed all of them, the preferred one first, so that a pull begins with that
    one. Sources that this client can't use are left out: its own address, and the loopback address of another host.

    Args:
        found: The sources.
        here: Where this client runs.
        own: Addresses of this process.
    """

    def __init__(self, found: SourceProvider, here: Here, own: Callable[[], Collection[Address]] = tuple) -> None:
        self._found = found
        self._here = here
        self._own = own

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """See :meth:`netloader.discovery.SourceProvider.watch`."""
        first: dict[Address, Source] | None = {}
        async with aclosing(self._found.watch()) as changes:
            async for change in changes:
                match change:
                    case Appeared(source):
                        if not self._usable(source):
                            continue
                        source = replace(source, one_of_many=True)
                        if first is None:
                            yield Appeared(source)
                        else:
                            first[source.address] = source
                    case Vanished(address) if first is not None:
                        first.pop(address, None)
                    case Listed() if first is not None:
                        for source in sorted(first.values(), key=self._order):
                            yield Appeared(source)
                        first = None
                        yield change
                    case _:
                        yield change
        for source in sorted((first or {}).values(), key=self._order):
            yield Appeared(source)

    def _usable(self, source: Source) -> bool:
        boot = source.labels.get(BOOT, "")
        elsewhere = boot != "" != self._here.boot and boot != self._here.boot
        return source.address not in self._own() and not (elsewhere and is_loopback(source.address.host))

    def _order(self, source: Source) -> Preference:
        return preference(self._here, source.generation or str(source.address), source.labels, source.load)
