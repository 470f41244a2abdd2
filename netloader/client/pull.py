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

from netloader.client.connect import ClientOptions, abilities_of, client_terms, connect
from netloader.client.session import ClientSession, Destination, Digest
from netloader.codecs.block_view import BlockView
from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity, Role, passed_on
from netloader.core.manifest import manifest_digest
from netloader.core.plan import Plan
from netloader.core.protocol import ClientTerms, Session, Side, State
from netloader.core.protocol import events as e
from netloader.core.pull import Pull, PullTerms
from netloader.core.report import Progress, ProgressCallback, PullReport
from netloader.errors import LocalProtocolError, MemoryStillInUse, NetloaderError, PeerLost
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
    sources: Sequence[Address],
    transports: Sequence[Transport],
    digest: Digest,
    options: ClientOptions,
    progress: ProgressCallback | None = None,
    relay: RelayServer | None = None,
) -> PullReport:
    """Fill `destination` from `sources`.

    Args:
        destination: What to fill. After an error, any of its memory may have been written.
        identity: What it is; None to adopt what the source holds.
        sources: Where to pull from, in the order to try.
        transports: What may be used, preferred first.
        digest: How to check a block.
        options: How to behave.
        progress: Called after blocks were verified.
        relay: Server of this process that is to pass on what is there, from the moment that the first source was
            accepted. It goes on serving after the pull; whoever changes the memory retracts it there first.

    Returns:
        The account of a complete, verified pull.

    Raises:
        NoSourceLeft: No source, alone or together with others, could give every block.
        MemoryStillInUse: A thread that may still write into `destination` can't be brought back; raised in the place of
            everything else, a cancellation included, also when every block is verified. Nobody may fill it any more.
    """
    return await _Pull(destination, identity, transports, digest, options, progress, relay).run(sources)


