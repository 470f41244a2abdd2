"""PLAN: what is to be pulled becomes exact, both sides derive the same blocks, and the channel is opened."""

from __future__ import annotations

from collections.abc import Sequence

from netloader.core import messages as m
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context, Refuse
from netloader.core.protocol.events import (
    ChannelOffered,
    ChannelOpened,
    Examined,
    Pinned,
    SignalPosted,
    UpstreamChanged,
)
from netloader.core.protocol.transport_choice import choose_transport, passed_over
from netloader.errors import LocalProtocolError, RefusedError, RemoteProtocolError

__all__ = [
    "client_announce",
    "client_examined",
    "client_offer",
    "client_open",
    "client_pinned",
    "client_upstream",
    "server_agree",
    "server_offered",
    "server_upstream",
    "signal_came",
    "signal_posted",
]


def _check_chain(ctx: Context, node: str, chain: tuple[str, ...]) -> f.NoteChain:
    """See that a relay leads to a seed, and not back to us.

    Raises:
        RefusedError: It leads back here, or is too long.
    """
    terms = ctx.client
    if terms.node and terms.node in (node, *chain):
        raise RefusedError("relay", "this relay gets its blocks from us", hint="another source is asked instead")
    most = terms.options.max_hops
    if len(chain) + bool(node) > most:
        text = f"this relay is {len(chain) + 1} relays away from its seed, at most {most} are accepted"
        raise RefusedError("relay", text, hint="another source is asked instead")
    return f.NoteChain(node, chain)


def client_upstream(ctx: Context, event: m.Upstream) -> Sequence[f.Effect]:
    """The server gets its blocks from elsewhere now."""
    ctx.peer_chain = event.chain
    return [_check_chain(ctx, ctx.peer_node, event.chain)]


def server_upstream(ctx: Context, event: UpstreamChanged) -> Sequence[f.Effect]:
    """We get our blocks from elsewhere now: whoever pulls from us has to know, lest we wait for each other."""
    return [f.Send(m.Upstream(chain=event.chain))]


def client_announce(ctx: Context, event: m.Announce) -> Sequence[f.Effect]:
    """The server said what it holds: have all of it checked."""
    if ctx.announced:
        raise RemoteProtocolError("the server announced twice what it holds")
    ctx.announced = True
    ctx.peer_node, ctx.peer_chain = event.node, event.chain
    return [_check_chain(ctx, event.node, event.chain), f.Examine(event, ctx.client, ctx.peer_identity, ctx.probing)]


def client_examined(ctx: Context, event: Examined) -> Sequence[f.Effect]:
    """It agrees with what this side is about to fill: have it pinned."""
    if ctx.announcement is not None or not ctx.announced:
        raise LocalProtocolError("an announcement was examined twice, or never made")
    ctx.announcement = event.announcement
    return [f.Pin(event.announcement)]


def client_pinned(ctx: Context, event: Pinned) -> Sequence[f.Effect]:
    """The ledger agreed: choose how the bytes are to come."""
    if ctx.transport:
        raise LocalProtocolError("the session was told twice that root and plan are pinned")
    if ctx.probing:  # Finished follows: there is nothing to move
        return []
    known = ctx.known()
    ours, theirs = choose_transport(ctx.client.abilities, ctx.peer_abilities)
    ctx.transport = ours.name
    others = passed_over(ours.name, ctx.client.abilities, ctx.peer_abilities, ctx.client.options.unavailable)
    note = f.Note(f"transport {ours.name}" + (f" (not {'; '.join(others)})" if others else ""))
    return [note, f.Send(m.Agree(plan=known.plan.digest, transport=theirs.name))]


def _chosen(ctx: Context) -> None:
    """See that a transport was chosen: an event of a channel needs one."""
    if not ctx.transport:
        raise LocalProtocolError("a channel had news before a transport was chosen")


def server_agree(ctx: Context, event: m.Agree) -> Sequence[f.Effect]:
    """The client derived its plan: if it is ours, offer a channel."""
    if ctx.transport:
        raise RemoteProtocolError("the client agreed twice")
    if ctx.probing:  # it took no turn, and its identity was not held against it
        raise RemoteProtocolError("the client said that it only looks, and then asked for a channel")
    if event.plan != ctx.known().plan.digest:
        raise Refuse(
            "plan",
            f"both sides derived different blocks (plan {ctx.known().plan.digest[:16]} here, {event.plan[:16]} there)",
            hint="run the same netloader release on both sides",
        )
    theirs = next((a for a in ctx.peer_abilities if a.name == event.transport), None)
    if theirs is None or all(a.name != event.transport for a in ctx.server.abilities):
        raise Refuse("transport", f"the client chose transport {event.transport!r}, which not both sides listed")
    ctx.transport = event.transport
    return [f.AcceptChannel(event.transport, dict(theirs.facts))]


def server_offered(ctx: Context, event: ChannelOffered) -> Sequence[f.Effect]:
    """The transport is ready for the client."""
    _chosen(ctx)
    return [f.Send(m.ChannelOffer(transport=ctx.transport, offer=event.offer))]


def client_offer(ctx: Context, event: m.ChannelOffer) -> Sequence[f.Effect]:
    """The server's transport is ready for us."""
    if not ctx.transport or event.transport != ctx.transport:
        raise RemoteProtocolError(f"the server offers transport {event.transport!r}, chosen was {ctx.transport!r}")
    if ctx.offered:
        raise RemoteProtocolError("the server offered a channel twice")
    ctx.offered = True
    theirs = next(a for a in ctx.peer_abilities if a.name == ctx.transport)
    return [f.ConnectChannel(event.transport, event.offer, dict(theirs.facts))]


def client_open(ctx: Context, event: ChannelOpened) -> Sequence[f.Effect]:
    """The channel is open: get to work."""
    _chosen(ctx)
    return [f.SetTimer(None), f.AskForWork()]


def signal_came(ctx: Context, event: m.Signal) -> Sequence[f.Effect]:
    """The other end of the transport has something to say."""
    if not ctx.transport:
        raise RemoteProtocolError("the peer sent a transport's signal before a transport was chosen")
    return [f.DeliverSignal(event.data)]


def signal_posted(ctx: Context, event: SignalPosted) -> Sequence[f.Effect]:
    """Our end of the transport has something to say."""
    _chosen(ctx)
    return [f.Send(m.Signal(data=event.data))]
