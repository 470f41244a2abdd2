"""Control messages: what crosses the wire between server and client, as types.

One tagged union per direction. Unknown fields are ignored, so that a newer peer may add some; an unknown message is
refused by name. New fields need defaults; no field ever changes its type.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.manifest import Manifest

__all__ = [
    "MAX_RANGES",
    "NONCE_BYTES",
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
    "Refusal",
    "RefusalCode",
    "ServerMessage",
    "Signal",
    "Upstream",
    "Verdict",
    "Waiting",
    "Want",
    "Welcome",
    "wire_sources",
    "wire_text",
]

PROTOCOL = 1
"""Version of the protocol that this code speaks."""

NONCE_BYTES = 16
MAX_RANGES = 4096
"""Ranges in one message."""

MAX_TEXT = 4096
MAX_SECONDS = 86400
MAX_SOURCES = 64
MAX_CHAIN = 256
MAX_SOURCE = 300

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

Chain = Annotated[tuple[Hex, ...], msgspec.Meta(max_length=MAX_CHAIN)]
"""Names of relays; a client that finds its own among them would wait for itself."""

RefusalCode = Literal[
    "version",  # no common protocol version
    "auth",  # the peer could not prove that it knows the token
    "not-held",  # nothing is held under this role or layout
    "identity",  # the identities differ
    "manifest",  # the tensors differ
    "root",  # the weights differ
    "plan",  # both sides derived different blocks
    "transport",  # no common transport
    "not-ready",  # it will be held, later
    "busy",  # all turns are taken, and the queue is full too
    "gone",  # it was held, and is not any more
    "relay",  # joining this relay makes no sense: a loop, or too far from the seed
    "timeout",  # the peer took too long
    "protocol",  # the peer broke the rules
    "internal",  # this side failed
]

Ending = Literal["done"] | RefusalCode
"""How a session ends: well, or with a kind of failure."""

Outcome = Literal["complete", "partial", "probed"]


class Wire(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Base of all control messages."""


class Ability(msgspec.Struct, frozen=True, omit_defaults=True):
    """One transport that a side could use, in the order of its preference.

    Attributes:
        name: Name of the transport.
        facts: What the peer needs to know to judge whether both could meet (which host, which user).
    """

    name: Name
    facts: Annotated[dict[Name, Text], msgspec.Meta(max_length=16)] = {}


Abilities = Annotated[tuple[Ability, ...], msgspec.Meta(max_length=32)]


class Hello(Wire, frozen=True, kw_only=True):
    """Client: opens the session.

    Attributes:
        protocol: Newest version it speaks.
        oldest: Oldest version it speaks.
        nonce: Random bytes for the proofs.
        abilities: Its transports.
        software: Name and version, for the log.
    """

    protocol: Annotated[int, msgspec.Meta(ge=1)]
    oldest: Annotated[int, msgspec.Meta(ge=1)] = 1  # as any default: on the wire it is left out, so it never changes
    nonce: Nonce
    abilities: Abilities = ()
    software: Text = ""


