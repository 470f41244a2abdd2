"""Who loads a model from storage when nobody holds it: one instance of a fleet, by a lease; the others wait for it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio

from netloader.core.addresses import Address
from netloader.core.choice import Here, other_name
from netloader.core.sources import Source
from netloader.core.texts import LINE, one_line, time_text
from netloader.discovery.base import Appeared, Claim, Claims, Holder, Listed, SourceChange, SourceProvider, Vanished
from netloader.discovery.beside import beside
from netloader.errors import DiscoveryError, NoSourceLeft, is_transient
from netloader.session.own_task import OwnTask

__all__ = ["Holders", "Turn", "turn_of", "useless_after", "work_of"]

_log = logging.getLogger("netloader")

_LISTING = 10.0
"""Seconds that a registry may take to list what it has."""

_LINE_EVERY = 10.0
"""Least seconds between two lines about one holder."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What an instance is to do.

    Attributes:
        loads: Whether it loads from storage. Otherwise a source was found.
        why: The reason, in words.
        claim: The lease under which it loads; None if it loads without one, or pulls.
    """

    loads: bool
    why: str
    claim: Claim | None = None


def work_of(key: str) -> str:
    """The name of the work that is claimed: loading the model with this key."""
    return f"origin/{key}"


class Holders:
    """Of the sources of a provider, those that may hold the model: an instance that finds one does not load.

    A source that states another name holds another model, such as a fine-tune. It may be pulled from if it turns out
    to be the same one, but it is no reason to wait. A source that was of no use is none either, though it stays listed
    until its lease ends. Nor is a relay: it has a part only, and where its own source is gone, all that there is may be
    relays that wait for each other.

    Args:
        provider: Finds sources.
        name: Name of the model; empty if it has none.
        useless: What :func:`useless_after` named.
    """

    def __init__(self, provider: SourceProvider, name: str, useless: Collection[str] = ()) -> None:
        self._provider = provider
        self._here = Here(name=name)
        self._useless = useless

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """See :meth:`netloader.discovery.SourceProvider.watch`."""
        async with aclosing(self._provider.watch()) as changes:
            async for change in changes:
                if not isinstance(change, Appeared) or self._counts(change.source):
                    yield change
                else:  # another generation at an address takes the place of the one before
                    yield Vanished(change.source.address)

    def _counts(self, source: Source) -> bool:
        name = source.generation or str(source.address)
        relay = source.labels.get("kind") == "relay"
        return not relay and name not in self._useless and not other_name(self._here, source.labels)


def useless_after(error: NoSourceLeft) -> frozenset[str]:
    """Sources that another pull could not use either: their generations, or addresses where there is none."""
    return frozenset(failed.generation or failed.source for failed in error.attempts if not is_transient(failed.cause))


@asynccontextmanager
async def turn_of(
    provider: SourceProvider, claims: Claims, work: str, *, within: float, what: str = "the model"
) -> AsyncIterator[Turn]:
    """Wait until a source is found, or this instance is the one that loads from storage.

    The lease is held while the context is open. So keep it open until the weights are served and published: then those
    that wait find the source before one of them can get the lease.

    Args:
        provider: Finds sources.
        claims: Gives the lease.
        work: The name of the work; see :func:`work_of`.
        within: Seconds to wait for both. After that, the instance loads without the lease.
        what: What is loaded, for the log.
    """
    if found := await _listed(provider):
        yield Turn(loads=False, why=f"{found} holds it")
        return
    waiting, given = _Waiting(what, within), list[Claim | None]()
    lease = OwnTask(_held(claims, work, within, waiting, given), "the lease of an origin")
    problem, entered = "", False
    with anyio.CancelScope() as scope:
        async with beside(partial(_watch, provider, scope.cancel), "netloader-origin"):
            try:
                await lease.enter()
                entered = True
            except DiscoveryError as error:
                problem = f"no lease can be asked for: {error}"
    claim = given[0] if entered else None
    try:
        found = "a new source" if scope.cancel_called else ""
        if claim is not None and not found:
            found = await _listed(provider)  # the holder before served it, and gave its lease back
        if found:
            if entered:
                entered = False
                await lease.leave()
            yield Turn(loads=False, why=f"{found} holds it")
        elif claim is None:
            yield Turn(loads=True, why=problem or waiting.over)
        else:
            _log.info("nobody holds %s: it is loaded from storage here, and others wait for it", what)
            yield Turn(loads=True, why="nobody holds it", claim=claim)
    finally:
        if entered:
            await lease.leave()


@asynccontextmanager
async def _held(
    claims: Claims, work: str, within: float, waiting: _Waiting, given: list[Claim | None]
) -> AsyncIterator[None]:
    """Hold the lease. In a task of its own: the context may hold cancel scopes, and others wait for it meanwhile."""
    async with claims.claim(work, within=within, waiting=waiting.told) as claim:
        given.append(claim)
        yield


class _Waiting:
    """Says for whom this instance waits: at once when it is another one, else now and then."""

    def __init__(self, what: str, within: float) -> None:
        self._what = what
        self._within = within
        self._began = time.monotonic()
        self._said = -_LINE_EVERY
        self._holder = ""
        self.over = f"nobody served it within {within:g} s"

    def told(self, holder: Holder) -> None:
        """Another instance holds the lease."""
        now = time.monotonic()
        if holder.label == self._holder and now - self._said < _LINE_EVERY:
            return
        self._holder, self._said = holder.label, now
        who = one_line(holder.label) + (f" ({one_line(holder.progress)})" if holder.progress else "")
        self.over = f"{who} did not serve it within {self._within:g} s"
        waited = f"{time_text(now - self._began)} of {time_text(self._within)}"
        _log.info("%s", one_line(f"waiting for {who}, which loads {self._what} from storage: {waited}", LINE))


async def _listed(provider: SourceProvider) -> str:
    """A source that the provider lists; empty if it lists none in time."""
    found: dict[Address, None] = {}
    with anyio.move_on_after(_LISTING):
        async with aclosing(provider.watch()) as changes:
            async for change in changes:
                match change:
                    case Appeared(source):
                        found[source.address] = None
                    case Vanished(address):
                        found.pop(address, None)
                    case Listed():
                        break
    return str(next(iter(found), ""))


async def _watch(provider: SourceProvider, appeared: Callable[[], None]) -> None:
    async with aclosing(provider.watch()) as changes:
        async for change in changes:
            if isinstance(change, Appeared):
                appeared()
                return
