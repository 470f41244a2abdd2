"""The server: accepts connections and serves its holdings to many clients at once, beside other work of the process.

Independent of torch: it serves :class:`~netloader.session.holding.Holding` objects. ``netloader.Server`` makes them
from tensors.
"""

from __future__ import annotations

import logging
import resource
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import SocketStream, TaskGroup

from netloader.codecs.frames import client_messages
from netloader.core.identity import Layout, Role, name_of
from netloader.core.messages import Ability
from netloader.core.options import ServeOptions
from netloader.core.protocol import ServerTerms, Session, Side, State
from netloader.errors import LocalProtocolError, MemoryStillInUse, PeerLost, shortage
from netloader.observe.base import Observer, Observers
from netloader.observe.events import ServingStarted, ServingStopped, SessionBegan, SessionEnded
from netloader.observe.logging import RateLimitedLog, ServerLog
from netloader.server.admission import LEAST_RATE, Admission
from netloader.server.budgets import Connections, Stage, limits_for
from netloader.server.catalog import Holdings
from netloader.server.listening import Listening
from netloader.server.newcomers import TURNED_AWAY, Newcomer, Newcomers
from netloader.server.pace import Pace
from netloader.server.redirects import Redirects
from netloader.server.relay_check import CheckRelay, RelayCheck
from netloader.server.session import ServerSession
from netloader.server.session_info import SessionInfo
from netloader.session.connection import ControlConnection
from netloader.session.holding import Holding
from netloader.session.relay_progress import Supply
from netloader.transports.base import Transport

__all__ = ["HoldingServer"]

_log = logging.getLogger("netloader")

_STRAY_PAUSE = 0.002
"""Seconds from one stray session to the next, and the same for probes and sessions that were turned away: twice the
time that one costs. So they leave half of the time of the event loop to clients and to the engine."""

_SCARCE_PAUSE = 0.6
"""The same after a session for which this host had no resources left."""

_BURST = 0.5
"""Seconds of such pauses that may be left out after a time without: many that come at once do not delay a client."""

_PACE_CHECK = 0.1
"""Seconds between two checks, while clients wait, whether turns are in use."""

_MANY_FILES = 1 << 20


def _open_files_limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY_FILES if soft == resource.RLIM_INFINITY else soft