class Welcome(Wire, frozen=True, kw_only=True):
    """Server: answers Hello.

    Attributes:
        protocol: The version to speak from here.
        nonce: Random bytes for the proofs.
        proof: HMAC over both nonces, when a token is configured; else empty.
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
        identity: What it is about to fill, or None to adopt whatever is held under `role`.
        role: The holding it asks about when it has no identity.
        layouts: Layouts it can take.
        proof: HMAC over both nonces, when a token is configured; else empty.
        manifest: Digest of the manifest it is about to fill; the server then need not send an equal one.
        root: The root it is pinned to, or empty.
        probe: It only looks and takes no turn.
        node: Name of this process among relays, random; empty when it does not relay.
        relay: Port at which it serves what it has while it pulls; 0 when it does not.
        follow: It will go to a relay when it is sent there.
        avoid: Relays that failed it, by address; it is not to be sent there again.
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


class Waiting(Wire, frozen=True, kw_only=True):
    """Server: the client's turn has not come; repeated, so that silence means a dead server.

    Attributes:
        reason: Why.
        position: Clients before it.
    """

    reason: Text
    position: Annotated[int, msgspec.Meta(ge=0)] = 0


class Accepted(Wire, frozen=True, kw_only=True):
    """Server: the identities match; this is its own."""

    identity: ModelIdentity


class Announce(Wire, frozen=True, kw_only=True):
    """Server: what it holds, exactly.

    Attributes:
        manifest: The tensors; None when the client's digest showed that it has the same.
        block_bytes: Size to cut blocks with.
        algorithm: Name of the block digest.
        digests: Digest of every block, joined.
        root: Root over all of it.
        plan: Digest of the plan.
        node: Name of the server among relays; empty when it holds everything itself.
        chain: Relays that it still gets blocks from, directly or not.
    """

    manifest: Manifest | None = None
    block_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)]
    algorithm: Name
    digests: bytes
    root: Hex
    plan: Hex
    node: Hex = ""
    chain: Chain = ()


class Agree(Wire, frozen=True, kw_only=True):
    """Client: it derived the same plan, and chose a transport.

    Attributes:
        plan: Digest of the plan.
        transport: Name of the transport.
    """

    plan: Hex
    transport: Name


class ChannelOffer(Wire, frozen=True, kw_only=True):
    """Server: what the client needs to connect the channel.

    Attributes:
        transport: Name of the transport.
        offer: Belongs to the transport.
    """

    transport: Name
    offer: Annotated[bytes, msgspec.Meta(max_length=65536)]


class Signal(Wire, frozen=True, kw_only=True):
    """Either side: a small message of the transport, while a channel is being set up."""

    data: Annotated[bytes, msgspec.Meta(max_length=65536)]


class Want(Wire, frozen=True, kw_only=True):
    """Client: asks for blocks; each range is half open."""

    ranges: WireRanges


class Grant(Wire, frozen=True, kw_only=True):
    """Server: these blocks come next on the channel, in this order."""

    ranges: WireRanges


class Gone(Wire, frozen=True, kw_only=True):
    """Server: these blocks, asked for, will not come.

    Attributes:
        ranges: The blocks.
        reason: Why.
        sources: Where they may be had instead.
    """

    ranges: WireRanges
    reason: Text
    sources: Sources = ()


class Upstream(Wire, frozen=True, kw_only=True):
    """Server: the relays that it gets blocks from are others now.

    Attributes:
        chain: As in Announce.
    """

    chain: Chain = ()


class Verdict(Wire, frozen=True, kw_only=True):
    """Client: how it ended for it.

    Attributes:
        outcome: ``complete``: it has all blocks; ``partial``: it needs no more from this server; ``probed``.
        blocks: Blocks from this server that were verified.
        nbytes: Their bytes.
    """

    outcome: Outcome
    blocks: Annotated[int, msgspec.Meta(ge=0)] = 0
    nbytes: Annotated[int, msgspec.Meta(ge=0)] = 0


class Refusal(Wire, frozen=True, kw_only=True):
    """Server: no, and why; the session is over.

    Attributes:
        code: Kind of refusal.
        message: The reason, with the values concerned.
        hint: What to do.
        retry_after: Seconds after which another try makes sense, or None.
        sources: Where it may be had instead.
    """

    code: RefusalCode
    message: Text
    hint: Text = ""
    retry_after: Seconds | None = None
    sources: Sources = ()


class Goodbye(Wire, frozen=True, kw_only=True):
    """Either side: the session is over.

    Attributes:
        code: ``done``, or the kind of failure.
        reason: In words.
    """

    code: Ending = "done"
    reason: Text = ""


ClientMessage = Hello | Identify | Agree | Signal | Want | Verdict | Goodbye
"""What a server may receive."""

ServerMessage = (
    Welcome | Waiting | Accepted | Announce | ChannelOffer | Signal | Grant | Gone | Upstream | Refusal | Goodbye
)
"""What a client may receive."""


def wire_text(text: str) -> str:
    """`text` as a Text field takes it: without what UTF-8 cannot say (part of a file name), and cut to length."""
    return text.encode(errors="backslashreplace").decode()[:MAX_TEXT]


def wire_sources(sources: tuple[str, ...]) -> tuple[str, ...]:
    """`sources` as a Sources field takes them: those that are too long, or too many, are left out."""
    return tuple(source for source in sources if len(source) <= MAX_SOURCE)[:MAX_SOURCES]
