"""The contracts of discovery: to find sources, to publish a source, to claim a piece of work. No implementations.

The three are independent: a provider implements those that its backend supports. A pull uses only the first.

The correctness of weights never depends on a backend. A source that it names is compared and verified like any other,
and a claim saves work but protects no data.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from netloader.core.addresses import Address
from netloader.core.entries import Entry
from netloader.core.sources import Source

__all__ = [
    "Appeared",
    "Backend",
    "Claim",
    "Claims",
    "Holder",
    "Listed",
    "Publication",
    "Publisher",
    "SourceChange",
    "SourceProvider",
    "Vanished",
    "Wanted",
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which servers a client looks for.

    Attributes:
        key: As in `Entry.key`; empty for a backend that can't know keys.
        rank: The rank whose weights are wanted.
        role: ``target`` or ``draft``.
    """

    key: str = ""
    rank: int = 0
    role: str = "target"


@dataclass(frozen=True, slots=True)
class Appeared:
    """A source is available, or the labels or the load of a known source changed."""

    source: Source


@dataclass(frozen=True, slots=True)
class Vanished:
    """A source is not available any more. Ignored if the source is not known."""

    address: Address


@dataclass(frozen=True, slots=True)
class Listed:
    """Every source that was available when the stream began has been yielded. Changes follow."""


SourceChange = Appeared | Vanished | Listed


@runtime_checkable
class SourceProvider(Protocol):
    """Finds sources.

    One provider may be watched several times, in sequence or at once; each stream is independent.
    """

    def watch(self) -> AsyncGenerator[SourceChange, None]:
        """Yield the available sources, then each change.

        An implementation is an async generator (``async def watch(self): ... yield Appeared(...)``). It yields
        `Appeared` for each available source, then `Listed`, then each change when it happens. It may yield the same
        source again, with other labels or another load. The order matters: among sources of equal load, the one that
        appeared first is tried first, and the first source that accepts decides the root of a pull.

        When the generator ends, no more changes follow: the sources stay available, and the pull ends as with a fixed
        list.

        Deadlines: yield `Listed` within seconds. A pull waits for it for 10 seconds, or for its `wait` if that is
        longer. After that, it fails when it has no source left. A stream that stays open is watched until the pull
        ends.

        Cancellation: when the pull is over, the task that iterates the stream is cancelled, and the stream is closed.
        A ``finally`` block may await only in a shielded scope with a deadline of its own, because the pull waits for
        it. One task iterates and closes the stream, so a task group may stay open across ``yield``.

        The event loop: the stream runs on the event loop of the pull, so it must not block, and must not compute for
        more than a few milliseconds between two changes.

        Raises:
            DiscoveryError: The backend cannot be reached, or its data are not valid. The pull logs this (and any other
                exception) once, goes on with the sources that it knows, and does not watch again. A provider that can
                recover must do so itself, without raising.
        """
        ...


class Publication(Protocol):
    """A server that is published while the context of :meth:`Publisher.publish` is open."""

    def update(self, entry: Entry) -> None:
        """Replace what may change: kind, layout, root, labels and load.

        Returns at once. A task inside the context sends the update. If updates are made faster than they are sent, only
        the latest one is sent. If the backend can't be reached, the latest one is sent when it can be reached again.

        Raises:
            DiscoveryError: The entry is too long. The previous one stays published.
            LocalProtocolError: Key, rank, role, address or generation is another one: that is another server.
        """
        ...


