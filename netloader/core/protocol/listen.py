"""LISTEN: both sides exchange versions and transports. With a token, both derive the keys of the session from it.

The server proves in Welcome that it knows the token. The client proves it by its next frame, because with a token each
frame after Welcome is authenticated.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import msgspec

from netloader.core import messages as m
from netloader.core.keys import NO_PROOF, SessionKeys, session_keys, without_proof
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context, Refuse
from netloader.core.protocol.events import Connected
from netloader.errors import LocalProtocolError, RefusedError

__all__ = [
    "AUTHENTICATES",
    "NO_PROOF_OF_CLIENT",
    "SAME_TOKEN",
    "client_connected",
    "client_welcome",
    "server_connected",
    "server_hello",
]

AUTHENTICATES = 2
"""Oldest version that is spoken with a token: in version 1, whoever relays the proofs can act in the name of a side."""

NO_PROOF_OF_CLIENT = "the client could not prove that it knows the token"
SAME_TOKEN = "configure the same token on both sides"  # noqa: S105 - a text
_SAME_RELEASE = "run the same netloader release on both sides"
_UPGRADE = "upgrade the {} first, or run both without a token on a network that you trust"


def _connected(ctx: Context) -> None:
    """Check that this side's nonce is set: keys without it could be those of an earlier session."""
    if not ctx.nonce:
        raise LocalProtocolError("a message came before the event Connected")


def _take_greeting(ctx: Context) -> bytes:
    """The peer's greeting as it came. Encoding its message anew would lose the fields that are unknown here."""
    body, ctx.peer_greeting = ctx.peer_greeting, b""
    if not body:
        raise LocalProtocolError("the bytes of the peer's greeting were not recorded")
    return body


def server_connected(ctx: Context, event: Connected) -> Sequence[f.Effect]:
    """A client connected: wait for its Hello."""
    ctx.connect(event.nonce)
    return [f.SetTimer(ctx.timings().hello)]


def client_connected(ctx: Context, event: Connected) -> Sequence[f.Effect]:
    """Connected: send Hello."""
    ctx.connect(event.nonce)
    hello = m.Hello(
        protocol=m.PROTOCOL,
        oldest=m.OLDEST,  # also with a token, so that an older server says its version instead of refusing in a text
        nonce=event.nonce,
        abilities=ctx.client.abilities,
        software=ctx.client.options.software,
        proves=ctx.token is not None,
    )
    ctx.greeting = m.wire_body(hello)
    return [f.Send(hello), f.SetTimer(ctx.timings().hello)]


def server_hello(ctx: Context, event: m.Hello) -> Sequence[f.Effect]:
    """A client said hello: answer, with a proof when a token is configured."""
    _connected(ctx)
    version, token = min(m.PROTOCOL, event.protocol), ctx.token
    if version < max(m.OLDEST, event.oldest):
        raise Refuse(
            "version",
            f"this server speaks protocol {m.OLDEST} to {m.PROTOCOL}, "
            f"the client speaks {event.oldest} to {event.protocol}",
            hint=_SAME_RELEASE,
        )
    if token is not None and version < AUTHENTICATES:
        raise Refuse(
            "version",
            f"this server has a token, which needs protocol {AUTHENTICATES}; "
            f"the client speaks only protocol {event.protocol}",
            hint=_UPGRADE.format("client"),
        )
    if token is not None and not event.proves:
        raise Refuse("auth", "this server has a token, and the client has none", hint=SAME_TOKEN)
    ctx.protocol = version
    ctx.peer_nonce, ctx.peer_abilities, ctx.peer_software = event.nonce, event.abilities, event.software
    welcome = m.Welcome(
        protocol=version,
        nonce=ctx.nonce,
        proof=b"" if token is None else NO_PROOF,
        abilities=ctx.server.abilities,
        software=ctx.server.options.software,
    )
    if token is None:
        return [f.Send(welcome), f.SetTimer(ctx.timings().validate)]
    ctx.keys = session_keys(token, _take_greeting(ctx), m.wire_body(welcome))
    return [
        f.Send(msgspec.structs.replace(welcome, proof=ctx.keys.proof)),
        f.Authenticate(ctx.keys.server, ctx.keys.client),
        f.SetTimer(ctx.timings().validate),
    ]


def _checked_keys(ctx: Context, token: bytes, event: m.Welcome) -> SessionKeys:
    """The keys of the session, derived and checked by the server's proof.

    Raises:
        RefusedError: The server has no token or another one, or speaks no version that authenticates.
    """
    if not event.proof:
        raise RefusedError("auth", "the server has no token, and this client has one", hint=SAME_TOKEN)
    if event.protocol < AUTHENTICATES:
        raise RefusedError(
            "version",
            f"this client has a token, which needs protocol {AUTHENTICATES}; "
            f"the server speaks only protocol {event.protocol}",
            hint=_UPGRADE.format("server"),
        )
    transcript = without_proof(_take_greeting(ctx), event.proof)
    keys = None if transcript is None else session_keys(token, ctx.greeting, transcript)
    if keys is None or not hmac.compare_digest(event.proof, keys.proof):
        raise RefusedError("auth", "the server could not prove that it knows the token", hint=SAME_TOKEN)
    return keys


def client_welcome(ctx: Context, event: m.Welcome) -> Sequence[f.Effect]:
    """The server answered: check its proof before sending anything about the model, then send Identify."""
    terms, token = ctx.client, ctx.token
    _connected(ctx)
    if not m.OLDEST <= event.protocol <= m.PROTOCOL:
        raise RefusedError(
            "version",
            f"the server speaks protocol {event.protocol}, this client {m.OLDEST} to {m.PROTOCOL}",
            hint=_SAME_RELEASE,
        )
    effects: list[f.Effect] = []
    if token is not None:
        ctx.keys = _checked_keys(ctx, token, event)
        effects.append(f.Authenticate(ctx.keys.client, ctx.keys.server))
    elif event.proof:
        raise RefusedError("auth", "the server has a token, and this client has none", hint=SAME_TOKEN)
    ctx.protocol = event.protocol
    ctx.peer_nonce, ctx.peer_abilities, ctx.peer_software = event.nonce, event.abilities, event.software
    identify = m.Identify(
        identity=terms.identity,
        role=terms.role,
        layouts=terms.options.layouts,
        manifest=terms.manifest_digest,
        root=terms.root,
        probe=terms.probe,
        node=terms.node,
        relay=terms.relay,
        follow=terms.options.follow and not terms.probe,
        avoid=terms.avoid,
        others=terms.others,
    )
    ctx.probing = terms.probe
    return [*effects, f.Send(identify), f.SetTimer(ctx.timings().validate)]
