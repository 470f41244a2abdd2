"""The contracts of discovery: to find sources, to publish one's own, to claim a piece of work. No implementations.

The three are independent: a provider implements those that its backend can do. A pull uses only the first.

What a backend says is never trusted with the weights: a source that was found is asked, compared and verified like any
other, and a claim saves work but protects no data.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from netloader.core.addresses import Address
from netloader.core.sources import Source

__all__ = [
    "Appeared",
    "Claim",
    "Claims",
    "Listed",
    "Publication",
    "Publisher",
    "SourceChange",
    "SourceProvider",
    "Vanished",
]


@dataclass(frozen=True, slots=True)
class Appeared:
    """A source can be asked from now on; or it is known already, and its labels or load are other ones now."""

    source: Source


@dataclass(frozen=True, slots=True)
class Vanished:
    """A source is gone, and is not to be asked any more. Nothing happens when it was not known."""

    address: Address


@dataclass(frozen=True, slots=True)
class Listed:
    """All that was there when the stream began has been said. What follows are changes."""


SourceChange = Appeared | Vanished | Listed


@runtime_checkable
class SourceProvider(Protocol):
    """Finds sources.

    One provider may be watched several times, one after the other and at once; each stream is independent.
    """

    def watch(self) -> AsyncGenerator[SourceChange, None]:
        """Tell which sources there are, then what changes, until there is nothing more to tell.

        An implementation is an async generator (``async def watch(self): ... yield Appeared(...)``). It yields
        `Appeared` for each source that is there, then `Listed`, then each change as it comes. It may yield the same
        source again, with other labels or another load. Order counts: of sources with equal load, the one that appeared
        first is tried first, and the first source that accepts decides the root of a pull.

        Where the generator ends, no more sources come: what it said stays true, and the pull ends as with a fixed list.

        Deadlines: `Listed` is due within seconds. A pull waits for it 10 seconds, or for its `wait` if that is longer;
        after that it gives up when it has no source left. A stream that stays open is watched until the pull ends.

        Cancellation: when the pull is over, the stream is cancelled in whatever it awaits, and closed. It may await in
        a ``finally`` block only under a shielded scope with a deadline of its own, because the pull waits for it. The
        stream is iterated and closed by one task, so it may hold a task group open across ``yield``.

        The event loop: it runs on the loop of the pull, so it must not block, and must not compute for more than a few
        milliseconds between two changes.

        Raises:
            DiscoveryError: The backend can't be reached, or what it says makes no sense. The pull logs this (and any
                other exception) once, goes on with the sources that it knows, and does not watch again. A provider that
                can recover has to do so itself, without an error.
        """
        ...


class Publication(Protocol):
    """A source that is published, as long as the context of :meth:`Publisher.publish` is open."""

    async def update(self, source: Source) -> None:
        """Replace the labels and the load; the address stays the same.

        Returns once the backend has accepted it. Updates that come faster than the backend takes them may be merged
        into the latest one.

        Raises:
            DiscoveryError: The backend did not accept it within the provider's deadline. What was published before
                stays. The caller may go on, and may try again.
        """
        ...


class Publisher(Protocol):
    """Makes a source known to those that look for one."""

    def publish(self, source: Source) -> AbstractAsyncContextManager[Publication]:
        """Publish `source` for as long as the context is open.

        Entering returns once the backend has accepted it. From then on every `SourceProvider` of the same backend tells
        it as `Appeared`. Publish only what is served already: whoever reads this connects at once.

        Lease: what is published lapses by itself within a minute after its process died or lost the backend. While the
        context is open, a task inside it renews the lease. When the backend can't be reached for longer than the lease
        lasts, the source vanishes for the others; the task logs this once as a warning, publishes anew when it can,
        and never ends the context: a server goes on serving whoever knows it.

        Withdrawal: leaving the context withdraws the source, also when it is left by an error or a cancellation. That
        is tried under a shielded scope for 5 seconds at most; if it fails, the lease lapses. Leaving raises nothing
        of its own.

        Publishing one address twice at once is an error of the caller.

        Args:
            source: Address under which others reach it, labels, load.

        Raises:
            DiscoveryError: (On entering.) The backend can't be reached or refuses, within the provider's deadline.
                Nothing is published then. The caller serves without being found.
            LocalProtocolError: (On entering.) This address is published by this object already.
        """
        ...


class Claim(Protocol):
    """A piece of work that is this instance's, as long as the context of :meth:`Claims.claim` is open."""

    @property
    def held(self) -> bool:
        """Whether it is still this instance's, as far as is known. Never true again once it was false."""
        ...

    async def lost(self) -> None:
        """Wait until it is lost: the lease could not be renewed in time, so another instance may hold it now.

        Returns at once when it is lost already. Cancelling this changes nothing.
        """
        ...


class Claims(Protocol):
    """Lets one instance of a group do what all of them would do otherwise, such as reading weights from storage.

    A claim saves work and is no lock: after a pause or a network partition two instances may believe for a while that
    they hold it. Whatever is done under a claim must stay right when two instances do it.
    """

    def claim(self, work: str, *, within: float) -> AbstractAsyncContextManager[Claim | None]:
        """Claim `work`, and hold it for as long as the context is open.

        Entering waits until the work is this instance's, and at most `within` seconds. The context gives None when
        another instance still holds it then: that is no error, and the caller does without (it looks for a source,
        or does the work as well).

        Lease: a claim lapses within a minute after its holder died or lost the backend; then one of those that wait
        gets it. While the context is open, a task inside it renews the lease. When that fails for as long as the lease
        lasts, :attr:`Claim.held` becomes false *before* another instance can get it (by the clock of this host), and
        :meth:`Claim.lost` returns. Nothing is cancelled: the holder decides whether it goes on.

        Release: leaving the context releases the claim, also when it is left by an error or a cancellation. That is
        tried under a shielded scope for 5 seconds at most; if it fails, the lease lapses. Leaving raises nothing of
        its own. Whether the work was done is not part of this contract: whoever gets the claim next has to look.

        Cancelling while it waits withdraws the request; the claim is never held afterwards.

        Args:
            work: What is claimed, the same text in all instances of the group: it should name the model and the step.
            within: Seconds to wait; 0 to ask once.

        Raises:
            DiscoveryError: (On entering.) The backend can't be reached or refuses. The caller does what it would do
                without a group.
        """
        ...
