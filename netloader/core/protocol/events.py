"""The local events that a driver feeds into a session, besides the peer's messages.

Names are in the past tense. An effect that takes time is always followed by an event that reports success or failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.identity import ModelIdentity
from netloader.core.manifest import Manifest
from netloader.core.messages import ClientMessage, Ending, Outcome, RefusalCode, ServerMessage
from netloader.core.plan import Plan, Ranges
from netloader.errors import NetloaderError

__all__ = [
    "Announcement",
    "BlocksGone",
    "BlocksOffered",
    "BlocksReady",
    "BlocksReceived",
    "BlocksSent",
    "BlocksWanted",
    "Cancelled",
    "ChannelDown",
    "ChannelOffered",
    "ChannelOpened",
    "Connected",
    "ConnectionLost",
    "Event",
    "Examined",
    "Failed",
    "Finished",
    "Held",
    "NotHeld",
    "Pinned",
    "Queued",
    "SignalPosted",
    "TimedOut",
    "TurnTaken",
    "UpstreamChanged",
    "WorkFailed",
]


@dataclass(frozen=True, slots=True)
class Announcement:
    """Everything that a server announces about one holding. It is computed once.

    Attributes:
        identity: Identity of the model.
        manifest: The tensors.
        manifest_digest: Its digest, in hex.
        plan: Its blocks.
        algorithm: Name of the block digest.
        digests: Digest of every block, joined.
        root: Root over manifest and digests, in hex.
        metadata: What the weight files say about themselves; None when it is not stated.
    """

    identity: ModelIdentity
    manifest: Manifest
    manifest_digest: str
    plan: Plan
    algorithm: str
    digests: bytes
    root: str
    metadata: Mapping[str, str] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Connected:
    """The control connection is up.

    Attributes:
        nonce: Fresh random bytes.
    """

    nonce: bytes


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The control connection ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The session can't continue: the peer sent invalid bytes, or this side failed."""

    error: NetloaderError


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """Moving blocks failed: the ledger refused the root, the channel broke, or a block has the wrong digest.

    This is a separate event from :class:`Failed`, because in FINALIZE it is ignored: the client needs nothing more.
    """

    error: NetloaderError


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The timer of the last SetTimer expired."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """This side ends the session: it was cancelled, or is stopping.

    Attributes:
        reason: Why.
        code: The code that the peer is sent.
    """

    reason: str
    code: Ending = "internal"


@dataclass(frozen=True, slots=True)
class Held:
    """Server: LookUp found the holding."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class NotHeld:
    """Server: the holding that the client wants is not here: not at all, not yet, or no longer."""

    code: RefusalCode
    reason: str
    hint: str = ""
    retry_after: float | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Queued:
    """Server: the client has to wait for its turn. Repeated while it waits."""

    reason: str
    position: int


@dataclass(frozen=True, slots=True)
class TurnTaken:
    """Server: the client got its turn.

    Attributes:
        node: Name of this server among relays; empty when it holds everything itself.
        chain: Relays that it pulls blocks from now, directly or through others.
        partial: Whether it has only the blocks that BlocksOffered names.
        shared: Whether it serves other clients that relay.
    """

    node: str = ""
    chain: tuple[str, ...] = ()
    partial: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class UpstreamChanged:
    """Server: the relays that it pulls blocks from have changed.

    Attributes:
        chain: The relays that it pulls from now, directly or through others.
    """

    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Examined:
    """Client: the announcement passed all checks."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class Pinned:
    """Client: the ledger accepted root and plan."""


@dataclass(frozen=True, slots=True)
class ChannelOffered:
    """Server: the transport has made an offer."""

    offer: bytes


@dataclass(frozen=True, slots=True)
class SignalPosted:
    """The transport wants a signal sent to its other end."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    """The channel is open."""


@dataclass(frozen=True, slots=True)
class ChannelDown:
    """The channel is closed, and no longer uses any memory."""


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """Server: these requested blocks can be sent now."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BlocksGone:
    """Server: these requested blocks can't be sent any more."""

    ranges: Ranges
    reason: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlocksOffered:
    """Server: it has more blocks, or sent some to other clients that relay."""

    has: Ranges = ()
    sent: Ranges = ()


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """Server: these blocks were sent on the channel."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BlocksWanted:
    """Client: these blocks were assigned to this session."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BlocksReceived:
    """Client: these blocks arrived and were verified."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Finished:
    """Client: it needs nothing more from this server."""

    outcome: Outcome
    blocks: int = 0
    nbytes: int = 0


LocalEvent = (
    Connected
    | ConnectionLost
    | Failed
    | WorkFailed
    | TimedOut
    | Cancelled
    | Held
    | NotHeld
    | Queued
    | TurnTaken
    | UpstreamChanged
    | Examined
    | Pinned
    | ChannelOffered
    | SignalPosted
    | ChannelOpened
    | ChannelDown
    | BlocksReady
    | BlocksGone
    | BlocksOffered
    | BlocksSent
    | BlocksWanted
    | BlocksReceived
    | Finished
)
Event = LocalEvent | ClientMessage | ServerMessage
