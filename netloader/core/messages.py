"""The types of the control messages between server and client.

There is one tagged union per direction. Unknown fields are ignored, so that a newer peer may add fields. An unknown
message ends the session with an error that names it. New fields need defaults, and no field ever changes its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from netloader.core.greeting import harmless
from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.manifest import Manifest

__all__ = [
    "MAX_METADATA",
    "MAX_METADATA_BYTES",
    "MAX_RANGES",
    "NONCE_BYTES",
    "OLDEST",
    "PROTOCOL",
    "Ability",
    "Accepted",
    "Agree",
    "Announce",
    "ChannelOffer",
    "ClientMessage",
    "Gone",
    "Goodbye",
    "Grant",
    "Hello",
    "Identify",
    "Outcome",
    "Progress",
    "Refusal",
    "RefusalCode",
    "ServerMessage",
    "Signal",
    "Upstream",
    "Verdict",
    "Waiting",
    "Want",
    "Welcome",
    "metadata_bytes",
    "wire_body",
    "wire_sources",
    "wire_text",
]

PROTOCOL = 2
"""Newest version of the protocol that this code speaks."""

OLDEST = 1
"""Oldest version of the protocol that this code speaks: that of the release before."""

NONCE_BYTES = 16
MAX_RANGES = 4096
"""Ranges in one message."""

MAX_TEXT = 4096
MAX_SECONDS = 86400
MAX_SOURCES = 64
MAX_CHAIN = 256
MAX_SOURCE = 300

MAX_METADATA = 16_384
"""Entries of the metadata in an announcement."""

MAX_METADATA_BYTES = 4 << 20
"""Bytes of all keys and values together."""

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Name = Annotated[str, msgspec.Meta(max_length=64)]
Hex = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[0-9a-f]*\Z")]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, msgspec.Meta(max_length=32)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
BlockNumber = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
WireRanges = Annotated[tuple[tuple[BlockNumber, BlockNumber], ...], msgspec.Meta(max_length=MAX_RANGES)]
Sources = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=MAX_SOURCE)], ...], msgspec.Meta(max_length=MAX_SOURCES)
]

Metadata = Annotated[dict[str, str], msgspec.Meta(max_length=MAX_METADATA)]

Chain = Annotated[tuple[Hex, ...], msgspec.Meta(max_length=MAX_CHAIN)]
"""Names of relays. A client that finds its own name here would wait for itself."""

RefusalCode = Literal[
    "version",  # no common protocol version
    "auth",  # the peer could not prove that it knows the token
    "not-held",  # nothing is held under this role or layout
    "identity",  # the identities differ
    "manifest",  # the tensors differ
    "root",  # the weights differ
    "plan",  # both sides derived different blocks
    "transport",  # no common transport
    "not-ready",  # it is not held yet, and will be later
    "busy",  # there is no room for this client now, or its relays are to be asked instead
    "gone",  # it was held, and no longer is
    "relay",  # this relay can't be used: it pulls from this client, or it is too far from the seed
    "timeout",  # the peer took too long
    "protocol",  # the peer violated the protocol
    "internal",  # this side failed
]

Ending = Literal["done"] | RefusalCode
"""How a session ends: ``done``, or the kind of failure."""

Outcome = Literal["complete", "partial", "probed"]


class Wire(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Base of all control messages."""


class Ability(msgspec.Struct, frozen=True, omit_defaults=True):
    """One transport that a side can use. A list of them is in order of preference.

    Attributes:
        name: Name of the transport.
        facts: Facts by which the peer decides whether the transport can connect both sides (which host, which user).
    """

    name: Name
    facts: Annotated[dict[Name, Text], msgspec.Meta(max_length=16)] = {}


Abilities = Annotated[tuple[Ability, ...], msgspec.Meta(max_length=32)]


