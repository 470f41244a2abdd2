"""What a session knows: its terms, and what it has learned so far. Handlers read and write it; nothing else does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from netloader.core.identity import ModelIdentity, Role
from netloader.core.manifest import Manifest
from netloader.core.messages import NONCE_BYTES, Ability, Identify, RefusalCode
from netloader.core.options import PullOptions, ServeOptions, Timings
from netloader.core.plan import Ranges
from netloader.core.protocol.events import Announcement
from netloader.core.protocol.states import Side
from netloader.errors import LocalProtocolError, NetloaderError, RefusedError

__all__ = ["ClientTerms", "Context", "Refuse", "ServerTerms"]


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """What a client brings to a session.

    Attributes:
        options: How its pull behaves.
        identity: What it is about to fill; None to adopt what the server holds under the role of `options`.
        manifest: The tensors it is about to fill; None to adopt the server's.
        manifest_digest: Digest of `manifest`; empty when None.
        abilities: Transports, preferred first.
        root: Pinned root in hex, or empty.
        pinned_by: Where `root` comes from.
        probe: Only look.
        node: Name of this process among relays; empty when it does not relay.
        relay: Port at which it serves what it has while it pulls; 0 when it does not.
        avoid: Relays that failed it, by address.
    """

    options: PullOptions = field(default_factory=PullOptions)
    identity: ModelIdentity | None = None
    manifest: Manifest | None = None
    manifest_digest: str = ""
    abilities: tuple[Ability, ...] = ()
    root: str = ""
    pinned_by: str = ""
    probe: bool = False
    node: str = ""
    relay: int = 0
    avoid: tuple[str, ...] = ()

    @property
    def role(self) -> Role:
        """The holding it asks about."""
        return self.options.role if self.identity is None else self.identity.role


@dataclass(frozen=True, slots=True)
class ServerTerms:
    """What a server brings to a session.

    Attributes:
        options: How it behaves.
        abilities: Transports, preferred first.
    """

    options: ServeOptions = field(default_factory=ServeOptions)
    abilities: tuple[Ability, ...] = ()


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
        return (self.server if self.side is Side.SERVER else self.client).options.timings

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
