"""PLAN: the client checks what the server announced, both sides derive the same blocks, and the channel is opened."""

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
from netloader.core.protocol.transport_choice import choose_transport, why_not_chosen
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
    """Check a relay's chain of sources.

    Raises:
        RefusedError: This client is part of the chain, or the chain is too long.
    """
    terms = ctx.client
    if ctx.peer_partial:  # it is asked only for blocks that it has: nobody waits for what it waits for
        chain = ()
    if terms.node and terms.node in (node, *chain):
        raise RefusedError("relay", "this relay gets its blocks from us", hint="another source is asked instead")
    most = terms.options.max_hops
    if len(chain) + bool(node) > most:
        text = f"this relay is {len(chain) + 1} relays away from its seed, at most {most} are accepted"
        raise RefusedError("relay", text, hint="another source is asked instead")
    return f.NoteChain("" if ctx.peer_partial and not ctx.probing else node, chain)


def client_upstream(ctx: Context, event: m.Upstream) -> Sequence[f.Effect]:
    """The server pulls its blocks from other relays now: check the chain again."""
    ctx.peer_chain = event.chain
    return [_check_chain(ctx, ctx.peer_node, event.chain)]


def server_upstream(ctx: Context, event: UpstreamChanged) -> Sequence[f.Effect]:
    """This server pulls its blocks from other relays now: tell the client, so that no cycle of relays can deadlock."""
    return [f.Send(m.Upstream(chain=event.chain))]


def client_announce(ctx: Context, event: m.Announce) -> Sequence[f.Effect]:
    """The server announced what it holds: have the announcement checked."""
    if ctx.announced:
        raise RemoteProtocolError("the server sent Announce twice")
    ctx.announced = True
    ctx.peer_node, ctx.peer_chain = event.node, event.chain
    ctx.peer_partial, ctx.peer_shared = event.partial, event.shared
    return [_check_chain(ctx, event.node, event.chain), f.Examine(event, ctx.client, ctx.peer_identity, ctx.probing)]


def client_examined(ctx: Context, event: Examined) -> Sequence[f.Effect]:
    """The announcement passed all checks: have root and plan pinned."""
    if ctx.announcement is not None or not ctx.announced:
        raise LocalProtocolError("Examined came twice, or before Announce")
    ctx.announcement = event.announcement
    return [f.Pin(event.announcement, ctx.peer_partial, ctx.peer_shared)]


def client_pinned(ctx: Context, event: Pinned) -> Sequence[f.Effect]:
    """Root and plan are pinned: choose a transport."""
    if ctx.transport:
        raise LocalProtocolError("Pinned came twice")
    if ctx.probing:  # Finished follows, because a probe pulls nothing
        return []
    known = ctx.known()
    ours, theirs = choose_transport(ctx.client.abilities, ctx.peer_abilities)
    ctx.transport = ours.name
    others = why_not_chosen(ours.name, ctx.client.abilities, ctx.peer_abilities, ctx.client.options.unavailable)
    note = f.Note(f"transport {ours.name}" + (f" (not {'; '.join(others)})" if others else ""))
    return [note, f.Send(m.Agree(plan=known.plan.digest, transport=theirs.name))]


def _chosen(ctx: Context) -> None:
    """Check that a transport was chosen, before an event of its channel."""
    if not ctx.transport:
        raise LocalProtocolError("an event of a channel came before a transport was chosen")


def server_agree(ctx: Context, event: m.Agree) -> Sequence[f.Effect]:
    """The client derived its plan: if it is the same as the server's, offer a channel."""
    if ctx.transport:
        raise RemoteProtocolError("the client sent Agree twice")
    if ctx.probing:  # it took no turn, and its identity was not checked
        raise RemoteProtocolError("the client asked for a channel in a probe")
    if event.plan != ctx.known().plan.digest:
        raise Refuse(
            "plan",
            f"both sides derived different blocks (plan {ctx.known().plan.digest[:16]} here, {event.plan[:16]} there)",
            hint="run the same netloader release on both sides",
        )
    theirs = next((a for a in ctx.peer_abilities if a.name == event.transport), None)
    if theirs is None or all(a.name != event.transport for a in ctx.server.abilities):
        raise Refuse("transport", f"the client chose transport {event.transport!r}, which is not listed by both sides")
    ctx.transport = event.transport
    return [f.AcceptChannel(event.transport, dict(theirs.facts))]


def server_offered(ctx: Context, event: ChannelOffered) -> Sequence[f.Effect]:
    """The transport made an offer: send it to the client."""
    _chosen(ctx)
    return [f.Send(m.ChannelOffer(transport=ctx.transport, offer=event.offer))]


def client_offer(ctx: Context, event: m.ChannelOffer) -> Sequence[f.Effect]:
    """The server sent its transport's offer: connect the channel."""
    if not ctx.transport or event.transport != ctx.transport:
        raise RemoteProtocolError(
            f"the server offers transport {event.transport!r}, this client chose {ctx.transport!r}"
        )
    if ctx.offered:
        raise RemoteProtocolError("the server sent ChannelOffer twice")
    ctx.offered = True
    theirs = next(a for a in ctx.peer_abilities if a.name == ctx.transport)
    return [f.ConnectChannel(event.transport, event.offer, dict(theirs.facts))]


def client_open(ctx: Context, event: ChannelOpened) -> Sequence[f.Effect]:
    """The channel is open: request blocks."""
    _chosen(ctx)
    return [f.SetTimer(None), f.AskForWork()]


def signal_came(ctx: Context, event: m.Signal) -> Sequence[f.Effect]:
    """The peer's transport sent a signal: hand it to this side's transport."""
    if not ctx.transport:
        raise RemoteProtocolError("the peer sent a transport's signal before a transport was chosen")
    return [f.DeliverSignal(event.data)]


def signal_posted(ctx: Context, event: SignalPosted) -> Sequence[f.Effect]:
    """This side's transport wants to send a signal."""
    _chosen(ctx)
    return [f.Send(m.Signal(data=event.data))]
