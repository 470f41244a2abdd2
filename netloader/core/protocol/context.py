"""The data of a session: the terms of this side, and what the peer has said. Only handlers read and write it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from netloader.core.identity import ModelIdentity, Role
from netloader.core.keys import SessionKeys
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
    """A client's settings for a session.

    Attributes:
        options: How its pull behaves.
        identity: Identity of the model that it is about to fill; None to adopt what the server holds under the role of
            `options`.
        manifest: The tensors that it is about to fill; None to adopt the server's manifest.
        manifest_digest: Digest of `manifest`; empty when that is None.
        abilities: Transports, preferred first.
        root: Pinned root in hex, or empty.
        pinned_by: Where `root` comes from.
        probe: Only ask what is held.
        node: Name of this process among relays; empty when it does not relay.
        relay: Port at which it serves blocks while it pulls; 0 when it does not relay.
        avoid: Addresses of relays that failed it.
        others: It pulls from relays already.
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
    others: bool = False

    @property
    def role(self) -> Role:
        """The holding it asks about."""
        return self.options.role if self.identity is None else self.identity.role


@dataclass(frozen=True, slots=True)
class ServerTerms:
    """A server's settings for a session.

    Attributes:
        options: How it behaves.
        abilities: Transports, preferred first.
    """

    options: ServeOptions = field(default_factory=ServeOptions)
    abilities: tuple[Ability, ...] = ()


class Refuse(RefusedError):
    """Raised by a server's handler to end the session with a Refusal that has the same fields."""

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
    """The data of one session.

    Attributes:
        side: Client or server.
        client, server: Terms of this side; those of the other side are at their defaults.
        protocol: Version that both sides speak; 0 before it is agreed.
        nonce, peer_nonce: Random bytes of both sides.
        greeting, peer_greeting: Bodies of both sides' first messages, exactly as they were sent; the
            peer's is kept only until the keys are derived.
        keys: Keys of the session; None before the peer's greeting, and without a token.
        peer_abilities: The peer's transports.
        peer_software: The peer's name and version.
        peer_node: The server's name among relays; empty when it holds everything itself.
        peer_chain: Relays that the server pulls blocks from.
        peer_partial: Whether the server has only the blocks that Progress names.
        peer_shared: Whether the server serves other clients that relay.
        peer_identity: The peer's identity, once received.
        announcement: What is being pulled, once known.
        transport: Name of the chosen transport.
        identify: The client's Identify message (server).
        announced: Whether the server's Announce was received (client). `announcement` is set once it was examined.
        offered: Whether the channel was offered (client).
        partial: Whether this server has only the blocks that it named in Progress, and has not named all (server).
        named: Blocks that Progress named as held (both sides): bit n stands for block n.
        named_sent: Blocks that Progress named as sent to others (client).
        open_blocks: Requested blocks that are not yet granted (client) or sent (server), and not denied.
        granted: Granted blocks that are not yet received (client) or sent (server).
        early_wants: Requests that came before this end of the channel was open (server).
        probing: Whether the client only asks what is held.
        released: Whether the server said goodbye after the verdict. From then on the connection may end.
        deadline: Seconds that the running timer was set to, or None.
        error: Why the session failed.
        story: The last transitions.
    """

    side: Side
    client: ClientTerms = ClientTerms()
    server: ServerTerms = ServerTerms()
    protocol: int = 0
    nonce: bytes = b""
    peer_nonce: bytes = b""
    greeting: bytes = b""
    peer_greeting: bytes = b""
    keys: SessionKeys | None = None
    peer_abilities: tuple[Ability, ...] = ()
    peer_software: str = ""
    peer_node: str = ""
    peer_chain: tuple[str, ...] = ()
    peer_partial: bool = False
    peer_shared: bool = False
    peer_identity: ModelIdentity | None = None
    announcement: Announcement | None = None
    identify: Identify | None = None
    transport: str = ""
    announced: bool = False
    offered: bool = False
    partial: bool = False
    named: int = 0
    named_sent: int = 0
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

    @property
    def token(self) -> bytes | None:
        """The token of this side; None without one."""
        return (self.server if self.side is Side.SERVER else self.client).options.token

    @property
    def unproven(self) -> bool:
        """Whether the peer still has to prove that it knows the token. Until then nothing it says is obeyed or shown.

        Once there are keys, only authentic frames reach the session.
        """
        return self.token is not None and self.keys is None

    def known(self) -> Announcement:
        """What is being pulled.

        Raises:
            LocalProtocolError: It is not known yet, which the table makes impossible.
        """
        if self.announcement is None:
            raise LocalProtocolError("nothing has been announced in this session")
        return self.announcement

    def connect(self, nonce: bytes) -> None:
        """Record that the control connection is up.

        Raises:
            LocalProtocolError: This was called before, or `nonce` has the wrong length.
        """
        if self.nonce:
            raise LocalProtocolError("the session was connected twice")
        if len(nonce) != NONCE_BYTES:
            raise LocalProtocolError(f"a nonce has {NONCE_BYTES} bytes, this one has {len(nonce)}")
        self.nonce = nonce

    def forget_blocks(self) -> None:
        """Forget all requested blocks, because the session moves no more blocks."""
        self.open_blocks.clear()
        self.granted.clear()
        self.early_wants.clear()
