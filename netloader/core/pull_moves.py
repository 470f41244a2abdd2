"""What a pull is told, and what it wants done: the words between :mod:`netloader.core.pull` and who carries it out.

Sessions go by numbers that the pull gives them when it wants a source connected.
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
    "Adopted",
    "Allocate",
    "Announced",
    "Ask",
    "Command",
    "Connect",
    "Connected",
    "Denied",
    "Dismiss",
    "Done",
    "Ended",
    "Event",
    "Failed",
    "Finish",
    "Found",
    "Landed",
    "Leave",
    "Listed",
    "Log",
    "Lost",
    "Moment",
    "Opened",
    "PassOn",
    "Queued",
    "Refuse",
    "SearchEnded",
    "TimeIsUp",
    "WantsWork",
]

# --- what happened ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """Sources appeared, or those that are known have another load or other labels."""

    sources: Sequence[Source]


@dataclass(frozen=True, slots=True)
class Lost:
    """A source is not offered any more; a session that is under way goes on."""

    source: Address


@dataclass(frozen=True, slots=True)
class Listed:
    """Every source that was there when the search began was found; more may appear."""


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """No more sources appear, and none vanishes; `error`: the search failed."""

    error: DiscoveryError | None = None


@dataclass(frozen=True, slots=True)
class Connected:
    """The source is there: a session with it began."""

    session: int


@dataclass(frozen=True, slots=True)
class Queued:
    """The source lets this session wait for its turn."""

    session: int


@dataclass(frozen=True, slots=True)
class Announced:
    """The source said what it holds, and it is what this pull wants."""

    session: int
    announcement: Announcement


@dataclass(frozen=True, slots=True)
class Adopted:
    """Memory for what the source announced is there; `error`: it is not."""

    session: int
    error: NetloaderError | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """The channel is open: blocks can be asked for."""

    session: int


@dataclass(frozen=True, slots=True)
class WantsWork:
    """The session has nothing that it was asked for and did not bring."""

    session: int


@dataclass(frozen=True, slots=True)
class Denied:
    """The source can't send these blocks.

    Attributes:
        session: Which session.
        ranges: The blocks.
        reason: The source's.
        sources: Where it says that they may be had.
    """

    session: int
    ranges: Ranges
    reason: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Landed:
    """Blocks arrived, and their bytes have these digests."""

    session: int
    blocks: Sequence[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class Ended:
    """A session is over, or a connection could not be made.

    Attributes:
        session: Which session.
        error: Why; None when it went well.
        transport: Name of the transport; empty when none was chosen.
        others: Other transports that both may have.
        opened: Whether the channel was open.
        story: The last moves of the session.
    """

    session: int
    error: NetloaderError | None = None
    transport: str = ""
    others: bool = False
    opened: bool = False
    story: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Moment:
    """The moment has come that :meth:`~netloader.core.pull.Pull.wake_at` named."""


@dataclass(frozen=True, slots=True)
class TimeIsUp:
    """The pull may take no longer.

    Attributes:
        seconds: What it was allowed.
    """

    seconds: float


Event = (
    Found
    | Lost
    | Listed
    | SearchEnded
    | Connected
    | Queued
    | Announced
    | Adopted
    | Opened
    | WantsWork
    | Denied
    | Landed
    | Ended
    | Moment
    | TimeIsUp
)

# --- what is to be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Begin a session -> Ended, after whatever else it has to tell.

    Attributes:
        session: Its number.
        source: Where.
        root: Root that the source has to hold, in hex; empty when any will do.
        pinned_by: Where `root` comes from.
        avoid: Relays that failed this pull, by address.
        unfit: Transports that can't be set up with this source.
        labels: What the search told about it.
        named_by: The source that named it; None when the search found it.
    """

    session: int
    source: Address
    root: str = ""
    pinned_by: str = ""
    avoid: tuple[str, ...] = ()
    unfit: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    named_by: Address | None = None


@dataclass(frozen=True, slots=True)
class Allocate:
    """Provide memory for a manifest -> Adopted. For one session at a time."""

    session: int
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Accept:
    """The source holds what this pull is pinned to: go on."""

    session: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The source does not: end the session with this error."""

    session: int
    error: NetloaderError


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the source for these blocks -> Landed and Denied, which together name each of them; or Ended."""

    session: int
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing more is needed from this source."""

    session: int
    outcome: Outcome
    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Leave:
    """End the session: others are faster."""

    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Dismiss:
    """End the session, which has brought nothing yet: every block is there."""

    session: int


@dataclass(frozen=True, slots=True)
class PassOn:
    """What this is was accepted: others may pull from here what is there already."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class Log:
    """Worth a line in the log."""

    level: Literal["debug", "info", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """Every block is verified. Nothing that follows is waited for."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing is left to try, or nothing may be tried any more."""

    error: NoSourceLeft | MemoryStillInUse = field(hash=False)


Command = Connect | Allocate | Accept | Refuse | Ask | Finish | Leave | Dismiss | PassOn | Log | Done | Failed
