"""The session: one object per control connection that turns events into effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from netloader.core import messages as m
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol import finalize, listen, planning, transfer, validate
from netloader.core.protocol.context import ClientTerms, Context, Refuse, ServerTerms
from netloader.core.protocol.table import FINAL, TABLE, Side, State
from netloader.errors import (
    LocalProtocolError,
    ManifestError,
    NetloaderError,
    PeerLost,
    ProtocolError,
    RefusedError,
    RemoteProtocolError,
    RootMismatch,
    TransferTimeout,
    TransportError,
    VerificationError,
)

__all__ = ["HANDLERS", "ClientTerms", "ServerTerms", "Session"]

Handler = Callable[[Context, Any], Sequence[f.Effect]]
_L, _V, _P, _T, _F = State.LISTEN, State.VALIDATE, State.PLAN, State.TRANSFER, State.FINALIZE

_BOTH: Mapping[type, Handler] = {
    e.ConnectionLost: finalize.connection_lost,
    e.Garbled: finalize.garbled,
    e.TimedOut: finalize.timed_out,
    e.Cancelled: finalize.gave_up,
    e.ChannelFailed: finalize.channel_failed,
    m.Signal: planning.signal_came,
    e.SignalPosted: planning.signal_posted,
    m.Refusal: finalize.refused,
    m.Goodbye: finalize.left,
    e.NotHeld: validate.server_not_held,
}
"""Handlers that do the same in every state and on either side, unless a more special one is below."""

_SPECIAL: Mapping[tuple[Side, State, type], Handler] = {
    (Side.SERVER, _L, e.Connected): listen.server_connected,
    (Side.SERVER, _L, m.Hello): listen.server_hello,
    (Side.SERVER, _V, m.Identify): validate.server_identify,
    (Side.SERVER, _V, e.Held): validate.server_held,
    (Side.SERVER, _V, e.Queued): validate.server_queued,
    (Side.SERVER, _V, e.TurnTaken): validate.server_turn,
    (Side.SERVER, _P, m.Agree): planning.server_agree,
    (Side.SERVER, _P, e.ChannelOffered): planning.server_offered,
    (Side.SERVER, _P, m.Want): transfer.server_early_want,
    (Side.SERVER, _P, e.ChannelOpened): transfer.server_open,
    (Side.SERVER, _P, m.Verdict): finalize.server_verdict,
    (Side.SERVER, _T, m.Want): transfer.server_want,
    (Side.SERVER, _T, e.BlocksReady): transfer.server_ready,
    (Side.SERVER, _T, e.BlocksGone): transfer.server_gone,
    (Side.SERVER, _T, e.BlocksSent): transfer.server_sent,
    (Side.SERVER, _P, e.UpstreamChanged): planning.server_upstream,
    (Side.SERVER, _T, e.UpstreamChanged): planning.server_upstream,
    (Side.SERVER, _T, m.Verdict): finalize.server_verdict,
    (Side.SERVER, _F, m.Goodbye): finalize.late,
    (Side.SERVER, _F, e.ConnectionLost): finalize.lost_late,
    (Side.SERVER, _F, e.ChannelDown): finalize.closed,
    (Side.CLIENT, _L, e.Connected): listen.client_connected,
    (Side.CLIENT, _L, m.Welcome): listen.client_welcome,
    (Side.CLIENT, _V, m.Waiting): validate.client_waiting,
    (Side.CLIENT, _V, m.Accepted): validate.client_accepted,
    (Side.CLIENT, _P, m.Announce): planning.client_announce,
    (Side.CLIENT, _P, e.Examined): planning.client_examined,
    (Side.CLIENT, _P, e.Pinned): planning.client_pinned,
    (Side.CLIENT, _P, e.PinRefused): planning.client_pin_refused,
    (Side.CLIENT, _P, m.ChannelOffer): planning.client_offer,
    (Side.CLIENT, _P, e.ChannelOpened): planning.client_open,
    (Side.CLIENT, _P, e.Finished): finalize.client_finished,
    (Side.CLIENT, _T, e.BlocksWanted): transfer.client_wanted,
    (Side.CLIENT, _T, m.Grant): transfer.client_grant,
    (Side.CLIENT, _T, m.Gone): transfer.client_gone,
    (Side.CLIENT, _P, m.Upstream): planning.client_upstream,
    (Side.CLIENT, _T, m.Upstream): planning.client_upstream,
    (Side.CLIENT, _T, e.BlocksReceived): transfer.client_received,
    (Side.CLIENT, _T, e.BlocksRejected): transfer.client_rejected,
    (Side.CLIENT, _T, e.Finished): finalize.client_finished,
    (Side.CLIENT, _F, m.Goodbye): finalize.client_goodbye,
    (Side.CLIENT, _F, e.ConnectionLost): finalize.lost_late,
    (Side.CLIENT, _F, e.ChannelDown): finalize.closed,
}

_STILL_COUNTS = (e.ConnectionLost, e.Garbled, e.TimedOut, e.Cancelled, m.Refusal, m.Goodbye)
"""What still matters in FINALIZE; other rows without a special handler there only say what may come late."""


def _handler(side: Side, state: State, kind: type) -> Handler:
    special = _SPECIAL.get((side, state, kind))
    if special is not None:
        return special
    if state is _F and kind not in _STILL_COUNTS:
        return finalize.late
    return _BOTH[kind]


HANDLERS: Mapping[tuple[Side, State, type], Handler] = {row: _handler(*row) for row in TABLE}
"""One handler for each row of the table; building it fails when a row has none."""

_CODES: tuple[tuple[type[NetloaderError], m.RefusalCode], ...] = (
    (RootMismatch, "root"),
    (ManifestError, "manifest"),
    (VerificationError, "protocol"),
    (TransferTimeout, "timeout"),
    (TransportError, "transport"),
    (LocalProtocolError, "internal"),
    (ProtocolError, "protocol"),
)

_REFUSALS: Mapping[str, m.RefusalCode] = {code: code for code in get_args(m.RefusalCode)}

_RELEASES = "run the same netloader release on both sides; if they are alike, one of them is faulty"
_HINTS: tuple[tuple[type[NetloaderError], str], ...] = (
    (PeerLost, "see the log at the other end; is the process there still running?"),
    (RefusedError, "see the log at the other end"),
    (LocalProtocolError, "this is a fault in netloader; please report it with the last moves of the session"),
    (ProtocolError, _RELEASES),
    (TransportError, "see the log at both ends; another transport may work"),
    (NetloaderError, "see the log on this side"),
)
"""What to do about errors that bring no better advice with them."""


def _code(error: NetloaderError) -> m.RefusalCode:
    if isinstance(error, RefusedError):
        return _REFUSALS.get(error.code, "internal")
    return next((code for kind, code in _CODES if isinstance(error, kind)), "internal")


class Session:
    """One control conversation.

    Plain and synchronous: :meth:`handle` takes one event and returns what is to be done, in order. The driver carries
    that out and feeds each result back as one event.

    Args:
        side: Which end this is.
        client: Terms of a client; ignored on a server.
        server: Terms of a server; ignored on a client.
    """

    def __init__(self, side: Side, *, client: ClientTerms | None = None, server: ServerTerms | None = None) -> None:
        self._state = State.LISTEN
        self._ctx = Context(side, client or ClientTerms(), server or ServerTerms())

    @property
    def state(self) -> State:
        """Where the session is."""
        return self._state

    @property
    def side(self) -> Side:
        """Which end this is."""
        return self._ctx.side

    @property
    def error(self) -> NetloaderError | None:
        """Why the session failed; None unless it did."""
        return self._ctx.error

    @property
    def announcement(self) -> e.Announcement | None:
        """What the server holds, once known."""
        return self._ctx.announcement

    @property
    def transport(self) -> str:
        """Name of the transport; empty before one was chosen."""
        return self._ctx.transport

    @property
    def peer_software(self) -> str:
        """Name and version at the other end; empty before the greeting."""
        return self._ctx.peer_software

    @property
    def peer_transports(self) -> tuple[str, ...]:
        """Names of the transports that the peer has, preferred first."""
        return tuple(ability.name for ability in self._ctx.peer_abilities)

    @property
    def story(self) -> tuple[str, ...]:
        """The last moves, oldest first."""
        return tuple(self._ctx.story)

    @property
    def identify(self) -> m.Identify | None:
        """What the client said that it wants; None before it did, and on a client."""
        return self._ctx.identify

    @property
    def probing(self) -> bool:
        """Whether the client only looks."""
        return self._ctx.probing

    def __repr__(self) -> str:
        return f"<Session {self.side.value} {self._state.name}>"

    def handle(self, event: e.Event) -> tuple[f.Effect, ...]:
        """Take one event.

        Args:
            event: Something that happened, or a message from the peer.

        Returns:
            What is to be done, in order. Empty once the session has ended.

        Never raises for anything a peer can cause: such a session ends in FAILED, with :attr:`error` set.
        """
        if self._state in FINAL:
            return ()
        before, row = self._state, (self._ctx.side, self._state, type(event))
        after = TABLE.get(row)
        try:
            if after is None:
                raise self._illegal(event)
            effects = tuple(HANDLERS[row](self._ctx, event))
        except NetloaderError as error:
            self._state = State.FAILED
            self._tell(before, event)
            return self._fail(error, event)
        self._state = after
        self._tell(before, event)
        if after is State.DONE:
            self._ctx.forget_blocks()
        for effect in effects:
            if isinstance(effect, f.SetTimer):
                self._ctx.deadline = effect.seconds
        return effects

    def check_invariants(self) -> None:
        """Check what must hold between any two events.

        Raises:
            LocalProtocolError: Something does not hold: a bug in this package.
        """
        ctx, state = self._ctx, self._state
        broken = [
            (state is State.FAILED) != (ctx.error is not None) and "an error is kept exactly when FAILED",
            state is _T and ctx.announcement is None and "a plan is known in TRANSFER",
            state is _T and not ctx.transport and "a transport is chosen before TRANSFER",
            (ctx.open_blocks or ctx.granted) and state not in (_P, _T, _F) and "blocks are asked for in TRANSFER only",
            ctx.early_wants and state is not _P and "early requests are answered when the channel opens",
            self.side is Side.SERVER and not ctx.granted <= ctx.open_blocks and "only what was asked for is granted",
            self.side is Side.CLIENT and ctx.granted & ctx.open_blocks and "a granted block is owed no grant",
        ]
        for text in broken:
            if text:
                raise LocalProtocolError(f"{self!r}: {text}")

    def _illegal(self, event: e.Event) -> NetloaderError:
        text = f"{type(event).__name__} is not legal in {self._state.name}"
        if isinstance(event, m.Wire):
            return RemoteProtocolError(f"the peer broke the rules: {text}")
        return LocalProtocolError(text)

    def _tell(self, before: State, event: e.Event) -> None:
        self._ctx.story.append(f"{before.name} + {type(event).__name__} -> {self._state.name}")

    def _fail(self, error: NetloaderError, event: e.Event) -> tuple[f.Effect, ...]:
        error.story = tuple(self._ctx.story)
        if not error.hint:
            error.hint = next(hint for kind, hint in _HINTS if isinstance(error, kind))
        self._ctx.error = error
        self._ctx.forget_blocks()
        if self._ctx.released or isinstance(event, m.Refusal | m.Goodbye | e.ConnectionLost):
            return (f.Close(),)
        code, message = _code(error), m.wire_text(error.message)
        if self.side is Side.SERVER and isinstance(error, Refuse):
            refusal = m.Refusal(
                code=code,
                message=message,
                hint=m.wire_text(error.hint),
                retry_after=None if error.retry_after is None else min(max(error.retry_after, 0.0), m.MAX_SECONDS),
                sources=m.wire_sources(error.sources),
            )
            return (f.Send(refusal), f.Close())
        ending = event.code if isinstance(event, e.Cancelled) and event.error is None else code
        return (f.Send(m.Goodbye(code=ending, reason=message)), f.Close())