class Hello(Wire, frozen=True, kw_only=True):
    """Client: opens the session.

    Attributes:
        protocol: Newest version it speaks.
        oldest: Oldest version it speaks.
        nonce: Random bytes, from which the keys of the session are derived.
        abilities: Its transports.
        software: Name and version, for the log.
        proves: It has a token: it expects a proof, and will authenticate its frames. Since protocol 2.
    """

    protocol: Annotated[int, msgspec.Meta(ge=1)]
    oldest: Annotated[int, msgspec.Meta(ge=1)] = 1  # as any default: on the wire it is left out, so it never changes
    nonce: Nonce
    abilities: Abilities = ()
    software: Text = ""
    proves: bool = False


class Welcome(Wire, frozen=True, kw_only=True):
    """Server: answers Hello.

    Attributes:
        protocol: The version to speak from here.
        nonce: Random bytes, from which the keys of the session are derived.
        proof: Derived from the token and both greetings, when a token is configured; else empty.
        abilities: Its transports.
        software: Name and version, for the log.
    """

    protocol: Annotated[int, msgspec.Meta(ge=1)]
    nonce: Nonce
    proof: Proof = b""
    abilities: Abilities = ()
    software: Text = ""


class Identify(Wire, frozen=True, kw_only=True):
    """Client: says what it wants.

    Attributes:
        identity: Identity of the model that it is about to fill, or None to adopt what is held under `role`.
        role: Role of the holding that it wants, when it has no identity.
        layouts: Layouts that it accepts.
        proof: Only in protocol 1; empty since, because the frame itself is authenticated.
        manifest: Digest of the manifest that it is about to fill; the server need not send an equal manifest.
        root: The root that it is pinned to, or empty.
        probe: It only asks what is held: it takes no turn and pulls nothing.
        node: Random name of this process among relays; empty when it does not relay.
        relay: Port at which it serves blocks while it pulls; 0 when it does not relay.
        follow: It accepts being redirected to a relay.
        avoid: Addresses of relays that failed it. The server must not redirect it to them.
        others: It pulls from others already, so it does not wait for a turn: a server that serves enough clients
            refuses it. Since protocol 2.
    """

    identity: ModelIdentity | None = None
    role: Role = "target"
    layouts: Annotated[tuple[Layout, ...], msgspec.Meta(max_length=8)] = ()
    proof: Proof = b""
    manifest: Hex = ""
    root: Hex = ""
    probe: bool = False
    node: Hex = ""
    relay: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    follow: bool = False
    avoid: Sources = ()
    others: bool = False


class Waiting(Wire, frozen=True, kw_only=True):
    """Server: the client has to wait for its turn. Repeated while it waits, so that silence means a dead server.

    Attributes:
        reason: Why.
        position: Number of clients before it.
    """

    reason: Text
    position: Annotated[int, msgspec.Meta(ge=0)] = 0


class Accepted(Wire, frozen=True, kw_only=True):
    """Server: the identities match. Carries the server's identity."""

    identity: ModelIdentity


class Announce(Wire, frozen=True, kw_only=True):
    """Server: announces exactly what it holds.

    Attributes:
        manifest: The tensors; None when the client's digest showed that its manifest is equal.
        block_bytes: The block size.
        algorithm: Name of the block digest.
        digests: Digest of every block, joined.
        root: Root over manifest and digests.
        plan: Digest of the plan.
        node: Name of the server among relays; empty when it holds everything itself.
        chain: Names of the relays that it still pulls blocks from, directly or through others.
        metadata: What the weight files say about themselves (``__metadata__``); None when this is not stated, because
            the tensors come from no files, or by a peer of protocol 1.
        partial: It has only the blocks that Progress names. Since protocol 2.
        shared: It serves other clients that relay, and Progress names the blocks that it sends to them. Since protocol
            2.
    """

    manifest: Manifest | None = None
    block_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)]
    algorithm: Name
    digests: bytes
    root: Hex
    plan: Hex
    node: Hex = ""
    chain: Chain = ()
    metadata: Metadata | None = None
    partial: bool = False
    shared: bool = False


class Agree(Wire, frozen=True, kw_only=True):
    """Client: confirms that it derived the same plan, and names the transport that it chose.

    Attributes:
        plan: Digest of the plan.
        transport: Name of the transport.
    """

    plan: Hex
    transport: Name