class HoldingServer:
    """Serves holdings to clients, as an asynchronous context manager.

    Args:
        transports: Transports it may use, preferred first.
        options: Limits, deadlines and the token.
        observers: Receive the events of the server and its sessions.
        check_relay: Asks a client that says that it relays for its name as a relay. Without it no client is redirected.

    Raises (on entering):
        ConfigError: The address can't be bound.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        options: ServeOptions,
        *,
        observers: Sequence[Observer] = (),
        check_relay: CheckRelay | None = None,
    ) -> None:
        self._transports = {transport.name: transport for transport in transports}
        self._options = options
        self._holdings = Holdings()
        self._sessions: set[ServerSession] = set()
        self._changed = anyio.Event()
        self._relays = Redirects(options.fan_out)
        self._relay_check = RelayCheck(check_relay)
        self._limits = limits_for(options, _open_files_limit())
        self._connections = Connections(self._limits)
        self._turns = Admission(self._limits.turns, self._limits.queue, self._limits.channels)
        self._some_wait = anyio.Event()
        self._log = ServerLog()
        self._observe = Observers((self._log, *observers))
        self._unaccepted = RateLimitedLog("a connection could not be accepted", logging.WARNING, 1)
        self._turned_away = RateLimitedLog("a connection was closed to make room for others", logging.WARNING, 1)
        self._unpaced = RateLimitedLog("a session was ended because it moved too little", logging.WARNING, 5)
        self._in_use: list[tuple[Holding, MemoryStillInUse]] = []  # memory that ended sessions may still read
        self._pace = Pace(_BURST)
        self._listening: Listening | None = None
        self._newcomers: Newcomers | None = None
        self._tasks: TaskGroup | None = None
        self._stack: AsyncExitStack | None = None
        self._stopping = False
        self._count = 0
        self._port = 0
        self._host = ""

    # --- life -------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise LocalProtocolError("the server was started before", hint="make a new one")
        listening = await anyio.to_thread.run_sync(Listening, self._options.host, self._options.port)
        self._host, self._port = listening.sockets[0].getsockname()[:2]
        async with AsyncExitStack() as stack:
            stack.callback(listening.close)
            self._newcomers = Newcomers(
                self._connections,
                strangers=self._limits.strangers,
                hello=self._options.timings.hello,
                pace=self._pace,
                begin=self._begin,
                make_room=self._make_room,
                stray=self._log.stray,
                failed=self._unaccepted.happened,
            )
            stack.callback(self._newcomers.close, "the server is stopping")
            self._tasks = tasks = await stack.enter_async_context(anyio.create_task_group())
            for listener in listening.sockets:
                tasks.start_soon(self._accept, self._newcomers, listener)
            tasks.start_soon(self._newcomers.begin_sessions)
            tasks.start_soon(self._pass_turns_on)
            self._listening = listening
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is None or self._tasks is None:
            raise LocalProtocolError("the server is not running")
        self._stopping = True
        with anyio.CancelScope(shield=True):
            if self._listening is not None:
                for listener in self._listening.sockets:
                    anyio.notify_closing(listener)
                self._listening.close()
            if self._newcomers is not None:
                self._newcomers.close("the server is stopping")
            for session in list(self._sessions):
                session.stop("the server is stopping")
            with anyio.move_on_after(self._options.stop_within):
                await self._until(lambda: not self._sessions)
        self._tasks.cancel_scope.cancel()
        try:
            # Without the error of the caller: the task group would wrap it in an exception group.
            await stack.__aexit__(None, None, None)
        finally:
            self._stopped_serving(self._holdings.held(), "the server is stopping")

    # --- what is served ---------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def host(self) -> str:
        """The address that it is bound to; ``::`` or ``0.0.0.0`` for all."""
        return self._host

    @property
    def holdings(self) -> Holdings:
        """The catalog of what is served."""
        return self._holdings

    @property
    def sessions(self) -> tuple[SessionInfo, ...]:
        """A snapshot of every open session, and of the connections that have not begun one."""
        newcomers = () if self._newcomers is None else self._newcomers.peers
        silent = (SessionInfo(peer, State.LISTEN, "", "", 0, 0) for peer in newcomers)
        return (*(session.info() for session in self._sessions), *silent)

    def add(self, holding: Holding, supply: Supply | None = None) -> None:
        """Serve `holding`; see :meth:`netloader.server.catalog.Holdings.add`."""
        self._holdings.add(holding, supply)
        known = holding.announcement
        self._observe(
            ServingStarted(
                role=known.identity.role,
                layout=known.identity.layout,
                model=name_of(known.identity),
                root=known.root,
                tensors=len(known.manifest.tensors),
                blocks=len(known.plan.blocks),
                nbytes=known.plan.nbytes,
            )
        )

    def _stopped_serving(self, held: Iterable[Holding], reason: str) -> None:
        for known in (holding.announcement for holding in held):
            self._observe(ServingStopped(known.identity.role, known.identity.layout, known.root, reason))

    def expect(self, role: Role = "target", layout: Layout = "raw", *, reason: str, retry_after: float = 2.0) -> None:
        """Refuse clients with "not ready" until :meth:`add` is called for this role and layout."""
        self._holdings.expect(role, layout, reason, retry_after)

    async def drained(self, role: Role = "target", *, within: float) -> bool:
        """Wait until no client pulls `role`, for `within` seconds at most. Returns whether none does.

        The role is served meanwhile.
        """
        with anyio.move_on_after(within):
            await self._until(lambda: not self._pulling(role))
        return not self._pulling(role)

    def _pulling(self, role: Role) -> bool:
        states = (State.PLAN, State.TRANSFER)
        return any(s.holding and s.info().role == role and s.session.state in states for s in self._sessions)

    async def retract(
        self, role: Role = "target", *, reason: str, within: float = 5.0, sources: tuple[str, ...] = ()
    ) -> None:
        """Stop serving `role`: no new grants, then a bounded wait for running sends. Its memory may change afterwards.

        If a send cannot be ended in time, an error in the log says that the memory is still being read, and by which
        thread. If the memory changes then, the client finds that the digests differ.

        Args:
            role: The role to retract.
            reason: Reason given to clients.
            within: Seconds that running sends may take. After that their sessions are ended.
            sources: Other sources of the same weights, named to clients.
        """
        held = self._holdings.retract(role, reason, sources)
        self._stopped_serving(held, reason)
        affected = [s for s in self._sessions if any(s.holding is holding for holding in held)]
        for session in affected:
            if not session.sending:
                session.retract(reason, sources)
        with anyio.move_on_after(within):
            await self._until(lambda: not any(s.sending for s in affected))
        for session in affected:
            session.retract(reason, sources)
        with anyio.move_on_after(self._options.stop_within):
            await self._until(lambda: not any(s in self._sessions for s in affected))
        for session in affected:
            if session in self._sessions:
                session.abandon(reason)  # the client does not read its last message
        with anyio.move_on_after(self._options.stop_within):
            await self._until(lambda: not any(s in self._sessions for s in affected))
        self._log_memory_in_use(role, held, [session for session in affected if session in self._sessions])

    def _log_memory_in_use(self, role: Role, held: Sequence[Holding], sessions: Sequence[ServerSession]) -> None:
        """Log which sessions and threads still read the memory of what was retracted."""
        self._in_use = [(holding, error) for holding, error in self._in_use if error.lasts]
        readers = [f"{session.label} has not ended" for session in sessions]
        readers += [error.message for holding, error in self._in_use if any(holding is one for one in held)]
        if readers:
            _log.error("the memory of the %s is not free to change: %s", role, "; ".join(readers))

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            changed = self._changed
            with anyio.move_on_after(0.05):  # the end of a send sets no event
                await changed.wait()

    async def _accept(self, newcomers: Newcomers, listener: socket.socket) -> None:
        await newcomers.accept(listener)

    def _pause(self, seconds: float) -> None:
        """Begin the next session later, by `seconds` on average."""
        self._pace.spend(seconds, time.monotonic())

    def _begin(self, stream: SocketStream) -> None:
        if self._tasks is None:
            raise LocalProtocolError("the server is not running")
        self._tasks.start_soon(self._serve, stream)

    async def _serve(self, stream: SocketStream) -> None:
        """Serve one client. No error of it affects another client or the server."""
        if self._stopping:  # accepted during the stop, which would not end this session
            await anyio.aclose_forcefully(stream)
            return
        self._count += 1
        label = f"session {self._count}"
        session: ServerSession | None = None
        try:
            session = self._session(stream, self._count)
            self._observe(SessionBegan("server", session.number, session.peer))
            await session.run()
        except PeerLost as error:
            self._pause(_STRAY_PAUSE)
            self._log.stray(f"{label}: {error.message}")
        except Exception as error:  # noqa: BLE001 - a bug may end this session, but not the process of the engine
            scarce = shortage(error)
            if scarce is None:
                _log.exception("%s: unexpected error, the session is closed", label)
            else:
                self._unaccepted.happened(str(scarce))
                self._pause(_SCARCE_PAUSE)
        finally:
            if session is not None:
                self._connections.leave(session)
                self._sessions.discard(session)
                if session.lent.in_use is not None and session.holding is not None:
                    self._in_use = [(holding, error) for holding, error in self._in_use if error.lasts]
                    self._in_use.append((session.holding, session.lent.in_use))
                changed, self._changed = self._changed, anyio.Event()
                changed.set()
                self._report(session)
            else:
                await anyio.aclose_forcefully(stream)

    def _session(self, stream: SocketStream, number: int) -> ServerSession:
        """Make the session for a new connection. Turns others away when there are too many.

        Raises:
            PeerLost: The client has closed the connection already.
        """
        connection = ControlConnection(stream, client_messages())
        session = ServerSession(
            Session(Side.SERVER, server=ServerTerms(self._options, tuple(self._abilities()))),
            connection,
            holdings=self._holdings,
            turns=self._turns,
            transports=self._transports,
            number=number,
            observers=self._observe,
            relays=self._relays,
            check=self._relay_check,
            account=lambda stage: self._account(session, stage),
        )
        self._sessions.add(session)
        self._connections.enter(session, connection.peer_host)
        self._make_room()
        return session

    def _account(self, session: ServerSession, stage: Stage) -> None:
        """The connection of a session is for something else now."""
        self._connections.move(session, stage)
        if stage is Stage.QUEUED or stage is Stage.ASIDE:
            self._some_wait.set()
        if stage is not Stage.ENDING:
            self._make_room()

    def _make_room(self) -> None:
        """Turn connections away until there are no more than the limits allow."""
        while (one := self._connections.surplus()) is not None:
            count, limits = len(self._connections), self._limits
            text = f"{count} are connected, this server allows {limits.connections} and {limits.strangers} strangers"
            if isinstance(one, ServerSession):
                self._turned_away.happened(f"{one.label}: {text}")
                self._pause(_STRAY_PAUSE)
                one.turn_away(TURNED_AWAY.message, quickly=True)
            elif isinstance(one, Newcomer) and self._newcomers is not None:
                self._turned_away.happened(f"{one.peer}: {text}")
                self._newcomers.turn_away(one)
            else:
                raise LocalProtocolError("a connection was accounted for that this server does not know")

    async def _pass_turns_on(self) -> None:
        """While clients wait, pass turns on that are not in use, and end the session that keeps no pace."""
        while True:
            await self._some_wait.wait()
            self._some_wait = anyio.Event()
            while self._turns.waiting:
                now = time.monotonic()
                for client in self._turns.pass_on(now):
                    if isinstance(client, ServerSession) and not self._turns.holds_channel(client):
                        self._account(client, Stage.ASIDE)
                late = self._turns.overdue(now)
                if isinstance(late, ServerSession):
                    text = f"others wait, and this client took less than {LEAST_RATE >> 10} KiB/s"
                    self._unpaced.happened(f"{late.label}: {text}")
                    late.turn_away(text, quickly=False)
                await anyio.sleep(_PACE_CHECK)

    def _abilities(self) -> list[Ability]:
        devices = {holding.device for holding in self._holdings.held()} or {"cpu"}
        found: dict[str, Ability] = {}
        for device in sorted(devices):
            for name, transport in self._transports.items():
                if name not in found and transport.missing(device) is None:
                    found[name] = Ability(name, dict(transport.facts(device)))
        return [found[name] for name in self._transports if name in found]

    def _report(self, session: ServerSession) -> None:
        info = session.info()
        ended = SessionEnded(
            side="server",
            session=session.number,
            peer=info.peer,
            role=info.role,
            transport=info.transport,
            seconds=session.seconds,
            blocks=info.blocks,
            nbytes=info.nbytes,
            error=session.session.error,
            unfinished=info.unfinished,
            probe=session.session.probing,
        )
        if ended.stray or session.session.probing:
            self._pause(_STRAY_PAUSE)
        self._observe(ended)
