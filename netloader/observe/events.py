"""The events that observers receive: plain, frozen data.

Each session has a number: at a client it counts the sessions of the pull, at a server those of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.report import Progress, PullReport
from netloader.errors import NetloaderError, RefusedError

__all__ = [
    "BlocksSent",
    "BlocksVerified",
    "Event",
    "PhaseEnded",
    "PullBegan",
    "PullEnded",
    "ServingStarted",
    "ServingStopped",
    "SessionBegan",
    "SessionEnded",
    "SourceChosen",
    "SourceLeft",
    "SourceWaiting",
    "TransportChosen",
]

# --- a pull -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PullBegan:
    """A pull began; `PullEnded` follows.

    Attributes:
        role: Role of the tensors that it pulls: ``target`` or ``draft``.
    """

    role: str


@dataclass(frozen=True, slots=True)
class PullEnded:
    """A pull ended. With neither a report nor an error, it was cancelled.

    Attributes:
        seconds: Duration of the pull.
        report: Its report, if every byte is verified.
        error: Why it failed; this may be an error that the caller's `progress` raised.
        role: Role of the tensors, as in `PullBegan`.
    """

    seconds: float
    report: PullReport | None = None
    error: Exception | None = field(default=None, compare=False)
    role: str = ""


@dataclass(frozen=True, slots=True)
class SourceChosen:
    """A pull connects to a source; `SourceLeft` follows. If the connection succeeds, a session runs between the two.

    Attributes:
        session: Number of the session.
        source: Its address.
        labels: Its labels, as the provider gave them.
        named_by: Address of the source that named it; empty when the provider did.
    """

    session: int
    source: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    named_by: str = ""


@dataclass(frozen=True, slots=True)
class SourceLeft:
    """A pull stops using a source; it may choose it again.

    Attributes:
        session: Number of the session.
        source: Its address.
        error: Why, if something failed: the source cannot be reached, it refused (:class:`~netloader.RefusedError`),
            its connection broke, or other sources are faster. None when it was not needed any more, or the pull was
            cancelled.
    """

    session: int
    source: str
    error: NetloaderError | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SourceWaiting:
    """A pull waits, because no source has accepted it. Emitted about once per second while that lasts.

    Attributes:
        seconds: Seconds since the pull began.
        source: Address of the source that is waited for; empty when no source is known.
        reason: Why that source sends nothing yet, in one short line: what it answered, or that it does not answer.
        waited: Seconds that this wait has taken so far.
        limit: Seconds after which the pull stops waiting, counted as `waited`.
    """

    seconds: float
    source: str
    reason: str
    waited: float
    limit: float

    def __str__(self) -> str:
        who = self.source or "a source"
        return f"waiting for {who}: {self.reason}, {self.waited:.0f} of {self.limit:.0f} s"


@dataclass(frozen=True, slots=True)
class BlocksVerified(Progress):
    """Blocks of one source were verified. One event is emitted for many blocks.

    Attributes:
        verified: Verified bytes of the pull so far.
        total: All bytes of the pull.
        seconds: Seconds since the pull began.
        source: Address of the source of these blocks.
        session: Number of the session that received them.
        blocks: Number of these blocks.
        nbytes: Their bytes.
        transport: Name of the transport.
    """

    session: int
    blocks: int
    nbytes: int
    transport: str = ""


# --- a session, at either side ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionBegan:
    """A control connection was established; `SessionEnded` follows.

    Attributes:
        side: ``client`` or ``server``.
        session: Number of the session.
        peer: Address of the other side.
    """

    side: str
    session: int
    peer: str


@dataclass(frozen=True, slots=True)
class TransportChosen:
    """Both sides agreed on a transport, and its channel is open.

    Attributes:
        side: ``client`` or ``server``.
        session: Number of the session.
        peer: Address of the other side.
        transport: Name of the transport.
    """

    side: str
    session: int
    peer: str
    transport: str


@dataclass(frozen=True, slots=True)
class PhaseEnded:
    """A phase of a session ended. At a client, the sums of these seconds are ``PullReport.phases``.

    Attributes:
        side: ``client`` or ``server``.
        session: Number of the session.
        peer: Address of the other side.
        phase: ``connect``, ``validate``, ``plan``, ``transfer``, ``verify`` or ``finalize``; see
            :class:`~netloader.Phases`. ``connect`` is emitted for a source that cannot be reached, too. ``verify`` is
            emitted once, at the end of a client's session, for all of its blocks.
        seconds: Duration of the phase.
    """

    side: str
    session: int
    peer: str
    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session ended.

    Attributes:
        side: ``client`` or ``server``.
        session: Number of the session.
        peer: Address of the other side.
        role: Role that the client asked for; empty if the session ended before that.
        transport: Name of the transport; empty when none was chosen.
        seconds: Duration of the session, connecting included.
        blocks: Blocks that were verified (client) or sent (server).
        nbytes: Their bytes.
        error: Why it failed; a refusal is a :class:`~netloader.RefusedError` with a code, on both sides.
        unfinished: Blocks that were asked for (client) or being sent (server) when the session failed. Some of those
            that a server sent may have arrived. The client pulls them again.
        probe: Whether the client only asked what is held (server side).
    """

    side: str
    session: int
    peer: str
    role: str
    transport: str
    seconds: float
    blocks: int
    nbytes: int
    error: NetloaderError | None = field(default=None, compare=False)
    unfinished: int = 0
    probe: bool = False

    @property
    def stray(self) -> bool:
        """Whether this was a stray connection: it ended or violated the protocol before it asked for anything."""
        return self.error is not None and not self.role and not isinstance(self.error, RefusedError)


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """A server sent blocks to a client. One event is emitted for many blocks. Their sum is that of `SessionEnded`.

    Attributes:
        session: Number of the session.
        peer: Address of the client.
        transport: Name of the transport.
        blocks: Number of these blocks.
        nbytes: Their bytes.
    """

    session: int
    peer: str
    transport: str
    blocks: int
    nbytes: int


# --- what is served ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServingStarted:
    """A server began to offer weights; `ServingStopped` follows.

    Attributes:
        role: ``target`` or ``draft``.
        layout: ``raw``, ``processed`` or ``checkpoint``.
        model: Name of the model; empty when it has none.
        root: Root of the weights, in hex.
        tensors: Number of tensors.
        blocks: Number of blocks.
        nbytes: Their bytes.
    """

    role: str
    layout: str
    model: str
    root: str
    tensors: int
    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ServingStopped:
    """A server stopped offering weights.

    Attributes:
        role: ``target`` or ``draft``.
        layout: ``raw``, ``processed`` or ``checkpoint``.
        root: Root of the weights, in hex.
        reason: The reason, as clients receive it.
    """

    role: str
    layout: str
    root: str
    reason: str


Event = (
    PullBegan
    | PullEnded
    | SourceChosen
    | SourceLeft
    | SourceWaiting
    | BlocksVerified
    | BlocksSent
    | SessionBegan
    | TransportChosen
    | PhaseEnded
    | SessionEnded
    | ServingStarted
    | ServingStopped
)
