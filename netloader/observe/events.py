"""What observers are told. Plain data: frozen, never changed after it was told.

Sessions go by numbers: at a client those of its pull, at a server those of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.report import Progress, PullReport
from netloader.errors import NetloaderError, RefusedError

__all__ = [
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
    "TransportChosen",
]

# --- a pull -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PullBegan:
    """A pull began; `PullEnded` follows.

    Attributes:
        role: What it pulls: ``target`` or ``draft``.
    """

    role: str


@dataclass(frozen=True, slots=True)
class PullEnded:
    """A pull is over. It was cancelled when there is neither a report nor an error.

    Attributes:
        seconds: Whole time.
        report: Its account, when every byte is verified.
        error: Why it failed; also an error of the caller's `progress`.
    """

    seconds: float
    report: PullReport | None = None
    error: Exception | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SourceChosen:
    """A pull connects to a source; `SourceLeft` follows, and between the two a session if it is there.

    Attributes:
        session: Number of the session.
        source: Its address.
        labels: What its provider said about it.
        named_by: Address of the source that named it; empty when its provider did.
    """

    session: int
    source: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    named_by: str = ""


@dataclass(frozen=True, slots=True)
class SourceLeft:
    """A pull is done with a source for now; it may choose it again.

    Attributes:
        session: Number of the session.
        source: Its address.
        error: Why, if anything went wrong: it is not there, it refused (:class:`~netloader.RefusedError`), it broke
            off, others are faster. None when it was not needed any more, or the pull was cancelled.
    """

    session: int
    source: str
    error: NetloaderError | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class BlocksVerified(Progress):
    """Blocks of one source are in place and checked. Told for many at a time, not for each.

    Attributes:
        verified: Bytes of the pull that are in place and checked.
        total: Bytes in all.
        seconds: Since the pull began.
        source: Where these came from.
        session: Number of the session that brought them.
        blocks: How many these are.
        nbytes: Their bytes.
    """

    session: int
    blocks: int
    nbytes: int


# --- a session, at either side ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionBegan:
    """A control connection is there; `SessionEnded` follows.

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
    """A phase of a session is over. At a client, the seconds of all of them add up to ``PullReport.phases``.

    Attributes:
        side: ``client`` or ``server``.
        session: Number of the session.
        peer: Address of the other side.
        phase: ``connect``, ``validate``, ``plan``, ``transfer``, ``verify`` or ``finalize``; see
            :class:`~netloader.Phases`. ``connect`` is told of a source that is not there, too. ``verify`` is told at
            the end of a client's session, for all of its blocks.
        seconds: How long it took.
    """

    side: str
    session: int
    peer: str
    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session is over.

    Attributes:
        side: ``client`` or ``server``.
        session: Number of the session.
        peer: Address of the other side.
        role: What the client asked for; empty when it did not get to that.
        transport: Name of the transport; empty when none was chosen.
        seconds: How long it took, connecting included.
        blocks: Blocks that were verified (client) or sent (server).
        nbytes: Their bytes.
        error: Why it failed; a refusal is a :class:`~netloader.RefusedError` with a code, at both sides.
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

    @property
    def stray(self) -> bool:
        """Whether the peer was no client at all: it went away or broke the rules before it asked for anything."""
        return self.error is not None and not self.role and not isinstance(self.error, RefusedError)


# --- what is served ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServingStarted:
    """A server offers weights from now on; `ServingStopped` follows.

    Attributes:
        role: ``target`` or ``draft``.
        layout: ``raw``, ``processed`` or ``checkpoint``.
        model: Name of the model; empty when it has none.
        root: Root of the weights, in hex.
        tensors: How many tensors.
        blocks: How many blocks.
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
    """A server does not offer these weights any more.

    Attributes:
        role: ``target`` or ``draft``.
        layout: ``raw``, ``processed`` or ``checkpoint``.
        root: Root of the weights, in hex.
        reason: Why, as clients are told.
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
    | BlocksVerified
    | SessionBegan
    | TransportChosen
    | PhaseEnded
    | SessionEnded
    | ServingStarted
    | ServingStopped
)
