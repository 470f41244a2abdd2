"""A simulation of a fleet around one pull: each source has a script, time is simulated, and there are no sockets."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import DIGEST_BYTES, Manifest, TensorSpec, compute_root, manifest_digest
from netloader.core.options import PullOptions
from netloader.core.plan import Plan, expand, make_plan, to_ranges
from netloader.core.protocol.events import Announcement
from netloader.core.pull import Pull
from netloader.core.sources import Source as Offered
from netloader.errors import (
    DigestMismatch,
    NetloaderError,
    NoSourceLeft,
    PeerLost,
    RefusedError,
    RootMismatch,
    TransferTimeout,
    TransportUnavailable,
)

BLOCK = 1024
SILENCE = 30.0
"""Seconds after which the session with a silent source ends by its deadline."""

LATENCY = 0.01
LISTING = 10.0
MOMENTS = 50
STEPS = 5000


def announcement(blocks: int, salt: bytes = b"") -> Announcement:
    """Weights of this many blocks. Another `salt` gives other weights of equal shape."""
    manifest = Manifest((TensorSpec("w", "uint8", (blocks * BLOCK,)),))
    plan = make_plan(manifest, BLOCK)
    digests = b"".join(digest_of(number, salt) for number in range(blocks))
    known = manifest_digest(manifest)
    root = compute_root(manifest, BLOCK, "test", digests, known_digest=known)
    return Announcement(ModelIdentity(model="w"), manifest, known, plan, "test", digests, root)


def digest_of(number: int, salt: bytes) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "big") + salt, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class Source:
    """How one source behaves. The defaults are those of a source without faults.

    Attributes:
        per_block: Seconds that a block takes.
        queue: Seconds that a client waits for its turn.
        ready_at: Before this time it answers "not ready", or can't be reached if `absent`.
        dies_after: Blocks of each session after which the connection is lost; never when None.
        dead_from: From this time on it can't be reached.
        lacks: Blocks that it does not have.
        salt: Which weights it holds.
        lies_at: Block that arrives with wrong bytes.
        silent: It sends nothing after the connection; `mute`: it never sends a block.
        unreachable: Connecting to it neither succeeds nor fails for a long time.
        relays: Numbers of the relays to which it redirects new clients, before it serves them itself.
        only: The only transport that works with it; all do when empty.
    """

    per_block: float = 0.01
    queue: float = 0.0
    ready_at: float = 0.0
    absent: bool = False
    dies_after: int | None = None
    dead_from: float = float("inf")
    lacks: frozenset[int] = frozenset()
    salt: bytes = b""
    lies_at: int | None = None
    silent: bool = False
    mute: bool = False
    unreachable: bool = False
    relays: tuple[int, ...] = ()
    only: str = ""

    @property
    def reliable(self) -> bool:
        """Whether it sends every block that it has to a client that waits long enough."""
        faults = self.dies_after is not None or self.lies_at is not None or self.silent or self.mute or self.unreachable
        return not faults and self.dead_from == float("inf") and not self.salt


TRANSPORTS = ("fast", "plain")


@dataclass
class _Talk:
    source: Source
    transport: str
    asked: deque[int] = field(default_factory=deque)
    sent: int = 0
    opened: bool = False
    sending: bool = False
    over: bool = False
    left: bool = False


@dataclass
class World:
    """One pull and its sources.

    Attributes:
        blocks: Blocks of the model.
        sources: By number; addresses are made of these.
        given: Numbers of the sources that the pull is given, in order.
        appears: When each of those is found; all are known at the beginning when empty.
        vanishes: When each of those vanishes from the provider; it continues to serve.
    """

    blocks: int
    sources: Sequence[Source]
    given: Sequence[int]
    stripe: int = 2
    wait: float = 0.0
    timeout: float = 10_000.0
    adopts: bool = False
    seed: int = 0
    appears: Sequence[float] = ()
    vanishes: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.now = 0.0
        self.outcome: p.Succeed | NoSourceLeft | None = None
        self.connects: Counter[int] = Counter()
        self.asked: Counter[int] = Counter()
        self.verified: Counter[int] = Counter()
        self.ended_at = self.last_block_at = 0.0
        self.relaying = False
        self._count = itertools.count()
        self._queue: list[tuple[float, int, p.Event]] = []
        self._talks: dict[int, _Talk] = {}
        self._announced = {salt: announcement(self.blocks, salt) for salt in (b"", b"other")}
        delivers_others = any(s.salt and not s.mute for s in self.sources)
        expect = self._announced[b""].root if delivers_others else ""
        options = PullOptions(stripe=self.stripe, wait=self.wait, expect_root=expect)
        offered = [Offered(self._address(n)) for n in self.given]
        self.pull = Pull(
            () if self.appears else offered,
            options,
            random.Random(self.seed),
            adopts=self.adopts,
            listing=LISTING if self.appears else None,
        )
        for source, at in zip(offered, self.appears, strict=False):
            self._later(at, p.SourcesFound([source]))
        for source, at in zip(offered, self.vanishes, strict=False):
            self._later(at, p.SourceLost(source.address))
        if self.appears:
            self._later(LISTING, p.Listed())
            self._later(max(self.appears), p.SearchEnded())

    @staticmethod
    def _address(number: int) -> Address:
        return Address("10.0.0.1", 1000 + number)

    @property
    def plan(self) -> Plan:
        return self._announced[b""].plan

    def run(self) -> None:
        """Run the simulation to the end, and check the invariants at each step."""
        last, moments, steps = -1.0, 0, 0
        self._carry_out(self.pull.begin(self.now))
        while self.outcome is None:
            self._check()
            steps += 1
            assert steps < STEPS, "the pull does not end"
            wake = self.pull.wake_at(self.now)
            due = self._queue[0][0] if self._queue else None
            times = [at for at in (wake, due, self.timeout) if at is not None]
            at = max(min(times), self.now)  # a source may be overdue already when another one begins to wait
            assert wake is not None or due is not None, "the pull waits without a timer or an event"
            self.now = at
            if at == self.timeout:
                self._tell(p.DeadlinePassed(self.timeout))
            elif due is not None and due <= at:
                event = heapq.heappop(self._queue)[2]
                self._tell(event)
            else:
                self._tell(p.TimerFired())
                moments = moments + 1 if self.now == last else 0
                last = self.now
                assert moments < MOMENTS, "the timer fires again and again at the same time"
            assert sum(self.connects.values()) <= self._most_connects(), "it connects without end"
        self.ended_at = self.now
        self._check()

    def _most_connects(self) -> int:
        # While it waits, a source is asked again after pauses of 0.1 s and more, soon of 2.5 s and more.
        return len(self.sources) * (12 + 10 * len(self.sources) + int(self.wait))

    def _tell(self, event: p.Event) -> None:
        complete = self.pull.ledger.complete
        if isinstance(event, p.BlocksArrived) and event.session in self._talks:
            self.verified.update(number for number, _ in event.blocks)
        self._carry_out(self.pull.handle(event, self.now))
        if self.pull.ledger.complete and not complete:
            self.last_block_at = self.now
            assert isinstance(self.outcome, p.Succeed), "every block is verified, and the pull goes on"

    def _check(self) -> None:
        ledger = self.pull.ledger
        ledger.check_invariants()
        assert all(count == 1 for count in self.verified.values()), "a block counts twice"
        if isinstance(self.outcome, p.Succeed):
            assert ledger.complete
            assert ledger.root == self._announced[b""].root
        elif self.outcome is not None:
            assert not ledger.complete
            assert self.outcome.attempts, "it failed without a reason"

    # --- commands ---------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, event: p.Event) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._count), event))

    def _carry_out(self, commands: Sequence[p.Command]) -> None:
        for command in commands:
            assert self.outcome is None, f"{command} after the end"
            match command:
                case p.Connect():
                    self._connect(command)
                case p.Allocate(session, _):
                    self._later(0.5, p.MemoryAllocated(session))
                case p.Accept(session):
                    self._accept(session)
                case p.RequestBlocks(session, ranges):
                    self._ask(session, expand(ranges))
                case p.Reject(session, error):
                    self._end(session, error)
                case p.LeaveSource(session, reason):
                    self._talks[session].left = True
                    if not self._talks[session].source.unreachable:  # a connection that is not there can't be ended
                        self._talks[session].over = False  # it may have been going to end later
                        self._end(session, NetloaderError(reason))
                case p.Finish(session) | p.CancelSession(session):
                    self._end(session, None)
                case p.Succeed():
                    self.outcome = command
                case p.Fail(NoSourceLeft() as error):
                    self.outcome = error
                case p.StartRelaying():
                    assert self.pull.ledger.verified_blocks or not self.blocks, "passed on before anything was verified"
                    assert not self.relaying, "passed on twice"
                    self.relaying = True
                case p.FreeMemory():
                    assert self.adopts
                    assert not self.pull.ledger.verified_blocks
                case p.Log():
                    pass

    def _end(self, number: int, error: NetloaderError | None, seconds: float = LATENCY) -> None:
        talk = self._talks.get(number)
        if talk is None or talk.over:
            return
        talk.over = True
        transport = talk.transport
        others = len(TRANSPORTS) > 1
        self._later(
            seconds, p.SessionEnded(number, error, transport, others and bool(transport), talk.opened, ("story",))
        )
        # Blocks in flight do not arrive any more.
        self._queue = [
            entry
            for entry in self._queue
            if isinstance(entry[2], p.SessionEnded | p.MemoryAllocated) or getattr(entry[2], "session", None) != number
        ]
        heapq.heapify(self._queue)

    def _connect(self, command: p.Connect) -> None:
        index = command.source.port - 1000
        source, number = self.sources[index], command.session
        self.connects[index] += 1
        running = sum(not (talk.over or talk.left) for talk in self._talks.values())
        assert running < max(1, self.stripe), "more sources than allowed"
        usable = [name for name in TRANSPORTS if name not in command.unfit]
        talk = self._talks[number] = _Talk(source, "")
        gone = self.now >= source.dead_from or (source.absent and self.now < source.ready_at)
        if gone:
            self._end(number, PeerLost("nobody is there"))
            return
        if source.unreachable:
            self._end(number, PeerLost("it did not answer"), SILENCE)
            return
        self._later(0.0, p.SessionStarted(number))
        if source.silent:
            self._end(number, TransferTimeout("it says nothing"), SILENCE)
        elif self.now < source.ready_at:
            self._end(number, RefusedError("not-ready", f"loading, {self.now} s", retry_after=1.0))
        elif command.follow and any(str(self._address(relay)) not in command.avoid for relay in source.relays):
            named = tuple(str(self._address(relay)) for relay in source.relays)
            self._end(number, RefusedError("busy", "others pass it on", retry_after=5.0, sources=named))
        elif command.root and command.root != self._announced[source.salt].root:
            self._end(number, RootMismatch(command.root, "other", command.pinned_by))
        elif not usable:
            self._end(number, TransportUnavailable("none is left"))
        else:
            talk.transport = usable[0]
            if source.queue:
                self._later(LATENCY, p.SessionQueued(number))
            self._later(LATENCY + source.queue, p.HoldingAnnounced(number, self._announced[source.salt]))

    def _accept(self, number: int) -> None:
        talk = self._talks[number]
        if talk.over:
            return
        if talk.source.only and talk.transport != talk.source.only:
            self._end(number, TransportUnavailable("it can't be set up"))
            return
        talk.opened = True
        self._later(LATENCY, p.SessionReady(number))
        self._later(LATENCY, p.SessionIdle(number))

    def _ask(self, number: int, numbers: Sequence[int]) -> None:
        talk = self._talks[number]
        assert talk.opened, "asked before the channel was open"
        if talk.over:
            return
        self.asked.update(numbers)
        lacking = [n for n in numbers if n in talk.source.lacks]
        talk.asked.extend(n for n in numbers if n not in talk.source.lacks)
        if lacking:
            self._later(0.0, p.BlocksDenied(number, to_ranges(lacking), "it was dropped"))
            if not talk.asked:
                self._later(0.0, p.SessionIdle(number))
        if talk.asked and not talk.sending:
            talk.sending = True
            self._send(number, talk)

    def _send(self, number: int, talk: _Talk) -> None:
        """Send all requested blocks, one by one."""
        source = talk.source
        if source.mute:
            self._end(number, TransferTimeout("no block came"), SILENCE)
            return
        at = 0.0
        while talk.asked:
            block = talk.asked.popleft()
            at += source.per_block
            if source.lies_at == block:
                self._end(number, DigestMismatch(block, ("w",), "a", "b"), at)
                return
            if talk.sent == source.dies_after or self.now + at >= source.dead_from:
                self._end_after(number, PeerLost("the connection broke"), at)
                return
            talk.sent += 1
            self._later(at, p.BlocksArrived(number, [(block, digest_of(block, source.salt))]))
        self._later(at, p.SessionIdle(number))
        talk.sending = False

    def _end_after(self, number: int, error: NetloaderError, seconds: float) -> None:
        """The session ends once the blocks sent before have arrived."""
        talk = self._talks[number]
        talk.over = True
        self._later(seconds, p.SessionEnded(number, error, talk.transport, others=True, opened=True, story=("story",)))
