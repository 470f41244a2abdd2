"""The session: one object for each control connection, which takes events and returns effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from netloader.core import messages as m
from netloader.core.options import Timings
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.context import ClientTerms, Context, Refuse, ServerTerms
from netloader.core.protocol.states import FINAL, Side, State
from netloader.core.protocol.table import TABLE
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

__all__ = ["ClientTerms", "ServerTerms", "Session"]

_P, _T, _F = State.PLAN, State.TRANSFER, State.FINALIZE

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

_RELEASES = "run the same netloader release on both sides; if both are the same, please report this as a bug"
_HINTS: tuple[tuple[type[NetloaderError], str], ...] = (
    (PeerLost, "see the log at the other end, and check that the process there is still running"),
    (RefusedError, "see the log at the other end"),
    (LocalProtocolError, "this is a bug in netloader; please report it with the last transitions of the session"),
    (ProtocolError, _RELEASES),
    (TransportError, "see the log at both ends; another transport may work"),
    (NetloaderError, "see the log on this side"),
)
"""Hints for errors that have none of their own."""


def _code(error: NetloaderError) -> m.RefusalCode:
    if isinstance(error, RefusedError):
        return _REFUSALS.get(error.code, "internal")
    return next((code for kind, code in _CODES if isinstance(error, kind)), "internal")


class Session:
    """The state machine of one control connection.

    It is synchronous: :meth:`handle` takes one event and returns the effects, in order. The driver carries them out,
    and feeds each result back as an event.

    Args:
        side: Which end this is.
        client: Terms of a client; ignored on a server.
        server: Terms of a server; ignored on a client.

    Attributes:
        heard: Whether the peer has sent a whole message.
    """

    def __init__(self, side: Side, *, client: ClientTerms | None = None, server: ServerTerms | None = None) -> None:
        self.heard = False
        self._state = State.LISTEN
        self._ctx = Context(side, client or ClientTerms(), server or ServerTerms())

    @property
    def state(self) -> State:
        """The state of the session."""
        return self._state

    @property
    def side(self) -> Side:
        """Which end this is."""
        return self._ctx.side

    @property
    def timings(self) -> Timings:
        """Deadlines of this side."""
        return self._ctx.timings()

    @property
    def error(self) -> NetloaderError | None:
        """Why the session failed; None unless it did."""
        return self._ctx.error

    @property
    def announcement(self) -> e.Announcement | None:
        """What the server holds; None before it is known."""
        return self._ctx.announcement

    @property
    def transport(self) -> str:
        """Name of the transport; empty before one was chosen."""
        return self._ctx.transport

    @property
    def protocol(self) -> int:
        """The version of the protocol that both sides speak; 0 before it is agreed."""
        return self._ctx.protocol

    @property
    def data_key(self) -> bytes:
        """What authenticates data connections is derived from it; empty without a token."""
        return b"" if self._ctx.keys is None else self._ctx.keys.data

    @property
    def peer_software(self) -> str:
        """The peer's name and version; empty before its first message."""
        return self._ctx.peer_software

    @property
    def peer_transports(self) -> tuple[str, ...]:
        """Names of the transports that the peer has, preferred first."""
        return tuple(ability.name for ability in self._ctx.peer_abilities)

    @property
    def story(self) -> tuple[str, ...]:
        """The last transitions, oldest first."""
        return tuple(self._ctx.story)

    @property
    def asked(self) -> bool:
        """Whether the client requested blocks that are neither granted (client) or sent (server), nor denied."""
        return bool(self._ctx.open_blocks)

    @property
    def identify(self) -> m.Identify | None:
        """The client's Identify message; None before it came, and on a client."""
        return self._ctx.identify

    @property
    def probing(self) -> bool:
        """Whether the client only asks what is held."""
        return self._ctx.probing

    def __repr__(self) -> str:
        return f"<Session {self.side.value} {self._state.name}>"

    def greeted(self, body: bytes) -> None:
        """Record the body of the peer's first frame, exactly as it came, before its message is handled."""
        self.heard = True
        if self._ctx.token is not None:
            self._ctx.peer_greeting = body

    def handle(self, event: e.Event) -> tuple[f.Effect, ...]:
        """Take one event.

        Args:
            event: A local event, or a message from the peer.

        Returns:
            The effects, in order. Empty once the session has ended.

        Nothing that a peer does makes it raise: the session then ends in FAILED, with :attr:`error` set.
        """
        if self._state in FINAL:
            return ()
        move = TABLE.get((self._ctx.side, self._state, type(event)))
        try:
            if move is None:
                raise self._illegal(event)
            handler, after = move
            effects = tuple(handler(self._ctx, event))
        except NetloaderError as error:
            self._enter(State.FAILED, event)
            return self._fail(error, event)
        self._enter(after, event)
        for effect in effects:
            if isinstance(effect, f.SetTimer):
                self._ctx.deadline = effect.seconds
        return effects

    def check_invariants(self) -> None:
        """Check the invariants that hold between any two events.

        Raises:
            LocalProtocolError: An invariant is violated: a bug in this package.
        """
        ctx, state = self._ctx, self._state
        broken = [
            (state is State.FAILED) != (ctx.error is not None) and "there is an error exactly in FAILED",
            state is _T and ctx.announcement is None and "a plan is known in TRANSFER",
            state is _T and not ctx.transport and "a transport is chosen before TRANSFER",
            (ctx.open_blocks or ctx.granted) and state not in (_P, _T, _F) and "blocks are requested in TRANSFER only",
            ctx.early_wants and state is not _P and "early requests are answered when the channel opens",
            self.side is Side.SERVER and not ctx.granted <= ctx.open_blocks and "only requested blocks are granted",
            self.side is Side.CLIENT and ctx.granted & ctx.open_blocks and "no granted block still waits for a grant",
        ]
        for text in broken:
            if text:
                raise LocalProtocolError(f"{self!r}: {text}")

    def _illegal(self, event: e.Event) -> NetloaderError:
        text = f"{type(event).__name__} is not legal in {self._state.name}"
        if isinstance(event, m.Wire):
            return RemoteProtocolError(f"the peer violated the protocol: {text}")
        return LocalProtocolError(text)

    def _enter(self, state: State, event: e.Event) -> None:
        """Change the state. Nothing else changes it."""
        self._ctx.story.append(f"{self._state.name} + {type(event).__name__} -> {state.name}")
        self._state = state
        if state in FINAL:
            self._ctx.forget_blocks()

    def _fail(self, error: NetloaderError, event: e.Event) -> tuple[f.Effect, ...]:
        error.story = tuple(self._ctx.story)
        if not error.hint:
            error.hint = next(hint for kind, hint in _HINTS if isinstance(error, kind))
        self._ctx.error = error
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
        ending = event.code if isinstance(event, e.Cancelled) else code
        return (f.Send(m.Goodbye(code=ending, reason=message)), f.Close())
