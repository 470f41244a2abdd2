"""The client: pulls from sources until every block is verified or no source is left.

Decides nothing: :mod:`netloader.core.pull` does. Knows nothing of torch: what it fills comes as a
:class:`~netloader.client.session.Destination`; ``netloader.pull`` puts tensors in front of it.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from netloader.client.connect import abilities_of, connect
from netloader.client.search import search
from netloader.client.session import ClientSession, Destination, Digest
from netloader.codecs.block_view import BlockView
from netloader.core import pull_moves as p
from netloader.core.identity import ModelIdentity, Role, passed_on
from netloader.core.manifest import manifest_digest
from netloader.core.options import PullOptions
from netloader.core.plan import Plan
from netloader.core.protocol import ClientTerms, Session, Side, State
from netloader.core.protocol import events as e
from netloader.core.pull import Pull
from netloader.core.report import ProgressCallback, PullReport
from netloader.discovery.base import SourceProvider
from netloader.errors import LocalProtocolError, MemoryStillInUse, NetloaderError, PeerLost
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
)
from netloader.session.holding import Holding
from netloader.session.off_loop import FEW_TENSORS
from netloader.session.relay_progress import Supply
from netloader.transports.base import Transport

__all__ = ["RelayServer", "pull_from"]

_log = logging.getLogger("netloader")

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_RELAY_RETRACTION = 1.0
"""Seconds that clients of a relay whose own pull failed may take to let go of its memory."""

_FAREWELL = 0.05
"""Seconds that the goodbyes may take once every block is verified: the pull has what it came for."""


class RelayServer(Protocol):
    """A server of this process that passes on what a pull has, while it goes on."""

    @property
    def port(self) -> int:
        """Where it listens."""
        ...

    def add(self, holding: Holding, supply: Supply | None = None) -> None:
        """Serve `holding`, of which `supply` knows what is there."""
        ...

    async def retract(self, role: Role, *, reason: str, within: float, sources: tuple[str, ...] = ()) -> None:
        """Stop serving `role`, and name other sources; its memory is free to change afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class _RelayMemory:
    """The memory that a pull fills, as a server sees it."""

    destination: Destination

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        return self.destination.views(plan, numbers)

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:  # noqa: ARG002 - part of the contract
        return {}  # the supply knows what is there


@dataclass(frozen=True, slots=True)
class _Relayed:
    """What a pull fills, as a holding."""

    announcement: e.Announcement
    memory: _RelayMemory
    device: str