class ChannelOffer(Wire, frozen=True, kw_only=True):
    """Server: tells the client how to connect the channel.

    Attributes:
        transport: Name of the transport.
        offer: Data of the transport, opaque to the session.
    """

    transport: Name
    offer: Annotated[bytes, msgspec.Meta(max_length=65536)]


class Signal(Wire, frozen=True, kw_only=True):
    """Either side: carries a small message of the transport."""

    data: Annotated[bytes, msgspec.Meta(max_length=65536)]


class Want(Wire, frozen=True, kw_only=True):
    """Client: requests blocks. Each range is half open."""

    ranges: WireRanges


class Grant(Wire, frozen=True, kw_only=True):
    """Server: will send these blocks next on the channel, in this order."""

    ranges: WireRanges


class Gone(Wire, frozen=True, kw_only=True):
    """Server: will not send these requested blocks.

    Attributes:
        ranges: The blocks.
        reason: Why.
        sources: Addresses from which they can be pulled instead.
    """

    ranges: WireRanges
    reason: Text
    sources: Sources = ()


class Upstream(Wire, frozen=True, kw_only=True):
    """Server: the relays that it pulls blocks from have changed.

    Attributes:
        chain: As in Announce.
    """

    chain: Chain = ()


class Progress(Wire, frozen=True, kw_only=True):
    """Server: more of its blocks can be requested, or were sent to others. Since protocol 2.

    Attributes:
        has: Blocks that it has now, if it announced that it has only a part.
        sent: Blocks that it sends to other clients that relay: the others are needed more urgently.
    """

    has: WireRanges = ()
    sent: WireRanges = ()


class Verdict(Wire, frozen=True, kw_only=True):
    """Client: reports the result of the session.

    Attributes:
        outcome: ``complete``: it has all blocks; ``partial``: it needs no more blocks from this server; ``probed``: it
            only asked what is held.
        blocks: Number of blocks from this server that were verified.
        nbytes: Their bytes.
    """

    outcome: Outcome
    blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    nbytes: Annotated[int, msgspec.Meta(ge=0)] = 0


class Refusal(Wire, frozen=True, kw_only=True):
    """Server: refuses, says why, and ends the session.

    Attributes:
        code: Kind of refusal.
        message: The reason, with the values concerned.
        hint: What to do.
        retry_after: Seconds after which the client may try again, or None when another attempt is useless.
        sources: Addresses from which the weights can be pulled instead.
    """

    code: RefusalCode
    message: Text
    hint: Text = ""
    retry_after: Seconds | None = None
    sources: Sources = ()


class Goodbye(Wire, frozen=True, kw_only=True):
    """Either side: ends the session.

    Attributes:
        code: ``done``, or the kind of failure.
        reason: The reason as text.
    """

    code: Ending = "done"
    reason: Text = ""


ClientMessage = Hello | Identify | Agree | Signal | Want | Verdict | Goodbye
"""Messages that a server may receive."""

ServerMessage = (
    Welcome
    | Waiting
    | Accepted
    | Announce
    | ChannelOffer
    | Signal
    | Grant
    | Gone
    | Upstream
    | Progress
    | Refusal
    | Goodbye
)
"""Messages that a client may receive."""


_ENCODER = msgspec.msgpack.Encoder()


def wire_body(message: ClientMessage | ServerMessage) -> bytes:
    """The body of the frame that carries `message`.

    Raises:
        UnicodeEncodeError, OverflowError, TypeError: It holds a value that MessagePack can't carry.
    """
    body = _ENCODER.encode(message)
    return harmless(body) if isinstance(message, Hello) else body


def wire_text(text: str) -> str:
    """`text` made valid for a Text field: lone surrogates (from file names) are escaped, and it is cut to length."""
    return text.encode(errors="backslashreplace").decode()[:MAX_TEXT]


def metadata_bytes(metadata: Mapping[str, str]) -> int:
    """Bytes of all keys and values of the metadata, as UTF-8."""
    return sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())


def wire_sources(sources: tuple[str, ...]) -> tuple[str, ...]:
    """`sources` made valid for a Sources field: addresses that are too long, or too many, are left out."""
    return tuple(source for source in sources if len(source) <= MAX_SOURCE)[:MAX_SOURCES]
