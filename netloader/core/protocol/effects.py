"""The effects: what a session wants done. Its driver carries them out in order.

Names are imperative. An effect that takes time says after ``->`` which events report its result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.messages import Announce, ClientMessage, ServerMessage
from netloader.core.plan import Ranges
from netloader.core.protocol.context import ClientTerms
from netloader.core.protocol.events import Announcement
from netloader.core.texts import LINE, one_line

__all__ = [
    "AcceptChannel",
    "AskForWork",
    "Authenticate",
    "CheckBlocks",
    "Close",
    "CloseChannel",
    "ConnectChannel",
    "DeliverSignal",
    "Effect",
    "Examine",
    "LookUp",
    "Note",
    "NoteBlocks",
    "NoteChain",
    "NoteQueued",
    "Pin",
    "ReceiveBlocks",
    "ReturnBlocks",
    "Send",
    "SendBlocks",
    "SetTimer",
    "TakeTurn",
]


@dataclass(frozen=True, slots=True)
class Send:
    """Send one control message."""

    message: ClientMessage | ServerMessage


@dataclass(frozen=True, slots=True)
class Authenticate:
    """Authenticate every later frame in both directions. A received frame that is not authentic gives Failed.

    Attributes:
        sending: Key for the frames that this side sends.
        receiving: Key for the frames that it receives.
    """

    sending: bytes = field(repr=False)
    receiving: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Replace the session's only timer. TimedOut follows when it expires. None: no timer."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Note:
    """Write one line to the log, for the operator. The text may hold text of the peer, and is escaped and cut."""

    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", one_line(self.text, LINE))


@dataclass(frozen=True, slots=True)
class LookUp:
    """Server: find the holding -> Held or NotHeld."""

    role: Role
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class TakeTurn:
    """Server: wait for a turn for this client -> any number of Queued, then TurnTaken or NotHeld."""


@dataclass(frozen=True, slots=True)
class AcceptChannel:
    """Server: have the transport make an offer -> ChannelOffered, then ChannelOpened; or WorkFailed."""

    transport: str
    peer_facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class ConnectChannel:
    """Client: connect to the offer -> ChannelOpened or WorkFailed."""

    transport: str
    offer: bytes
    peer_facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class DeliverSignal:
    """Hand a signal of the peer's transport to this side's transport."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Examine:
    """Client: check the server's announcement -> Examined, or Failed.

    Attributes:
        announce: The announcement.
        terms: This client's terms.
        identity: The server's identity.
        probing: Whether the client only asks what is held.
    """

    announce: Announce
    terms: ClientTerms
    identity: ModelIdentity | None
    probing: bool


@dataclass(frozen=True, slots=True)
class Pin:
    """Client: allocate memory if there is none yet, and pin root and plan -> Pinned or WorkFailed.

    Attributes:
        announcement: What the server announced.
        partial: Whether it has only the blocks that NoteBlocks names.
        shared: Whether it serves other clients that relay.
    """

    announcement: Announcement
    partial: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class AskForWork:
    """Client: let the pull choose blocks for this session -> BlocksWanted, or Finished once there are no more."""


@dataclass(frozen=True, slots=True)
class CheckBlocks:
    """Server: check whether these blocks can be sent -> BlocksReady and BlocksGone, which together name each block."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Server: put these blocks on the channel, after all earlier ones -> BlocksSent or WorkFailed."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class ReceiveBlocks:
    """Client: receive these blocks, after all earlier ones, and check each.

    -> BlocksReceived or WorkFailed.
    """

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class ReturnBlocks:
    """Client: return these blocks to the ledger, because this server will not send them."""

    ranges: Ranges
    reason: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoteChain:
    """Client: report the relays that the server pulls blocks from, directly or through others."""

    node: str
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoteBlocks:
    """Client: report that the server has more blocks, or sends some to other clients that relay."""

    has: Ranges
    sent: Ranges


@dataclass(frozen=True, slots=True)
class NoteQueued:
    """Client: report that this session waits for its turn.

    Attributes:
        position: Number of clients before it.
        reason: Why it waits, as the server says.
    """

    position: int
    reason: str


@dataclass(frozen=True, slots=True)
class CloseChannel:
    """Close the channel, if there is one -> ChannelDown."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the channel and the control connection, and stop the timer. No event follows."""


Effect = (
    Send
    | Authenticate
    | SetTimer
    | Note
    | NoteBlocks
    | NoteChain
    | NoteQueued
    | LookUp
    | TakeTurn
    | AcceptChannel
    | ConnectChannel
    | DeliverSignal
    | Examine
    | Pin
    | AskForWork
    | CheckBlocks
    | SendBlocks
    | ReceiveBlocks
    | ReturnBlocks
    | CloseChannel
    | Close
)
