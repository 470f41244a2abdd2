"""LISTEN: both sides exchange versions and transports. With a token, both prove that they know it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from netloader.core import messages as m
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context, Refuse
from netloader.core.protocol.events import Connected
from netloader.errors import LocalProtocolError, RefusedError

__all__ = ["client_connected", "client_welcome", "prove", "server_connected", "server_hello"]


def prove(token: bytes, side: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """HMAC-SHA256 that proves knowledge of `token`. It includes the side, so that it can't be reflected."""
    text = b"netloader/" + side.encode() + b"/" + client_nonce + server_nonce
    return hmac.new(token, text, hashlib.sha256).digest()


def _connected(ctx: Context) -> None:
    """Check that this side's nonce is set: a proof without it could be replayed."""
    if not ctx.nonce:
        raise LocalProtocolError("a message came before the event Connected")


def server_connected(ctx: Context, event: Connected) -> Sequence[f.Effect]:
    """A client connected: wait for its Hello."""
    ctx.connect(event.nonce)
    return [f.SetTimer(ctx.timings().hello)]


def client_connected(ctx: Context, event: Connected) -> Sequence[f.Effect]:
    """Connected: send Hello."""
    ctx.connect(event.nonce)
    hello = m.Hello(
        protocol=m.PROTOCOL,
        oldest=m.OLDEST,
        nonce=event.nonce,
        abilities=ctx.client.abilities,
        software=ctx.client.options.software,
    )
    return [f.Send(hello), f.SetTimer(ctx.timings().hello)]


def server_hello(ctx: Context, event: m.Hello) -> Sequence[f.Effect]:
    """A client said hello: answer, with a proof when a token is configured."""
    _connected(ctx)
    ctx.protocol = min(m.PROTOCOL, event.protocol)
    if ctx.protocol < max(m.OLDEST, event.oldest):
        raise Refuse(
            "version",
            f"this server speaks protocol {m.OLDEST} to {m.PROTOCOL}, "
            f"the client speaks {event.oldest} to {event.protocol}",
            hint="run the same netloader release on both sides",
        )
    ctx.peer_nonce, ctx.peer_abilities, ctx.peer_software = event.nonce, event.abilities, event.software
    token = ctx.server.options.token
    proof = b"" if token is None else prove(token, "server", event.nonce, ctx.nonce)
    welcome = m.Welcome(
        protocol=ctx.protocol,
        nonce=ctx.nonce,
        proof=proof,
        abilities=ctx.server.abilities,
        software=ctx.server.options.software,
    )
    return [f.Send(welcome), f.SetTimer(ctx.timings().validate)]


def client_welcome(ctx: Context, event: m.Welcome) -> Sequence[f.Effect]:
    """The server answered: check its proof before sending anything about the model, then send Identify."""
    terms = ctx.client
    _connected(ctx)
    if not m.OLDEST <= event.protocol <= m.PROTOCOL:
        raise RefusedError(
            "version",
            f"the server speaks protocol {event.protocol}, this client {m.OLDEST} to {m.PROTOCOL}",
            hint="run the same netloader release on both sides",
        )
    ctx.protocol = event.protocol
    ctx.peer_nonce, ctx.peer_abilities, ctx.peer_software = event.nonce, event.abilities, event.software
    proof, token = b"", terms.options.token
    if token is not None:
        if not hmac.compare_digest(event.proof, prove(token, "server", ctx.nonce, event.nonce)):
            raise RefusedError(
                "auth",
                "the server could not prove that it knows the token" if event.proof else "the server has no token",
                hint="configure the same token on both sides",
            )
        proof = prove(token, "client", ctx.nonce, event.nonce)
    identify = m.Identify(
        identity=terms.identity,
        role=terms.role,
        layouts=terms.options.layouts,
        proof=proof,
        manifest=terms.manifest_digest,
        root=terms.root,
        probe=terms.probe,
        node=terms.node,
        relay=terms.relay,
        follow=terms.options.follow and not terms.probe,
        avoid=terms.avoid,
    )
    ctx.probing = terms.probe
    return [f.Send(identify), f.SetTimer(ctx.timings().validate)]