class _Pull:
    """One pull: carries out what :class:`~netloader.core.pull.Pull` decides."""

    def __init__(
        self,
        destination: Destination,
        identity: ModelIdentity | None,
        transports: Sequence[Transport],
        digest: Digest,
        options: ClientOptions,
        progress: ProgressCallback | None,
        relay: RelayServer | None,
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
        self._began = time.monotonic()
        self._events: deque[p.Event] = deque()
        self._telling = False
        self._sessions: dict[int, ClientSession] = {}
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()
        self._tasks: TaskGroup | None = None
        self._error: Exception | None = None
        self._memory_in_use: MemoryStillInUse | None = None

    async def run(self, sources: Sequence[Address]) -> PullReport:
        options, manifest = self._options, self._destination.manifest
        if manifest is not None:
            few = len(manifest.tensors) <= FEW_TENSORS
            self._manifest_digest = (
                manifest_digest(manifest) if few else await anyio.to_thread.run_sync(manifest_digest, manifest)
            )
        terms = PullTerms(
            began=self._began,
            adopts=manifest is None,
            stripe=options.stripe,
            tries=options.tries,
            wait=options.wait,
            expect_root=options.expect_root,
        )
        self._pull = Pull(sources, terms, random.Random())  # noqa: S311 - spreads clients, no secret
        self._supply = Supply(self._pull.ledger)
        try:
            with self._scope:
                async with anyio.create_task_group() as self._tasks:
                    self._carry_out(self._pull.begin(time.monotonic()))
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
        return self._account()

    @property
    def _role(self) -> Role:
        return self._options.role if self._identity is None else self._identity.role

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
                self._tell(p.DeadlinePassed(self._options.timeout) if until == last else p.TimerFired())

    def _tell(self, event: p.Event) -> None:
        """Tell the pull what happened, and carry out what follows. What happens meanwhile is told afterwards."""
        self._events.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._events:
                event = self._events.popleft()
                self._carry_out(self._pull.handle(event, time.monotonic()))
                if isinstance(event, p.BlocksArrived):
                    self._tell_progress(event.session)
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
                case p.StartRelaying(announcement):
                    self._pass_on(announcement)
                case p.Log(level, text):
                    _log.log(_LEVELS[level], "%s", text)
                case p.Succeed():
                    self._farewell()
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
            await anyio.to_thread.run_sync(self._destination.adopt, command.manifest)
        except NetloaderError as caught:
            error = caught
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback
            _log.exception("unexpected error, there is no memory for what a source announced")
            error = _explained(bug)
        self._tell(p.MemoryAllocated(command.session, error))

    async def _session_with(self, command: p.Connect) -> None:
        """One session with one source, to its end."""
        source, number = command.source, command.session
        began = time.monotonic()
        try:
            connection = await connect(source, self._options.connect_timeout)
        except PeerLost as error:
            self._tell(p.SessionEnded(number, error))
            return
        finally:
            self._report.phases.connect += time.monotonic() - began
        if self._pull.over:  # meanwhile, by other sessions
            await connection.aclose()
            return
        usable = {name: transport for name, transport in self._transports.items() if name not in command.unfit}
        session = self._sessions[number] = ClientSession(
            Session(Side.CLIENT, client=self._terms(command, usable.values())),
            connection,
            number=number,
            source=str(source),
            ledger=self._pull.ledger,
            tell=self._tell,
            destination=self._destination,
            digest=self._digest,
            transports=usable,
            setup_timeout=self._options.timings.plan,
            stall=self._options.timings.stall,
            supply=self._supply,
        )
        self._tell(p.SessionStarted(number))
        ended: NetloaderError | None = None  # also when this is cancelled: that is no fault of the source
        try:
            await session.run()
            ended = session.session.error
        except Exception as bug:  # noqa: BLE001 - a bug may cost this source, not the fallback that follows
            _log.exception("source %s: unexpected error, the source is left", source)
            ended = _explained(bug)
        finally:
            del self._sessions[number]
            session.add_phases(self._report.phases)
            if session.lent.in_use is not None:
                self._memory_in_use = ended = session.lent.in_use
                self._scope.cancel()
            chosen = session.session.transport
            self._tell(
                p.SessionEnded(
                    number,
                    ended,
                    transport=chosen,
                    others=chosen in usable and len(usable) > 1,
                    opened=State.TRANSFER in session.clock.seconds(),
                    story=session.session.story,
                )
            )

    def _terms(self, command: p.Connect, transports: Iterable[Transport]) -> ClientTerms:
        options, relay = self._options, self._relay
        return replace(
            client_terms(options, abilities_of(transports, self._destination.device)),
            identity=self._identity,
            manifest=self._destination.manifest,
            manifest_digest=self._manifest_digest,
            role=self._role,
            root=command.root,
            pinned_by=command.pinned_by,
            node=self._supply.node,
            relay=0 if relay is None else relay.port,
            follow=options.follow,
            avoid=command.avoid,
            max_hops=options.max_hops,
        )

    def _pass_on(self, announcement: e.Announcement) -> None:
        """The first source was accepted: others may pull from us from here on."""
        self._manifest_digest = announcement.manifest_digest  # of what this pull adopted, where it brought nothing
        theirs = self._report.identity = announcement.identity
        identity = theirs if self._identity is None else passed_on(self._identity, theirs)
        own = self._report.announcement = replace(announcement, identity=identity)
        if self._relay is not None:
            self._relaying = True
            self._relay.add(_Relayed(own, _RelayMemory(self._destination), self._destination.device), self._supply)

    def _farewell(self) -> None:
        """Every block is verified: no source is waited for any more, whatever it is doing."""
        self._scope.deadline = anyio.current_time() + _FAREWELL
        for session in self._sessions.values():
            session.hurry(self._scope.deadline)

    def _tell_progress(self, session: int) -> None:
        self._supply.notify()
        if self._progress is None or self._error is not None:
            return
        ledger, seconds = self._pull.ledger, time.monotonic() - self._began
        source = self._sessions[session].source
        try:
            self._progress(Progress(ledger.verified_bytes, ledger.total_bytes or 0, seconds, source))
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


def _explained(bug: Exception) -> NetloaderError:
    return NetloaderError(
        f"unexpected {type(bug).__name__}: {bug}",
        hint="this is a bug in netloader: the log has the details",
    )
