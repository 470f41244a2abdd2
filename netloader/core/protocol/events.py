"""What happened: the local events that a driver feeds into a session, beside the peer's messages.

Past tense. Every effect that takes time comes back as exactly one of these, done or failed.
"""

from __future__ import annotations

from dataclasses import dataclass

from netloader.core.identity import ModelIdentity
from netloader.core.manifest import Manifest
from netloader.core.messages import ClientMessage, Ending, Outcome, RefusalCode, ServerMessage
from netloader.core.plan import Plan, Ranges
from netloader.errors import NetloaderError

__all__ = [
    "Announcement",
    "BlocksGone",
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
    """Everything a server announces about one holding, made once.

    Attributes:
        identity: Whose weights these are.
        manifest: The tensors.
        manifest_digest: Its digest, in hex.
        plan: Its blocks.
        algorithm: Name of the block digest.
        digests: Digest of every block, joined.
        root: Root over all of it, in hex.
    """

    identity: ModelIdentity
    manifest: Manifest
    manifest_digest: str
    plan: Plan
    algorithm: str
    digests: bytes
    root: str


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
    """The session cannot go on: the peer sent bytes that are no message, or this side failed."""

    error: NetloaderError


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """What this side did to move blocks failed: the ledger refused, the channel broke, or a block is a wrong one.

    Not :class:`Failed`, because in FINALIZE it no longer matters: the client needs nothing more.
    """

    error: NetloaderError


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The timer of the last SetTimer ran out."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """This side gives up: it was cancelled, or is stopping.

    Attributes:
        reason: Why.
        code: Which kind of ending the peer is told.
    """

    reason: str
    code: Ending = "internal"


@dataclass(frozen=True, slots=True)
class Held:
    """Server: what LookUp found."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class NotHeld:
    """Server: what the client asked about is not held, not yet, or not any more."""

    code: RefusalCode
    reason: str
    hint: str = ""
    retry_after: float | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Queued:
    """Server: the client has to wait for its turn; comes again while it waits."""

    reason: str
    position: int


@dataclass(frozen=True, slots=True)
class TurnTaken:
    """Server: the client's turn has come.

    Attributes:
        node: Name of this server among relays; empty when it holds everything itself.
        chain: Relays that it gets blocks from now, directly or not.
    """

    node: str = ""
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UpstreamChanged:
    """Server: it gets blocks from other relays than before.

    Attributes:
        chain: Which, directly or not.
    """

    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Examined:
    """Client: what was announced is what this side wants."""

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
    """The channel is closed and its memory is free."""


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """Server: these blocks, asked for, can be sent now."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BlocksGone:
    """Server: these blocks, asked for, can't be sent any more."""

    ranges: Ranges
    reason: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """Server: these blocks left through the channel."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BlocksWanted:
    """Client: the ledger gave these blocks to this session."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class BlocksReceived:
    """Client: these blocks landed and were checked."""

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
    | BlocksSent
    | BlocksWanted
    | BlocksReceived
    | Finished
)
Event = LocalEvent | ClientMessage | ServerMessage
