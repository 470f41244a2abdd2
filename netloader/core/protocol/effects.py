"""What is to be done: the effects that a session returns and its driver carries out, in order.

Imperative. Those that take time say which event brings their result back.
"""

from __future__ import annotations

from dataclasses import dataclass

from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.messages import Announce, ClientMessage, ServerMessage
from netloader.core.plan import Ranges
from netloader.core.protocol.context import ClientTerms
from netloader.core.protocol.events import Announcement

__all__ = [
    "AcceptChannel",
    "AskForWork",
    "CheckBlocks",
    "Close",
    "CloseChannel",
    "ConnectChannel",
    "DeliverSignal",
    "Effect",
    "Examine",
    "LookUp",
    "Note",
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
class SetTimer:
    """Replace the session's only timer; TimedOut comes when it runs out. None: no timer."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Note:
    """Log one line that an operator should see."""

    text: str


@dataclass(frozen=True, slots=True)
class LookUp:
    """Server: find the holding -> Held or NotHeld."""

    role: Role
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class TakeTurn:
    """Server: take one of the turns -> any number of Queued, then TurnTaken or NotHeld."""


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
    """Hand the transport what its other end posted."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Examine:
    """Client: check what the server announced -> Examined; Failed with what is wrong.

    Attributes:
        announce: What it said.
        terms: Of this client.
        identity: Of the server.
        probing: The session only looks.
    """

    announce: Announce
    terms: ClientTerms
    identity: ModelIdentity | None
    probing: bool


@dataclass(frozen=True, slots=True)
class Pin:
    """Client: provide memory where that is still to be done, and pin root and plan -> Pinned or WorkFailed."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class AskForWork:
    """Client: have the ledger give this session blocks -> BlocksWanted, or Finished once there will be none."""


@dataclass(frozen=True, slots=True)
class CheckBlocks:
    """Server: see whether these blocks can be sent -> BlocksReady and BlocksGone, which together name each of them."""

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
    """Client: give these blocks back to the ledger; this server will not send them."""

    ranges: Ranges
    reason: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoteChain:
    """Client: the server gets blocks from these relays, directly or not."""

    node: str
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoteQueued:
    """Client: the server lets this session wait for its turn.

    Attributes:
        position: Clients that come first.
    """

    position: int


@dataclass(frozen=True, slots=True)
class CloseChannel:
    """Close the channel, if there is one -> ChannelDown."""


@dataclass(frozen=True, slots=True)
class Close:
    """End everything: the channel, the control connection, the timer. No event follows."""


Effect = (
    Send
    | SetTimer
    | Note
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