async def pull_from(
    destination: Destination,
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
        destination: What to fill. After an error, any of its memory may have been written.
        identity: What it is; None to adopt what the source holds.
        sources: Finds where to pull from, in the order to try; watched until the pull is over.
        transports: What may be used, preferred first.
        digest: How to check a block.
        options: How to behave.
        progress: Called after blocks were verified.
        relay: Server of this process that is to pass on what is there, from the moment that the first source was
            accepted. It goes on serving after the pull; whoever changes the memory retracts it there first.
        observers: Told what happens.

    Returns:
        The account of a complete, verified pull.

    Raises:
        NoSourceLeft: No source, alone or together with others, could give every block.
        MemoryStillInUse: A thread that may still write into `destination` can't be brought back; raised in the place of
            everything else, a cancellation included, also when every block is verified. Nobody may fill it any more.
    """
    return await _Pull(destination, identity, transports, digest, options, progress, relay, observers).run(sources)


class _Pull:
    """One pull: carries out what :class:`~netloader.core.pull.Pull` decides."""

    def __init__(
        self,
        destination: Destination,
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
        self._manifest_digest = ""
        self._report = PullReport()
        self._observe = Observers((self._add_phase, *observers))
        self._began = time.monotonic()
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
        """Pull to the end, and tell the observers how it went."""
        self._observe(PullBegan(self._role))
        try:
            report = await self._run(sources)
        except BaseException as error:
            told = error if isinstance(error, Exception) else None
            self._observe(PullEnded(time.monotonic() - self._began, error=told))
            raise
        self._observe(PullEnded(report.seconds, report))
        return report

    def _add_phase(self, event: Event) -> None:
        if isinstance(event, PhaseEnded):
            phases = self._report.phases
            setattr(phases, event.phase, getattr(phases, event.phase) + event.seconds)

    async def _run(self, sources: SourceProvider) -> PullReport:
        manifest = self._destination.manifest
        if manifest is not None:
            few = len(manifest.tensors) <= FEW_TENSORS
            self._manifest_digest = (
                manifest_digest(manifest) if few else await anyio.to_thread.run_sync(manifest_digest, manifest)
            )
        chance = random.Random()  # noqa: S311 - spreads clients, no secret
        adopts, finding = manifest is None, self._options.connect_timeout
        self._pull = Pull((), self._options, chance, began=self._began, adopts=adopts, listing=finding)
        self._supply = Supply(self._pull.ledger)
        try:
            with self._scope:
                async with anyio.create_task_group() as self._tasks:
                    self._carry_out(self._pull.begin(time.monotonic()))
                    self._start(partial(self._find, sources))
                    await self._wait_until_over()
        finally:
            try:
                given = self._pull.ledger.complete and self._memory_in_use is None
                if self._relay is not None and self._relaying and not given:
                    # The memory is the caller's again: nobody may read it any more.
                    with anyio.CancelScope(shield=True):  # each of its steps has a deadline
                        await self._relay.retract(self._role, reason="its own pull failed", within=_RELAY_RETRACTION)
            finally:
                if self._memory_in_use is not None:
                    raise self._memory_in_use
        if self._error is not None:
            raise self._error
        if not self._pull.ledger.complete:
            raise NetloaderError(
                "the pull ended before every block was verified: a CancelledError ended one of its tasks",
                hint="this is a bug in netloader, in a transport or in an observer",
            )
        return self._account()

    @property
    def _role(self) -> Role:
        return self._options.role if self._identity is None else self._identity.role

    async def _find(self, sources: SourceProvider) -> None:
        with self._search:
            await search(sources, self._tell)

    async def _wait_until_over(self) -> None:
        """Tell the pull when a moment has come that it waits for, and when its time is up."""
        last = self._began + self._options.timeout
        while not self._pull.over:
            self._changed = anyio.Event()
            wake_at = self._pull.wake_at(time.monotonic())
            until = last if wake_at is None else min(wake_at, last)
            with anyio.move_on_after(max(0.0, until - time.monotonic())) as waited:
                await self._changed.wait()
            if waited.cancelled_caught:
                self._tell(p.TimeIsUp(self._options.timeout) if until == last else p.Moment())

    def _tell(self, event: p.Event) -> None:
        """Tell the pull what happened, and carry out what follows. What happens meanwhile is told afterwards."""
        self._events.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._events:
                event, before = self._events.popleft(), self._verified()
                commands = self._pull.handle(event, time.monotonic())
                if isinstance(event, p.Landed):  # before the commands: the last blocks end the transfer
                    self._tell_progress(event.session, before)
                self._carry_out(commands)
        finally:
            self._telling = False
            self._changed.set()

    def _carry_out(self, commands: Sequence[p.Command]) -> None:
        for command in commands:
            match command:
                case p.Connect():
                    self._start(partial(self._session_with, command))
                case p.Allocate():
                    self._start(partial(self._allocate, command))
                case p.PassOn(announcement):
                    self._pass_on(announcement)
                case p.Log(level, text):
                    _log.log(_LEVELS[level], "%s", text)
                case p.Done():
                    self._farewell()
                case p.Failed(error):
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
            await anyio.to_thread.run_sync(self._destination.adopt, command.manifest)
        except NetloaderError as caught:
            error = caught
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback
            _log.exception("unexpected error, there is no memory for what a source announced")
            error = _explained(bug)
        self._tell(p.Adopted(command.session, error))

    async def _session_with(self, command: p.Connect) -> None:
        """One session with one source, to its end."""
        source, number, began = str(command.source), command.session, time.monotonic()
        self._observe(SourceChosen(number, source, command.labels, str(command.named_by or "")))
        ended: NetloaderError | None = None  # also when this is cancelled: that is no fault of the source
        session: ClientSession | None = None
        try:
            session = await self._open_session(command, began)
        except PeerLost as error:
            ended = error
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback that follows
            ended = _unexpected(source, bug)
        finally:
            if session is None:
                self._observe(PhaseEnded("client", number, source, "connect", time.monotonic() - began))
                self._observe(SourceLeft(number, source, ended))
        if session is None:
            self._tell(p.Ended(number, ended))
            return
        self._sessions[number] = session
        self._observe(SessionBegan("client", number, source))
        self._tell(p.Connected(number))
        try:
            await session.run()
            ended = session.session.error
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
                )
            )
            self._observe(SourceLeft(number, source, ended))
            self._tell(
                p.Ended(
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
        connection = await connect(command.source, self._options.connect_timeout)
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
            self._options,
            identity=self._identity,
            manifest=self._destination.manifest,
            manifest_digest=self._manifest_digest,
            abilities=abilities_of(transports, self._destination.device),
            root=command.root,
            pinned_by=command.pinned_by,
            node=self._supply.node,
            relay=0 if self._relay is None else self._relay.port,
            avoid=command.avoid,
        )

    def _pass_on(self, announcement: e.Announcement) -> None:
        """The first source was accepted: others may pull from us from here on."""
        self._manifest_digest = announcement.manifest_digest  # of what this pull adopted, where it brought nothing
        theirs = self._report.identity = announcement.identity
        identity = theirs if self._identity is None else passed_on(self._identity, theirs)
        own = self._report.announcement = replace(announcement, identity=identity)
        if self._relay is None:
            return
        try:
            self._relay.add(_Relayed(own, _RelayMemory(self._destination), self._destination.device), self._supply)
        except Exception as error:  # noqa: BLE001 - no fault of a server may end a pull
            _log.warning(
                "the pull goes on, but is not relayed: %s", error, exc_info=not isinstance(error, NetloaderError)
            )
            self._relay = None
        else:
            self._relaying = True

    def _farewell(self) -> None:
        """Every block is verified: no source is waited for any more, whatever it is doing."""
        self._search.cancel()
        self._scope.deadline = anyio.current_time() + _FAREWELL
        for session in self._sessions.values():
            session.hurry(self._scope.deadline)

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
        )
        session.blocks += came.blocks
        session.nbytes += came.nbytes
        self._observe(came)
        if self._progress is None or self._error is not None:
            return
        try:
            self._progress(came)
        except Exception as error:  # noqa: BLE001 - the caller's own: raised to the caller, once all is closed
            self._error = error
            self._scope.cancel()

    def _account(self) -> PullReport:
        report, ledger = self._report, self._pull.ledger
        report.root = ledger.root
        report.nbytes, report.blocks = ledger.verified_bytes, ledger.verified_blocks
        report.tensors = 0 if ledger.plan is None else len(ledger.plan.manifest.tensors)
        report.seconds = time.monotonic() - self._began
        report.sources, report.retries, report.attempts = self._pull.shares, self._pull.retries, self._pull.attempts
        return report


def _unexpected(source: str, bug: Exception) -> NetloaderError:
    _log.error("source %s: unexpected error, the source is left", source, exc_info=bug)
    return _explained(bug)


def _explained(bug: Exception) -> NetloaderError:
    return NetloaderError(
        f"unexpected {type(bug).__name__}: {bug}",
        hint="this is a bug in netloader: the log has the details",
    )