class Publisher(Protocol):
    """Publishes a server, so that providers of the same backend find it."""

    def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        """Publish `entry` for as long as the context is open.

        Entering the context returns when the backend has accepted the entry, or when the first attempt failed, within
        10 seconds. From then on every `SourceProvider` of the same backend that wants such a server yields it as
        `Appeared`. Publish a server only after it serves: clients may connect at once.

        Lease: a published source expires within a minute after its process died or lost the backend. While the context
        is open, a task inside it renews the lease. If the backend cannot be reached for longer than the lease lasts,
        the source vanishes for all providers. The task logs this once as a warning, publishes the source again when it
        can, and never ends the context: the server goes on serving the clients that know it. The same holds if the
        backend can't be reached on entering. (A backend without leases, such as a folder, says so in its docs.)

        Withdrawal: leaving the context withdraws the source, also on an error or a cancellation. This is tried in a
        shielded scope for at most 5 seconds; if it fails, the lease expires. Leaving raises no error of its own.

        Publishing one address twice at the same time is an error of the caller. If another process publishes the same
        address, the one that came last stays published.

        Args:
            entry: What is published.

        Raises:
            DiscoveryError: (On entering.) The entry is too long. Nothing is published.
            LocalProtocolError: (On entering.) This object publishes this address already, with this key, rank and role.
        """
        ...


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a claim, in words for people.

    Attributes:
        label: Whom the holder said that it is.
        progress: What it told last by :meth:`Claim.tell`; empty if nothing.
    """

    label: str
    progress: str = ""


class Claim(Protocol):
    """A piece of work that this instance holds while the context of :meth:`Claims.claim` is open."""

    @property
    def held(self) -> bool:
        """Whether this instance still holds the claim, as far as it knows. Once false, it stays false."""
        ...

    async def lost(self) -> None:
        """Wait until the claim is lost: its lease was not renewed in time, so another instance may hold it now.

        Returns at once if it is lost already. Cancelling this call has no effect on the claim.
        """
        ...

    def tell(self, progress: str) -> None:
        """Tell the instances that wait how far the work is. Only the latest text counts, and at most 500 characters.

        Returns at once and raises nothing. The text is sent about once per second, as far as the backend can be
        reached.
        """
        ...


class Claims(Protocol):
    """Lets one instance of a group do work that otherwise all of them would do, such as reading weights from storage.

    A claim saves work and is no lock: after a pause or a network partition two instances may believe for a while that
    they hold it. Work under a claim must be correct also when two instances do it.
    """

    def claim(
        self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
    ) -> AbstractAsyncContextManager[Claim | None]:
        """Claim `work`, and hold it for as long as the context is open.

        Entering the context waits for the claim for at most `within` seconds. The context gives None if another
        instance still holds it then. This is not an error: the caller goes on without the claim (it pulls from a
        source, or does the work as well).

        Lease: a claim expires within a minute after its holder died or lost the backend; then one of the waiting
        instances gets it. While the context is open, a task inside it renews the lease. If renewing fails for as long
        as the lease lasts, :attr:`Claim.held` becomes false *before* another instance can get the claim (by the clock
        of this host), and :meth:`Claim.lost` returns. Nothing is cancelled: the holder decides whether it goes on.
        Two may hold it at once if a holder was suspended for longer than the lease, or if the backend lost its data.

        Release: leaving the context releases the claim, also on an error or a cancellation. This is tried in a shielded
        scope for at most 5 seconds; if it fails, the lease expires. Leaving raises no error of its own. The claim does
        not say whether the work was done: the next holder must check.

        Cancelling the wait withdraws the request; the claim is not held afterwards.

        Args:
            work: Names the work by the same text in all instances of the group, including the model and the step.
            within: Seconds to wait; 0 to ask once.
            label: Whom to name to those that wait, in at most 200 characters; by default this host and process.
            waiting: Called on the event loop while another instance holds the claim: first when this is known, then
                when the holder or what it tells has changed. What it raises ends the wait.

        Raises:
            DiscoveryError: (On entering.) The backend cannot be reached for longer than two leases, or when `within`
                has passed; or it refused. The caller goes on as without a group.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """A place where sources are found, and where servers are published and work is claimed, as far as it can.

    A backend holds no connection: watching, publishing and claiming open their own and close them, on whatever event
    loop they run. Making a backend checks its URL and does no I/O.
    """

    def sources(self, wanted: Wanted) -> SourceProvider:
        """The provider of the servers that are published with this key, rank and role.

        One that can't know keys, such as DNS, yields all servers of the rank: validation decides.
        """
        ...

    def publisher(self) -> Publisher | None:
        """Publishes servers; None if this backend is filled by others (DNS)."""
        ...

    def claims(self) -> Claims | None:
        """Claims work; None if this backend can't."""
        ...
