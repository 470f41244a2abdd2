"""The events that a pull takes, and the commands that it returns.

:mod:`netloader.core.pull` decides, and :mod:`netloader.client.pull` carries out the commands.
The pull numbers its sessions: each :class:`Connect` names a new number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from netloader.core.addresses import Address
from netloader.core.manifest import Manifest
from netloader.core.messages import Outcome
from netloader.core.plan import Ranges
from netloader.core.protocol.events import Announcement
from netloader.core.sources import Source
from netloader.errors import DiscoveryError, MemoryStillInUse, NetloaderError, NoSourceLeft

__all__ = [
    "Accept",
    "Allocate",
    "BlocksArrived",
    "BlocksDenied",
    "BlocksOffered",
    "CancelSession",
    "Command",
    "Connect",
    "DeadlinePassed",
    "Event",
    "Fail",
    "Finish",
    "FreeMemory",
    "HoldingAnnounced",
    "LeaveSource",
    "Listed",
    "Log",
    "MemoryAllocated",
    "Reject",
    "RequestBlocks",
    "SearchEnded",
    "SessionEnded",
    "SessionIdle",
    "SessionQueued",
    "SessionReady",
    "SessionStarted",
    "SourceLost",
    "SourcesFound",
    "StartRelaying",
    "Succeed",
    "TimerFired",
]

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourcesFound:
    """Sources appeared, or those that are known have another load or other labels."""

    sources: Sequence[Source]


@dataclass(frozen=True, slots=True)
class SourceLost:
    """A source is no longer offered. A session that is running with it continues."""

    source: Address


@dataclass(frozen=True, slots=True)
class Listed:
    """Every source that was there when the search began was found; more may appear."""


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """No more sources appear, and none vanishes; `error`: the search failed."""

    error: DiscoveryError | None = None


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """The control connection to the source is up, and its session began."""

    session: int


@dataclass(frozen=True, slots=True)
class SessionQueued:
    """The source put this session into its queue."""

    session: int


@dataclass(frozen=True, slots=True)
class HoldingAnnounced:
    """The source announced what it holds, and the announcement passed every check of the session.

    Attributes:
        session: Which session.
        announcement: What it announced.
        partial: Whether it has only the blocks that :class:`BlocksOffered` names.
        shared: Whether it serves other clients that pass on what they have.
    """

    session: int
    announcement: Announcement
    partial: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class MemoryAllocated:
    """:class:`Allocate` has ended. `error` says why there is no memory; None when there is."""

    session: int
    error: NetloaderError | None = None


@dataclass(frozen=True, slots=True)
class SessionReady:
    """The channel is open, so blocks can be requested."""

    session: int


@dataclass(frozen=True, slots=True)
class SessionIdle:
    """Every block requested from this session has arrived or was denied."""

    session: int


@dataclass(frozen=True, slots=True)
class BlocksDenied:
    """The source can't send these blocks.

    Attributes:
        session: Which session.
        ranges: The blocks.
        reason: Why, as the source gave it.
        sources: Addresses where the blocks can be found instead, as the source gave them.
    """

    session: int
    ranges: Ranges
    reason: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlocksOffered:
    """The source told more about its blocks.

    Attributes:
        session: Which session.
        has: Blocks that it has now, in addition to those named before.
        sent: Blocks that it has sent to other clients.
    """

    session: int
    has: Ranges = ()
    sent: Ranges = ()


@dataclass(frozen=True, slots=True)
class BlocksArrived:
    """Blocks arrived in memory. Each comes with the digest of its bytes, not yet compared."""

    session: int
    blocks: Sequence[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session ended, or its connection could not be made.

    Attributes:
        session: Which session.
        error: Why it failed; None when it succeeded.
        transport: Name of the transport; empty when none was chosen.
        others: Whether both sides may have another transport in common.
        opened: Whether the channel was open.
        story: The last transitions of the session.
    """

    session: int
    error: NetloaderError | None = None
    transport: str = ""
    others: bool = False
    opened: bool = False
    story: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time that :meth:`~netloader.core.pull.Pull.wake_at` returned has been reached."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The deadline of the whole pull has passed.

    Attributes:
        seconds: How long the pull was allowed to take.
    """

    seconds: float


Event = (
    SourcesFound
    | SourceLost
    | Listed
    | SearchEnded
    | SessionStarted
    | SessionQueued
    | HoldingAnnounced
    | MemoryAllocated
    | SessionReady
    | SessionIdle
    | BlocksDenied
    | BlocksOffered
    | BlocksArrived
    | SessionEnded
    | TimerFired
    | DeadlinePassed
)

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Begin a session -> SessionEnded, as the last of its events.

    Attributes:
        session: Its number.
        source: Address to connect to.
        root: Root that the source has to hold, in hex; empty when any root is accepted.
        pinned_by: Where `root` comes from.
        avoid: Addresses of relays that failed in this pull.
        unfit: Transports that could not be set up with this source.
        labels: What the search told about it.
        named_by: The source that named it; None when the search found it.
        follow: Whether the source may redirect this client to relays.
        others: Whether the pull has other sources, or expects to have one soon: this one need not make room for it.
    """

    session: int
    source: Address
    root: str = ""
    pinned_by: str = ""
    avoid: tuple[str, ...] = ()
    unfit: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    named_by: Address | None = None
    follow: bool = True
    others: bool = False


@dataclass(frozen=True, slots=True)
class Allocate:
    """Allocate memory for a manifest -> MemoryAllocated. Given for one session at a time."""

    session: int
    manifest: Manifest
    metadata: Mapping[str, str] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free the memory that was allocated: its source delivered nothing, and another one may hold other tensors."""


@dataclass(frozen=True, slots=True)
class Accept:
    """The source holds the root that this pull is pinned to: continue the session."""

    session: int


@dataclass(frozen=True, slots=True)
class Reject:
    """End the session with this error: what the source announced or sent is not accepted."""

    session: int
    error: NetloaderError


@dataclass(frozen=True, slots=True)
class RequestBlocks:
    """Request blocks -> BlocksArrived and BlocksDenied, which together name each block; or SessionEnded."""

    session: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Finish:
    """End the session well: nothing more is needed from this source."""

    session: int
    outcome: Outcome
    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LeaveSource:
    """End the session: the source is slow, and others take over its blocks. It may have no connection yet."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class CancelSession:
    """End the session, which has no open channel yet: every block is verified."""

    session: int


@dataclass(frozen=True, slots=True)
class StartRelaying:
    """The first block is verified: other clients may now pull verified blocks of what was announced from this one."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the log."""

    level: Literal["debug", "info", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Succeed:
    """End the pull: every block is verified. Sessions that still end are not waited for."""


@dataclass(frozen=True, slots=True)
class Fail:
    """End the pull with an error: no source is left, the deadline passed, or the memory can't be reused."""

    error: NoSourceLeft | MemoryStillInUse = field(hash=False)


Command = (
    Connect
    | Allocate
    | FreeMemory
    | Accept
    | Reject
    | RequestBlocks
    | Finish
    | LeaveSource
    | CancelSession
    | StartRelaying
    | Log
    | Succeed
    | Fail
)
