"""What a session knows: its terms, and what it has learned so far. Handlers read and write it; nothing else does."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.manifest import Manifest
from netloader.core.messages import NONCE_BYTES, Ability, Identify, RefusalCode
from netloader.core.plan import Ranges
from netloader.core.protocol.events import Announcement
from netloader.core.protocol.states import Side
from netloader.errors import LocalProtocolError, NetloaderError, RefusedError

__all__ = ["ClientTerms", "Context", "Refuse", "ServerTerms", "Timings"]


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a session may stay where it is, in seconds.

    Attributes:
        hello: From connection to the end of the greeting.
        validate: Between two signs of life while validating, or waiting for a turn.
        plan: From manifest to open channel.
        stall: Between two blocks, or two requests for blocks.
        finalize: From verdict to goodbye.
    """

    hello: float = 10.0
    validate: float = 30.0
    plan: float = 120.0
    stall: float = 30.0
    finalize: float = 10.0


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """What a client brings to a session.

    Attributes:
        identity: What it is about to fill; None to adopt what the server holds under `role`.
        manifest: The tensors it is about to fill; None to adopt the server's.
        manifest_digest: Digest of `manifest`; empty when None.
        role: The holding it asks about.
        layouts: Layouts it can take.
        abilities: Transports, preferred first.
        unavailable: Why other transports can't be used on this side, by name; for the log.
        token: Shared secret, or None.
        root: Pinned root in hex, or empty.
        pinned_by: Where `root` comes from.
        probe: Only look.
        node: Name of this process among relays; empty when it does not relay.
        relay: Port at which it serves what it has while it pulls; 0 when it does not.
        follow: Go to a relay when sent there.
        avoid: Relays that failed it, by address.
        max_hops: Relays that blocks may pass through on their way here.
        max_bytes: Largest model it would adopt.
        software: Name and version.
        timings: Deadlines.
    """

    identity: ModelIdentity | None = None
    manifest: Manifest | None = None
    manifest_digest: str = ""
    role: Role = "target"
    layouts: tuple[Layout, ...] = ("raw", "processed", "checkpoint")
    abilities: tuple[Ability, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    token: bytes | None = field(default=None, repr=False)
    root: str = ""
    pinned_by: str = ""
    probe: bool = False
    node: str = ""
    relay: int = 0
    follow: bool = False
    avoid: tuple[str, ...] = ()
    max_hops: int = 32
    max_bytes: int = 1 << 44
    software: str = ""
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True)
class ServerTerms:
    """What a server brings to a session.

    Attributes:
        abilities: Transports, preferred first.
        token: Shared secret, or None.
        software: Name and version.
        timings: Deadlines.
        max_open_blocks: Blocks that one client may have asked for and not yet been sent.
    """

    abilities: tuple[Ability, ...] = ()
    token: bytes | None = field(default=None, repr=False)
    software: str = ""
    timings: Timings = Timings()
    max_open_blocks: int = 1 << 20


class Refuse(RefusedError):
    """Raised by a server's handler: ends the session with a Refusal that carries all of it."""

    def __init__(
        self,
        code: RefusalCode,
        message: str,
        *,
        hint: str = "",
        retry_after: float | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        super().__init__(code, message, hint=hint, retry_after=retry_after, sources=sources)
        self.refusal: RefusalCode = code


@dataclass(slots=True)
class Context:
    """What is known in one session.

    Attributes:
        side: Which end.
        terms: What this side brought.
        nonce, peer_nonce: Random bytes of both sides.
        peer_abilities: The peer's transports.
        peer_software: The peer's name and version.
        peer_node: The server's name among relays; empty when it holds everything itself.
        peer_chain: Relays that the server gets blocks from.
        peer_identity: Identity at the other end, once told.
        announcement: What is being pulled, once known.
        transport: Name of the transport chosen.
        identify: What the client said about itself (server).
        announced: The server said what it holds (client); `announcement` follows once that was examined.
        offered: The channel was offered (client).
        open_blocks: Blocks asked for and neither granted (client) or sent (server) nor gone.
        granted: Blocks granted and neither received (client) nor sent (server).
        early_wants: Requests that came before this end of the channel was open (server).
        probing: The session only looks.
        released: The server said goodbye after the verdict: both free their ends, and the connection may end.
        deadline: Seconds that the running timer was set to, or None.
        error: Why the session failed.
        story: The last moves.
    """

    side: Side
    client: ClientTerms = ClientTerms()
    server: ServerTerms = ServerTerms()
    nonce: bytes = b""
    peer_nonce: bytes = b""
    peer_abilities: tuple[Ability, ...] = ()
    peer_software: str = ""
    peer_node: str = ""
    peer_chain: tuple[str, ...] = ()
    peer_identity: ModelIdentity | None = None
    announcement: Announcement | None = None
    identify: Identify | None = None
    transport: str = ""
    announced: bool = False
    offered: bool = False
    open_blocks: set[int] = field(default_factory=set)
    granted: set[int] = field(default_factory=set)
    early_wants: list[Ranges] = field(default_factory=list)
    probing: bool = False
    released: bool = False
    deadline: float | None = None
    error: NetloaderError | None = None
    story: deque[str] = field(default_factory=lambda: deque(maxlen=32))

    def timings(self) -> Timings:
        """Deadlines of this side."""
        return self.server.timings if self.side is Side.SERVER else self.client.timings

    def known(self) -> Announcement:
        """What is being pulled.

        Raises:
            LocalProtocolError: It is not known yet; the table rules that out.
        """
        if self.announcement is None:
            raise LocalProtocolError("nothing has been announced in this session")
        return self.announcement

    def connect(self, nonce: bytes) -> None:
        """Note that the control connection is up.

        Raises:
            LocalProtocolError: It was up already, or `nonce` has the wrong length.
        """
        if self.nonce:
            raise LocalProtocolError("the session was connected twice")
        if len(nonce) != NONCE_BYTES:
            raise LocalProtocolError(f"a nonce has {NONCE_BYTES} bytes, this one {len(nonce)}")
        self.nonce = nonce

    def forget_blocks(self) -> None:
        """Drop the account of blocks: the session no longer moves any."""
        self.open_blocks.clear()
        self.granted.clear()
        self.early_wants.clear()
