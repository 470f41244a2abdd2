"""FINALIZE and the ends of a session: the verdict, the goodbyes, and every kind of failure."""

from __future__ import annotations

from collections.abc import Sequence

from netloader.core import messages as m
from netloader.core.keys import NotAuthentic
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context, Refuse
from netloader.core.protocol.events import (
    Cancelled,
    ChannelDown,
    ConnectionLost,
    Event,
    Failed,
    Finished,
    TimedOut,
    WorkFailed,
)
from netloader.core.protocol.listen import NO_PROOF_OF_CLIENT, SAME_TOKEN
from netloader.core.protocol.states import Side
from netloader.errors import NetloaderError, PeerLost, RefusedError, RemoteProtocolError, TransferTimeout

__all__ = [
    "client_finished",
    "client_goodbye",
    "closed",
    "connection_lost",
    "failed",
    "gave_up",
    "late",
    "left",
    "lost_late",
    "refused",
    "server_verdict",
    "timed_out",
]


def client_finished(ctx: Context, event: Finished) -> Sequence[f.Effect]:
    """Nothing more is needed from this server: send it the result."""
    verdict = m.Verdict(outcome=event.outcome, blocks=event.blocks, nbytes=event.nbytes)
    return [f.Send(verdict), f.SetTimer(ctx.timings().finalize)]


def server_verdict(ctx: Context, event: m.Verdict) -> Sequence[f.Effect]:
    """The client needs nothing more: say goodbye, and close this end of the channel while it closes its own."""
    ctx.early_wants.clear()
    ctx.released = True
    note = f.Note(f"the client reports {event.outcome}: {event.blocks} blocks, {event.nbytes} bytes from here")
    return [note, f.Send(m.Goodbye(code="done")), f.CloseChannel(), f.SetTimer(ctx.timings().finalize)]


def client_goodbye(ctx: Context, event: m.Goodbye) -> Sequence[f.Effect]:
    """The server closes its end of the channel: close this one."""
    ctx.released = True
    return [f.CloseChannel()]


def closed(ctx: Context, event: ChannelDown) -> Sequence[f.Effect]:
    """The channel is closed at this end."""
    return [f.Close()]


def late(ctx: Context, event: Event) -> Sequence[f.Effect]:
    """An event that was in flight when the session ended: ignore it."""
    return []


def _unproven() -> PeerLost:
    """The error for a peer that ends the session before its proof: what it says may come from anybody."""
    return PeerLost(
        "the peer ended the session before it proved that it knows the token",
        hint="see its log; is it up, is it of the same netloader release, and does it have the same token?",
    )


def refused(ctx: Context, event: m.Refusal) -> Sequence[f.Effect]:
    """The server refused."""
    if ctx.unproven:
        raise _unproven()
    message = event.message or f"the server refused ({event.code}) and gave no reason"
    raise RefusedError(event.code, message, hint=event.hint, retry_after=event.retry_after, sources=event.sources)


def left(ctx: Context, event: m.Goodbye) -> Sequence[f.Effect]:
    """The peer ended the session early."""
    if ctx.unproven:
        raise _unproven()
    raise RefusedError(event.code, f"the peer ended the session: {event.reason or event.code}")


def connection_lost(ctx: Context, event: ConnectionLost) -> Sequence[f.Effect]:
    """The control connection ended."""
    raise PeerLost(f"the control connection ended: {event.reason}")


def lost_late(ctx: Context, event: ConnectionLost) -> Sequence[f.Effect]:
    """The control connection ended after the verdict. This is no error once the server has said goodbye."""
    return late(ctx, event) if ctx.released else connection_lost(ctx, event)


def failed(ctx: Context, event: Failed | WorkFailed) -> Sequence[f.Effect]:
    """Raise the error of the event."""
    error = event.error
    if isinstance(error, NotAuthentic) and ctx.side is Side.SERVER and ctx.identify is None:
        raise Refuse("auth", NO_PROOF_OF_CLIENT, hint=SAME_TOKEN)
    if isinstance(error, RemoteProtocolError) and ctx.unproven:  # its text may quote what the peer sent
        raise RemoteProtocolError(
            "the peer sent no valid greeting, and did not prove that it knows the token",
            hint="is this a netloader address?",
        )
    raise error


def timed_out(ctx: Context, event: TimedOut) -> Sequence[f.Effect]:
    """The peer did not answer within the deadline."""
    last = ctx.story[-1] if ctx.story else "none"
    allowed = "" if ctx.deadline is None else f" within {ctx.deadline:g} s"
    raise TransferTimeout(
        f"the peer did not answer{allowed}; the last transition was {last}",
        hint="check whether the peer is overloaded, stopped, or unreachable",
    )


def gave_up(ctx: Context, event: Cancelled) -> Sequence[f.Effect]:
    """This side ends the session."""
    raise NetloaderError(event.reason or "this side ended the session")
