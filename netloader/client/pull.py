"""The client: pulls from sources until every block is verified or no source is left.

Knows nothing of torch: what it fills comes as a :class:`~netloader.client.session.Destination`; ``netloader.pull`` puts
tensors in front of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import anyio

from netloader.client.connect import ClientOptions, abilities_of, client_terms, connect
from netloader.client.session import ClientSession, Destination, Digest
from netloader.codecs.block_view import BlockView
from netloader.core.addresses import Address, parse_address
from netloader.core.identity import ModelIdentity, Role, passed_on
from netloader.core.ledger import Ledger
from netloader.core.manifest import manifest_digest
from netloader.core.messages import MAX_SOURCES
from netloader.core.plan import Plan
from netloader.core.protocol import ClientTerms, Session, Side, State
from netloader.core.protocol import events as e
from netloader.core.report import Progress, ProgressCallback, PullReport, SourceShare
from netloader.core.sources import Sources
from netloader.errors import (
    AttemptFailed,
    ConfigError,
    MemoryStillInUse,
    NetloaderError,
    NoSourceLeft,
    PeerLost,
    RefusedError,
    TransferTimeout,
    TransportError,
    TransportUnavailable,
)
from netloader.session.driver import FEW_TENSORS
from netloader.session.holding import Holding
from netloader.session.relay_progress import Supply
from netloader.transports.base import Transport

__all__ = ["RelayServer", "pull_from"]

_log = logging.getLogger("netloader")

_SOON_OVER = ("not-ready", "busy", "gone")
"""Refusals that may be over soon."""

_IMPATIENCE = 2.0
"""Seconds without a block after which a source may be left when another one could take over its blocks."""

_SEVERAL = 2
"""Sources at once from which on one can be slower than another."""

_RELAY_RETRACTION = 1.0
"""Seconds that clients of a relay whose own pull failed may take to let go of its memory."""

_FAREWELL = 0.05
"""Seconds that the goodbyes may take once every block is verified: the pull has what it came for."""

_QUEUE_LOOK = 0.25
"""Seconds between two looks whether the first source lets us wait, so that the second one may be asked meanwhile."""


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
    """One pull: the sources it tries, and what came of it."""

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
        self._relay = relay
        self._relaying = False
        self._manifest_digest = ""
        self._destination = destination
        self._identity = identity
        self._transports = {transport.name: transport for transport in transports}
        self._unfit_transports: dict[Address, set[str]] = {}
        self._digest = digest
        self._options = options
        self._progress = progress
        self._ledger = Ledger(options.expect_root, "EXPECT_ROOT" if options.expect_root else "")
        self._supply = Supply(self._ledger)
        self._report = PullReport()
        self._attempts: dict[tuple[str, str], AttemptFailed] = {}
        self._began = time.monotonic()
        self._sessions: set[ClientSession] = set()
        self._pinning = anyio.Lock()
        self._changed = anyio.Event()
        self._candidates = Sources((), tries=1, until=0.0)
        self._source = ""
        self._scope = anyio.CancelScope()
        self._workers = anyio.CancelScope()
        self._callers_error: Exception | None = None
        self._memory_in_use: MemoryStillInUse | None = None

    async def run(self, sources: Sequence[Address]) -> PullReport:
        try:
            with self._scope:
                self._scope.deadline = anyio.current_time() + self._options.timeout
                await self._pull_all(sources)
        finally:
            given = self._ledger.complete and self._memory_in_use is None
            if self._relay is not None and self._relaying and not given:
                # The memory is the caller's again: nobody may read it any more.
                with anyio.CancelScope(shield=True):  # each of its steps has a deadline
                    await self._relay.retract(self._role, reason="its own pull failed", within=_RELAY_RETRACTION)
            if self._memory_in_use is not None:
                raise self._memory_in_use
        if self._callers_error is not None:
            raise self._callers_error
        if not self._ledger.complete:
            if self._scope.cancelled_caught:
                late = TransferTimeout(f"the pull did not end within {self._options.timeout:g} s", hint="raise TIMEOUT")
                self._failed(self._source or "all sources", late)
            verified, total = self._ledger.verified_bytes, self._ledger.total_bytes
            raise NoSourceLeft(tuple(self._attempts.values()), verified=verified, total=total)
        return self._account()

    @property
    def _role(self) -> Role:
        return self._options.role if self._identity is None else self._identity.role

    async def _pull_all(self, sources: Sequence[Address]) -> None:
        """Pull from several sources at once until all blocks are verified, or nothing is left to try."""
        options, manifest = self._options, self._destination.manifest
        if manifest is not None:
            few = len(manifest.tensors) <= FEW_TENSORS
            self._manifest_digest = (
                manifest_digest(manifest) if few else await anyio.to_thread.run_sync(manifest_digest, manifest)
            )
        self._candidates = Sources(sources, tries=options.tries, until=self._began + options.wait)
        async with anyio.create_task_group() as tasks:
            with self._workers:
                async with anyio.create_task_group() as workers:

                    def begin(number: int) -> None:
                        if number == _SEVERAL:
                            tasks.start_soon(self._watch_slow_ones)
                        if number < max(1, options.stripe):
                            workers.start_soon(self._work, partial(begin, number + 1))

                    begin(0)
            tasks.cancel_scope.cancel()

    async def _work(self, busy: Callable[[], None]) -> None:
        """Pull from one source after the other; `busy` is called at the first one, and has another worker begin."""
        candidates, called = self._candidates, False
        while not (self._ledger.complete or self._memory_in_use):
            changed = self._changed
            now = time.monotonic()
            # Before the first source is accepted there is one at a time: the first one in the list decides the root.
            queued = sum(session.session.queued for session in self._sessions)
            alone = self._ledger.plan is None and candidates.running > queued
            source = None if alone else candidates.take(now, work=self._ledger.plan is None or self._ledger.idle)
            if source is not None:
                if not called:
                    called = True
                    busy()
                await self._try(source)
                self._change()
                continue
            due = now + _QUEUE_LOOK if alone else candidates.next_due(now)
            if due is None and not candidates.running:
                return
            with anyio.move_on_after(None if due is None else max(0.0, due - now)):
                await changed.wait()

    async def _try(self, source: Address) -> None:
        """One session with `source`, and what follows from how it went."""
        before = self._report.sources[str(source)].blocks if str(source) in self._report.sources else 0
        error = await self._session_with(source)
        if self._memory_in_use is not None:
            return  # whatever comes of the source: no other one may fill this memory
        now = time.monotonic()
        if error is None:
            self._candidates.rest(source)
            return
        share = self._report.sources.get(str(source))
        progressed = share is not None and share.blocks > before
        if isinstance(error, RefusedError) and error.sources:
            relays = _named(error.sources)
            if error.code == "gone":
                _log.info("source %s: %s; it had them from %s", source, error.message, ", ".join(map(str, relays)))
                self._failed(str(source), error)
                self._candidates.gone(source, relays, now, error.retry_after)
                return
            if self._candidates.redirect(source, relays, now):
                _log.info("source %s: %s; going on to %s", source, error.message, ", ".join(map(str, relays)))
                return
        self._failed(str(source), error)
        if self._candidates.can_be_spared(source) and (isinstance(error, PeerLost) or _says(error, "gone")):
            # It was there when it was named to us, and while it is waited for, whoever named it is not asked again.
            self._candidates.drop(source)
            return
        match _what_next(error, progressed=progressed):
            case "later":
                self._candidates.later(source, now, error.retry_after if isinstance(error, RefusedError) else None)
            case "again":
                self._candidates.again(source, now)
            case "last":
                self._candidates.again(source, now, last=True)
            case _:
                self._candidates.drop(source)

    async def _watch_slow_ones(self) -> None:
        """Leave a session that moves nothing while others have nothing left to do."""
        while True:
            await anyio.sleep(_IMPATIENCE / 4)
            if any(session.parked for session in self._sessions):
                for session in self._sessions:
                    if not session.parked and session.overdue(_IMPATIENCE):
                        session.feed(e.Cancelled("its blocks are taken over by faster sources", "timeout"))

    def _change(self) -> None:
        """Wake whoever waits for blocks or candidates."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
        for session in tuple(self._sessions):
            session.wake()

    def _dismiss_all(self) -> None:
        """Every block is verified: no source is waited for any more, whatever it is doing."""
        self._workers.deadline = anyio.current_time() + _FAREWELL
        for session in tuple(self._sessions):
            session.dismiss(self._workers.deadline)
        self._change()

    def _failed(self, source: str, error: NetloaderError) -> None:
        """Account for a try that failed. A source that is waited for says the same again and again: told once."""
        attempt = AttemptFailed(source, error)
        # By kind, not by text: that may hold a number, and another one each time.
        key = (source, error.code if isinstance(error, RefusedError) else type(error).__name__)
        known = key in self._attempts
        self._attempts.setdefault(key, attempt)
        self._report.retries += 1
        _log.log(logging.DEBUG if known else logging.WARNING, "source %s: %s", source, error)

    async def _session_with(self, source: Address) -> NetloaderError | None:
        """One session with one source; the error that ended it, or None."""
        self._source = str(source)
        began = time.monotonic()
        try:
            connection = await connect(source, self._options.connect_timeout)
        except PeerLost as error:
            return error
        finally:
            self._report.phases.connect += time.monotonic() - began
        if self._ledger.complete:  # by another session, meanwhile
            await connection.aclose()
            return None
        usable = {name: self._transports[name] for name in self._transports if name not in self._unfit(source)}
        terms = self._terms(usable.values())
        session = ClientSession(
            Session(Side.CLIENT, client=terms),
            connection,
            source=str(source),
            ledger=self._ledger,
            destination=self._destination,
            digest=self._digest,
            transports=usable,
            share=self._report.sources.setdefault(str(source), SourceShare()),
            setup_timeout=self._options.timings.plan,
            stall=self._options.timings.stall,
            supply=self._supply,
            pinning=self._pinning,
            pinned=self._pinned,
            progressed=partial(self._tell_progress, str(source)),
        )
        self._sessions.add(session)
        try:
            await session.run()
        except Exception as error:  # noqa: BLE001 - a bug may cost this source, not the fallback that follows
            _log.exception("source %s: unexpected error, the source is left", source)
            return NetloaderError(
                f"unexpected {type(error).__name__}: {error}",
                hint="this is a bug in netloader: the log has the details",
            )
        finally:
            self._sessions.discard(session)
            session.add_phases(self._report.phases)
            if session.session.announcement is not None:  # here: a complete pull does not wait for every goodbye
                self._report.identity = session.session.announcement.identity
            if session.lent.in_use is not None:
                self._memory_in_use = session.lent.in_use
                self._scope.cancel()
        if self._memory_in_use is not None:
            return self._memory_in_use
        if session.dismissed:
            return None
        if session.session.error is None and session.denied and not self._ledger.complete:
            text = f"it could not give every block: {session.denied}"
            hint = "add a source that holds all of them"
            lacking = RefusedError("gone", text, hint=hint, sources=session.elsewhere)
            lacking.story = session.session.story
            return lacking
        if self._goes_otherwise(source, session, usable):
            return await self._session_with(source)
        return session.session.error

    def _unfit(self, source: Address) -> set[str]:
        """Transports that turned out not to work with `source`, whatever both sides said about themselves."""
        return self._unfit_transports.setdefault(source, set())

    def _goes_otherwise(self, source: Address, session: ClientSession, usable: Mapping[str, Transport]) -> bool:
        """Whether the chosen transport could not be set up, and another one may do."""
        error, chosen = session.session.error, session.session.transport
        unfit = isinstance(error, TransportUnavailable) or _says(error, "transport")
        if not unfit or chosen not in usable or len(usable) == 1 or State.TRANSFER in session.clock.seconds():
            return False
        self._unfit(source).add(chosen)
        _log.warning("source %s: not by %s: %s", source, chosen, error)
        return True

    def _terms(self, transports: Iterable[Transport]) -> ClientTerms:
        options, relay = self._options, self._relay
        return replace(
            client_terms(options, abilities_of(transports, self._destination.device)),
            identity=self._identity,
            manifest=self._destination.manifest,
            manifest_digest=self._manifest_digest,
            role=self._role,
            root=self._ledger.root,
            pinned_by=self._ledger.pinned_by,
            node=self._supply.node,
            relay=0 if relay is None else relay.port,
            follow=options.follow,
            avoid=tuple(str(address) for address in self._candidates.avoid[-MAX_SOURCES:]),
            max_hops=options.max_hops,
        )

    def _pinned(self, announcement: e.Announcement) -> None:
        """The first source was accepted: others may pull from us from here on."""
        self._manifest_digest = announcement.manifest_digest  # of what this pull adopted, where it brought nothing
        theirs = announcement.identity
        identity = theirs if self._identity is None else passed_on(self._identity, theirs)
        own = self._report.announcement = replace(announcement, identity=identity)
        if self._relay is not None and not self._relaying:
            self._relaying = True
            self._relay.add(_Relayed(own, _RelayMemory(self._destination), self._destination.device), self._supply)

    def _tell_progress(self, source: str) -> None:
        self._supply.notify()
        if self._ledger.complete:
            self._dismiss_all()
        if self._progress is not None and self._callers_error is None:
            seconds = time.monotonic() - self._began
            total = self._ledger.total_bytes or 0
            try:
                self._progress(Progress(self._ledger.verified_bytes, total, seconds, source))
            except Exception as error:  # noqa: BLE001 - the caller's own: raised to the caller, once all is closed
                self._callers_error = error
                self._scope.cancel()

    def _account(self) -> PullReport:
        report, plan = self._report, self._ledger.plan
        report.root = self._ledger.root
        report.nbytes, report.blocks = self._ledger.verified_bytes, self._ledger.verified_blocks
        report.tensors = 0 if plan is None else len(plan.manifest.tensors)
        report.seconds = time.monotonic() - self._began
        report.attempts = tuple(self._attempts.values())
        return report


def _says(error: NetloaderError | None, code: str) -> bool:
    """Whether it is a refusal with this code."""
    return isinstance(error, RefusedError) and error.code == code


def _what_next(error: NetloaderError, *, progressed: bool) -> Literal["again", "last", "later", "drop"]:
    """Whether a source is worth another try: at once, after all others, after a pause (within WAIT), or not at all."""
    if isinstance(error, RefusedError) and error.code in _SOON_OVER:
        return "later"
    if isinstance(error, TransferTimeout | TransportUnavailable):
        return "drop"
    # It is there, and gave us up as too slow: this process or its host may have stood still for a while.
    if _says(error, "timeout"):
        return "last" if progressed else "drop"
    # Where a channel broke, the other end's farewell may be heard before the channel itself is seen to be broken.
    if isinstance(error, TransportError) or _says(error, "transport"):
        return "again" if progressed else "later"
    return "drop"


def _named(sources: Sequence[str]) -> list[Address]:
    """The addresses that a server named; what makes no sense is left out, since it is a peer's word."""
    found = []
    for text in sources:
        try:
            found.append(parse_address(text))
        except ConfigError as error:
            _log.debug("a server named a source that is no address: %s", error.message)
    return found
