"""The client: pulls from sources until every block is verified or no source is left.

All decisions are made in :mod:`netloader.core.pull`; this module does the I/O. It is independent of torch: it fills a
:class:`~netloader.client.session.PullDestination`, which ``netloader.pull`` makes from tensors.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from netloader.client.connect import abilities_of, connect
from netloader.client.foreign import explained
from netloader.client.relayed import RelayedHolding, RelayedMemory
from netloader.client.search import search
from netloader.client.session import ClientSession, Digest, PullDestination
from netloader.core import pull_events as p
from netloader.core.identity import ModelIdentity, Role, passed_on
from netloader.core.manifest import Manifest, manifest_digest
from netloader.core.options import PullOptions
from netloader.core.protocol import ClientTerms, Session, Side, State
from netloader.core.protocol import events as e
from netloader.core.pull import Pull
from netloader.core.pull_clock import PullClock, Wait
from netloader.core.report import ProgressCallback, PullReport
from netloader.core.texts import LINE, one_line
from netloader.discovery.base import SourceProvider
from netloader.errors import LocalProtocolError, MemoryStillInUse, NetloaderError, PeerLost, unexpected
from netloader.observe.base import Observer, Observers
from netloader.observe.events import (
    BlocksVerified,
    Event,
    PhaseEnded,
    PullBegan,
    PullEnded,
    SessionBegan,
    SessionEnded,
    SourceChosen,
    SourceLeft,
    SourceWaiting,
)
from netloader.session.closing import drop_tracebacks
from netloader.session.holding import Holding
from netloader.session.off_loop import FEW_TENSORS
from netloader.session.relay_progress import Supply
from netloader.transports.base import Transport

__all__ = ["RelayServer", "pull_from"]

_log = logging.getLogger("netloader")

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_RELAY_RETRACTION = 1.0
"""Seconds that running sends of a relay may take after its own pull failed."""

_FAREWELL = 0.05
"""Seconds that all sessions together may take to end after the last block was verified."""


class RelayServer(Protocol):
    """A server of this process that relays: it serves the verified blocks of a pull while the pull runs."""

    @property
    def port(self) -> int:
        """The port that it listens on."""
        ...

    def add(self, holding: Holding, supply: Supply | None = None) -> None:
        """Serve `holding`; `supply` says which of its blocks are verified.

        Raises:
            NetloaderError: It is not served. The pull goes on without relaying.
        """
        ...

    async def retract(self, role: Role, *, reason: str, within: float, sources: tuple[str, ...] = ()) -> None:
        """Stop serving `role`, and name `sources` to its clients. Its memory may change afterwards."""
        ...


async def pull_from(
    destination: PullDestination,
    identity: ModelIdentity | None,
    sources: SourceProvider,
    transports: Sequence[Transport],
    digest: Digest,
    options: PullOptions,
    progress: ProgressCallback | None = None,
    relay: RelayServer | None = None,
    observers: Sequence[Observer] = (),
) -> PullReport:
    """Fill `destination` from `sources`.

    Args:
        destination: The memory to fill. After an error, any part of it may have been written.
        identity: Identity of the tensors; None to adopt what the source holds.
        sources: Finds the sources, in the order to try them. It is watched until the pull is over.
        transports: Transports that may be used, preferred first.
        digest: Computes the digest of a block.
        options: Deadlines, limits and requirements.
        progress: Called after blocks were verified.
        relay: Server of this process that serves the verified blocks, from the time when the first one is verified.
            It serves them after the pull too: retract the role there before the memory changes.
        observers: Receive the events of the pull.

    Returns:
        The report of a complete, verified pull.

    Raises:
        NoSourceLeft: The sources, also taken together, could not give every block.
        MemoryStillInUse: A thread did not return and may still write to `destination`. Raised instead of any other
            error, of a cancellation and of the report. The memory must not be filled again.
    """
    return await _Pull(destination, identity, transports, digest, options, progress, relay, observers).run(sources)


class _Pull:
    """One pull: carries out what :class:`~netloader.core.pull.Pull` decides."""

    def __init__(
        self,
        destination: PullDestination,
        identity: ModelIdentity | None,
        transports: Sequence[Transport],
        digest: Digest,
        options: PullOptions,
        progress: ProgressCallback | None,
        relay: RelayServer | None,
        observers: Sequence[Observer],
    ) -> None:
        self._destination = destination
        self._identity = identity
        self._transports = {transport.name: transport for transport in transports}
        self._digest = digest
        self._options = options
        self._progress = progress
        self._relay = relay
        self._relaying = False
        self._manifest: Manifest | None = None  # None until it is final, if it is taken from a source
        self._manifest_digest = ""
        self._report = PullReport()
        self._observe = Observers((self._add_phase, *observers))
        self._began = time.monotonic()
        self._clock = PullClock(options, self._began)
        self._events: deque[p.Event] = deque()
        self._telling = False
        self._sessions: dict[int, ClientSession] = {}
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()
        self._search = anyio.CancelScope()
        self._tasks: TaskGroup | None = None
        self._error: Exception | None = None
        self._memory_in_use: MemoryStillInUse | None = None

    async def run(self, sources: SourceProvider) -> PullReport:
        """Pull to the end, and emit the events of begin and end."""
        self._observe(PullBegan(self._role))
        try:
            report = await self._run(sources)
        except BaseException as error:  # kept in no variable: the frames of its traceback would then keep it
            seconds = time.monotonic() - self._began
            self._observe(PullEnded(seconds, error=error if isinstance(error, Exception) else None, role=self._role))
            if not isinstance(error, Exception):
                drop_tracebacks(error)  # anyio's frames keep a cancellation, and it would keep the caller's frames
            raise
        self._observe(PullEnded(report.seconds, report, role=self._role))
        return report

    def _add_phase(self, event: Event) -> None:
        if isinstance(event, PhaseEnded):
            phases = self._report.phases
            setattr(phases, event.phase, getattr(phases, event.phase) + event.seconds)

    async def _run(self, sources: SourceProvider) -> PullReport:
        self._manifest = manifest = self._destination.manifest
        if manifest is not None:
            few = len(manifest.tensors) <= FEW_TENSORS
            self._manifest_digest = (
                manifest_digest(manifest) if few else await anyio.to_thread.run_sync(manifest_digest, manifest)
            )
        rng = random.Random()  # noqa: S311 - spreads clients, no secret
        adopts, finding = manifest is None, self._options.connect_timeout
        self._pull = Pull((), self._options, rng, began=self._began, adopts=adopts, listing=finding)
        self._supply = Supply(self._pull.ledger)
        try:
            with self._scope:
                async with anyio.create_task_group() as self._tasks:
                    self._carry_out(self._pull.begin(time.monotonic()))
                    self._start(partial(self._watch_sources, sources))
                    await self._wait_until_over()
        finally:
            try:
                given = self._pull.ledger.complete and self._memory_in_use is None
                if self._relay is not None and self._relaying and not given:
                    # The memory belongs to the caller again: no client may read it any more.
                    with anyio.CancelScope(shield=True):  # each of its steps has a deadline
                        await self._relay.retract(self._role, reason="its own pull failed", within=_RELAY_RETRACTION)
            finally:
                self._raise(self._memory_in_use)
        self._raise(self._error)
        if not self._pull.ledger.complete:
            raise NetloaderError(
                "the pull ended before every block was verified: a CancelledError ended one of its tasks",
                hint="this is a bug in netloader, in a transport or in an observer",
            )
        return self._final_report()

    def _raise(self, error: Exception | None) -> None:
        """Raise `error`, if there is one, and forget it: the frames of its traceback would be in a cycle with it."""
        if error is not None:
            self._error = self._memory_in_use = None
            try:
                raise error
            finally:
                del error

    @property
    def _role(self) -> Role:
        return self._options.role if self._identity is None else self._identity.role

    async def _watch_sources(self, sources: SourceProvider) -> None:
        with self._search:
            await search(sources, self._tell)

    async def _wait_until_over(self) -> None:
        """Until the pull is over, wake it at the times that it names, and when its timeout has passed."""
        last = self._began + self._options.timeout
        while not self._pull.over:
            self._changed = anyio.Event()
            wake_at = self._pull.wake_at(time.monotonic())
            until = last if wake_at is None else min(wake_at, last)
            report_at = self._clock.due() or until
            with anyio.move_on_after(max(0.0, min(until, report_at) - time.monotonic())) as waited:
                await self._changed.wait()
            if wait := self._clock.report(time.monotonic()):
                self._observe(SourceWaiting(*self._with_place(wait)))
            if waited.cancelled_caught and until <= report_at:
                self._tell(p.DeadlinePassed(self._options.timeout) if until == last else p.TimerFired())

    def _with_place(self, wait: Wait) -> Wait:
        """`wait`; if it is for a turn at a source, with the place in its queue."""
        places = (session.place for session in self._sessions.values() if session.source == wait.source)
        place = next(filter(None, places), "")
        return wait._replace(reason=place) if place else wait

    def _tell(self, event: p.Event) -> None:
        """Give the pull an event and carry out its commands. Events that this causes are given to it afterwards."""
        self._events.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._events:
                event, before = self._events.popleft(), self._verified()
                self._clock.take(event, time.monotonic())
                commands = self._pull.handle(event, time.monotonic())
                if isinstance(event, p.BlocksArrived):  # before the commands: the last blocks end the transfer
                    self._tell_progress(event.session, before)
                self._carry_out(commands)
        finally:
            self._telling = False
            self._changed.set()

    def _carry_out(self, commands: Sequence[p.Command]) -> None:
        for command in commands:
            match command:
                case p.Connect():
                    self._clock.connecting(command)
                    self._start(partial(self._session_with, command))
                case p.Allocate():
                    self._start(partial(self._allocate, command))
                case p.FreeMemory():
                    self._destination.free()
                case p.StartRelaying(announcement):
                    self._pass_on(announcement)
                case p.Log(level, text):
                    _log.log(_LEVELS[level], "%s", one_line(text, LINE))
                case p.Succeed():
                    self._clock.stop(time.monotonic())
                    self._end_sessions()
                case p.Fail(error):
                    self._error = self._error or error
                    self._scope.cancel()
                case _:
                    session = self._sessions.get(command.session)
                    if session is not None:
                        session.carry_out(command)

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._tasks is None:
            raise LocalProtocolError("the pull has not begun")
        self._tasks.start_soon(work)

    async def _allocate(self, command: p.Allocate) -> None:
        error = None
        try:
            await anyio.to_thread.run_sync(self._destination.adopt, command.manifest, command.metadata)
        except NetloaderError as caught:
            drop_tracebacks(caught)
            error = caught
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback
            _log.exception("unexpected error while allocating memory for what a source announced")
            error = unexpected(bug)
            drop_tracebacks(error)
        self._tell(p.MemoryAllocated(command.session, error))

    async def _session_with(self, command: p.Connect) -> None:
        """Run one session with one source to its end."""
        source, number, began = str(command.source), command.session, time.monotonic()
        self._observe(SourceChosen(number, source, command.labels, str(command.named_by or "")))
        ended: NetloaderError | None = None  # stays None on cancellation, which is no fault of the source
        session: ClientSession | None = None
        try:
            session = await self._open_session(command, began)
        except PeerLost as error:
            drop_tracebacks(error)
            ended = error
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback that follows
            ended = _unexpected(source, bug)
        finally:
            if session is None:
                self._observe(PhaseEnded("client", number, source, "connect", time.monotonic() - began))
                self._observe(SourceLeft(number, source, ended))
        if session is None:
            self._tell(p.SessionEnded(number, ended))
            return
        self._sessions[number] = session
        self._observe(SessionBegan("client", number, source))
        self._tell(p.SessionStarted(number))
        try:
            await session.run()
            ended = await explained(session.session.error, session.session, command.source)
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback that follows
            ended = _unexpected(source, bug)
        finally:
            del self._sessions[number]
            if session.lent.in_use is not None:
                self._memory_in_use = ended = session.lent.in_use
                self._scope.cancel()
            chosen = session.session.transport
            self._observe(
                SessionEnded(
                    side="client",
                    session=number,
                    peer=source,
                    role=self._role,
                    transport=chosen,
                    seconds=session.seconds,
                    blocks=session.blocks,
                    nbytes=session.nbytes,
                    error=ended,
                    unfinished=len(self._pull.ledger.in_flight(number)) if ended else 0,
                )
            )
            self._observe(SourceLeft(number, source, ended))
            self._tell(
                p.SessionEnded(
                    number,
                    ended,
                    transport=chosen,
                    others=chosen in session.transports and len(session.transports) > 1,
                    opened=State.TRANSFER in session.clock.seconds(),
                    story=session.session.story,
                )
            )

    async def _open_session(self, command: p.Connect, began: float) -> ClientSession | None:
        """Connect to a source; None when the pull is over by then.

        Raises:
            PeerLost: The source cannot be reached.
        """
        connection = await connect(command.source, self._options.connect_timeout, self._manifest)
        session: ClientSession | None = None
        try:
            if not self._pull.over:
                usable = {name: transport for name, transport in self._transports.items() if name not in command.unfit}
                session = ClientSession(
                    Session(Side.CLIENT, client=self._terms(command, usable.values())),
                    connection,
                    number=command.session,
                    source=str(command.source),
                    ledger=self._pull.ledger,
                    tell=self._tell,
                    destination=self._destination,
                    digest=self._digest,
                    transports=usable,
                    supply=self._supply,
                    began=began,
                    observers=self._observe,
                )
        finally:
            if session is None:
                await connection.aclose()
        return session

    def _terms(self, command: p.Connect, transports: Iterable[Transport]) -> ClientTerms:
        return ClientTerms(
            self._options if command.follow else replace(self._options, follow=False),
            identity=self._identity,
            manifest=self._manifest,
            manifest_digest=self._manifest_digest,
            abilities=abilities_of(transports, self._destination.device),
            root=command.root,
            pinned_by=command.pinned_by,
            node=self._supply.node,
            relay=0 if self._relay is None else self._relay.port,
            avoid=command.avoid,
            others=command.others,
        )

    def _pass_on(self, announcement: e.Announcement) -> None:
        """The first block is verified: begin to relay, if there is a server for it."""
        if self._manifest is None:  # a pull that adopts what its source holds has tensors of its own from now on
            self._manifest, self._manifest_digest = announcement.manifest, announcement.manifest_digest
        theirs = self._report.identity = announcement.identity
        identity = theirs if self._identity is None else passed_on(self._identity, theirs)
        own = self._report.announcement = replace(announcement, identity=identity)
        if self._relay is None:
            return
        try:
            self._relay.add(
                RelayedHolding(own, RelayedMemory(self._destination), self._destination.device), self._supply
            )
        except Exception as error:  # noqa: BLE001 - no fault of a server may end a pull
            _log.warning(
                "the pull goes on, but is not relayed: %s", error, exc_info=not isinstance(error, NetloaderError)
            )
            self._relay = None
        else:
            self._relaying = True

    def _end_sessions(self) -> None:
        """Every block is verified: stop the search, and end all sessions within a short deadline."""
        self._search.cancel()
        self._scope.deadline = anyio.current_time() + _FAREWELL
        for session in self._sessions.values():
            session.limit_farewell(self._scope.deadline)

    def _verified(self) -> tuple[int, int]:
        return self._pull.ledger.verified_blocks, self._pull.ledger.verified_bytes

    def _tell_progress(self, number: int, before: tuple[int, int]) -> None:
        self._supply.notify()
        session, (blocks, nbytes) = self._sessions[number], self._verified()
        came = BlocksVerified(
            nbytes,
            self._pull.ledger.total_bytes or 0,
            time.monotonic() - self._began,
            session.source,
            session=number,
            blocks=blocks - before[0],
            nbytes=nbytes - before[1],
            transport=session.session.transport,
        )
        session.blocks += came.blocks
        session.nbytes += came.nbytes
        self._observe(came)
        if self._progress is None or self._error is not None:
            return
        try:
            self._progress(came)
        except Exception as error:  # noqa: BLE001 - raised to the caller once all sessions are closed
            self._error = error
            self._scope.cancel()

    def _final_report(self) -> PullReport:
        report, ledger = self._report, self._pull.ledger
        report.root = ledger.root
        report.nbytes, report.blocks = ledger.verified_bytes, ledger.verified_blocks
        report.tensors = 0 if ledger.plan is None else len(ledger.plan.manifest.tensors)
        report.seconds = time.monotonic() - self._began
        report.waited, report.transfer_seconds = self._clock.waited, self._clock.transferred
        report.sources, report.retries, report.attempts = self._pull.shares, self._pull.retries, self._pull.attempts
        return report


def _unexpected(source: str, bug: Exception) -> NetloaderError:
    _log.error("source %s: unexpected error, the source is left", source, exc_info=bug)
    made = unexpected(bug)
    drop_tracebacks(made)
    return made
