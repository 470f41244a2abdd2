"""FINALIZE and the ends: the verdict, the goodbyes, and every way to fail."""

from __future__ import annotations

from collections.abc import Sequence

from netloader.core import messages as m
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context
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
from netloader.errors import NetloaderError, PeerLost, RefusedError, TransferTimeout

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
    """Nothing more is needed from this server: tell it how it went."""
    verdict = m.Verdict(outcome=event.outcome, blocks=event.blocks, nbytes=event.nbytes)
    return [f.Send(verdict), f.SetTimer(ctx.timings().finalize)]


def server_verdict(ctx: Context, event: m.Verdict) -> Sequence[f.Effect]:
    """The client needs nothing more: say goodbye, and free our end while it frees its own."""
    ctx.early_wants.clear()
    ctx.released = True
    note = f.Note(f"the client reports {event.outcome}: {event.blocks} blocks, {event.nbytes} bytes from here")
    return [note, f.Send(m.Goodbye(code="done")), f.CloseChannel(), f.SetTimer(ctx.timings().finalize)]


def client_goodbye(ctx: Context, event: m.Goodbye) -> Sequence[f.Effect]:
    """The server frees its end: free ours."""
    ctx.released = True
    return [f.CloseChannel()]


def closed(ctx: Context, event: ChannelDown) -> Sequence[f.Effect]:
    """All is freed here."""
    return [f.Close()]


def late(ctx: Context, event: Event) -> Sequence[f.Effect]:
    """Something that was under way when the session came to its end."""
    return []


def refused(ctx: Context, event: m.Refusal) -> Sequence[f.Effect]:
    """The server refused."""
    message = event.message or f"the server refused ({event.code}) and did not say why"
    raise RefusedError(event.code, message, hint=event.hint, retry_after=event.retry_after, sources=event.sources)


def left(ctx: Context, event: m.Goodbye) -> Sequence[f.Effect]:
    """The peer ended the session early."""
    raise RefusedError(event.code, f"the peer left: {event.reason or event.code}")


def connection_lost(ctx: Context, event: ConnectionLost) -> Sequence[f.Effect]:
    """The control connection ended."""
    raise PeerLost(f"the control connection ended: {event.reason}")


def lost_late(ctx: Context, event: ConnectionLost) -> Sequence[f.Effect]:
    """The control connection ended after the verdict: as it should, once the server has said goodbye."""
    return late(ctx, event) if ctx.released else connection_lost(ctx, event)


def failed(ctx: Context, event: Failed | WorkFailed) -> Sequence[f.Effect]:
    """Something failed, and the event says what."""
    raise event.error


def timed_out(ctx: Context, event: TimedOut) -> Sequence[f.Effect]:
    """The peer let a deadline pass."""
    last = ctx.story[-1] if ctx.story else "nothing happened"
    allowed = "" if ctx.deadline is None else f" of {ctx.deadline:g} s"
    raise TransferTimeout(
        f"the peer let a deadline{allowed} pass; the last move was {last}",
        hint="is it overloaded, stopped, or cut off?",
    )


def gave_up(ctx: Context, event: Cancelled) -> Sequence[f.Effect]:
    """This side gives up."""
    raise NetloaderError(event.reason or "this side gave up")
