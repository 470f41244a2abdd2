"""A fleet of replicas that pull from each other: servers, links and a registry around the decisions of real pulls.

`benchmarks.fleet_model` says what is simulated, and which bounds hold.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import DIGEST_BYTES, Manifest, TensorSpec, compute_root, manifest_digest
from netloader.core.options import PullOptions
from netloader.core.plan import MAX_BLOCK_BYTES, expand, make_plan, mask_of, ranges_of
from netloader.core.protocol.events import Announcement
from netloader.core.pull import Pull
from netloader.core.sources import Source
from netloader.errors import LocalProtocolError, NetloaderError, PeerLost, RefusedError

__all__ = ["Fleet", "Result", "Scenario", "simulate"]

_PORT = 19000
_BYTES = 16 << 30
"""Size of the model. Only how far ahead a pull requests depends on it."""


_STEPS = 60
"""Most steps of a run for each block of each replica: far more than any run needs that comes to an end."""


@dataclass(frozen=True)
class Scenario:
    """A fleet and its network. Times are in seconds.

    Attributes:
        replicas: Replicas that pull.
        blocks: Blocks of the model.
        seconds: What one link takes for the whole model, alone.
        seeds: Zone of each server that holds the model.
        zones: Zones; replicas are spread evenly.
        joining: Replicas begin to pull within this time, evenly at random.
        dying: Share of the replicas that die at some time of the pull.
        latency: From one replica to another, one way, within a zone.
        far: The same between zones.
        lost: Share of the blocks that are delayed by `resend` because packets were lost.
        resend: That delay.
        verify: From the arrival of a block until its replica has counted it.
        tell: Least time between two messages about new blocks to one client.
        connect: From the connection to the first request for blocks.
        publish: From a replica's first block until the others find it.
        known: Replicas of its own zone that each replica finds in the registry, and all seeds there.
        gateways: Replicas that find seeds and replicas of other zones too, in each zone without a seed.
        far_known: Replicas of other zones that each of them finds.
        stripe: Sources that a replica pulls from at once.
        fan_out: Clients that a server serves before it redirects others to them.
        shares: Clients that it serves if they pull from others already.
        turns: Clients that it serves in any case.
        one_window: A device moves one block at a time, in or out (HCCL).
        seed: Of all random choices.
    """

    replicas: int = 1000
    blocks: int = 256
    seconds: float = 12.8
    seeds: tuple[int, ...] = (0,)
    zones: int = 1
    joining: float = 0.0
    dying: float = 0.0
    latency: float = 0.0002
    far: float = 0.002
    lost: float = 0.0
    resend: float = 0.2
    verify: float = 0.002
    tell: float = 0.02
    connect: float = 0.01
    publish: float = 0.1
    known: int = 24
    gateways: int = 2
    far_known: int = 0
    stripe: int = 4
    fan_out: int = 1
    shares: int = 4
    turns: int = 8
    one_window: bool = False
    seed: int = 1


@dataclass(frozen=True)
class Result:
    """What a run showed.

    Attributes:
        done: Replicas that have every block.
        died: Replicas that died.
        failed: Replicas whose pull failed.
        last: Links' times from the first begin until the last replica was done.
        longest: The most that one replica took, from its own begin.
        median: The median of what replicas took.
        from_seeds: Models' worth of bytes that all seeds sent.
        between_zones: Models' worth of bytes that went from one zone to another.
        depth: Most hops that a block took from a seed.
        mean_depth: Mean of the hops.
        connects: Sessions per replica.
    """

    done: int
    died: int
    failed: int
    last: float
    longest: float
    median: float
    from_seeds: float
    between_zones: float
    depth: int
    mean_depth: float
    connects: float


def _announcement(blocks: int) -> Announcement:
    size = min(_BYTES // blocks, MAX_BLOCK_BYTES)
    manifest = Manifest((TensorSpec("w", "uint8", (blocks * size,)),))
    plan = make_plan(manifest, size)
    digests = b"".join(number.to_bytes(DIGEST_BYTES, "big") for number in range(blocks))
    known = manifest_digest(manifest)
    root = compute_root(manifest, size, "test", digests, known_digest=known)
    return Announcement(ModelIdentity(model="w"), manifest, known, plan, "test", digests, root)


def _ranges(mask: int) -> tuple[tuple[int, int], ...]:
    return ranges_of(mask)


@dataclass(eq=False)
class _Session:
    """One client at one server."""

    number: int
    client: _Replica
    server: _Replica
    wants: deque[int] = field(default_factory=deque)
    open_blocks: int = 0
    told: int = 0
    told_sent: int = 0
    own: int = 0
    partial: bool = False
    shared: bool = False
    joined: bool = False
    over: bool = False


@dataclass(eq=False)
class _Replica:
    """One replica, or one seed (`pull` is None)."""

    number: int
    zone: int
    pull: Pull | None = None
    begins: float = 0.0
    alive: bool = True
    have: int = 0
    sent: int = 0
    done_at: float | None = None
    failed: NetloaderError | None = None
    sessions: dict[int, _Session] = field(default_factory=dict)
    clients: dict[_Session, None] = field(default_factory=dict)
    turns: deque[_Session] = field(default_factory=deque)  # clients with blocks to send, the next one first
    sending: bool = False
    down_free: float = 0.0
    busy_until: float = 0.0
    telling: bool = False
    wakes: float = float("inf")
    depths: bytearray = field(default_factory=bytearray)

    @property
    def address(self) -> Address:
        return Address("replica", _PORT + self.number)


class Fleet:
    """A simulation.

    Args:
        scenario: What is simulated.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.known = _announcement(scenario.blocks)
        self._rng = random.Random(scenario.seed)  # noqa: S311 - a simulation
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._block = scenario.seconds / scenario.blocks
        self._far_blocks = self._seed_blocks = self._connects = 0
        every = (1 << scenario.blocks) - 1
        self.seeds = [
            _Replica(number, zone, have=every, depths=bytearray(scenario.blocks))
            for number, zone in enumerate(scenario.seeds)
        ]
        first = len(self.seeds)
        self.replicas = [_Replica(first + n, n % scenario.zones) for n in range(scenario.replicas)]
        self.all = [*self.seeds, *self.replicas]
        self._watchers: dict[int, list[_Replica]] = {}
        for one in self.replicas:
            self._prepare(one)
        for one in self._rng.sample(self.replicas, round(scenario.dying * scenario.replicas)):
            self._at(self._rng.uniform(0.0, scenario.joining + scenario.seconds), self._dies, one)

    def _prepare(self, one: _Replica) -> None:
        scenario, rng = self.scenario, self._rng
        one.depths = bytearray(scenario.blocks)
        one.begins = rng.uniform(0.0, scenario.joining)
        near = [other for other in self.replicas if other.zone == one.zone]
        finds = rng.sample(near, min(len(near), scenario.known))
        seeds = [seed for seed in self.seeds if seed.zone == one.zone]
        if not seeds and near.index(one) < scenario.gateways:  # the others of its zone get every block from these
            far = [other for other in self.replicas if other.zone != one.zone]
            finds += rng.sample(far, min(len(far), scenario.far_known))
            seeds = list(self.seeds)
        for other in finds:
            if other is not one:
                self._watchers.setdefault(other.number, []).append(one)
        rng.shuffle(seeds)
        options = PullOptions(stripe=scenario.stripe, wait=1e6, timeout=1e6)
        one.pull = Pull((), options, random.Random(one.number), began=one.begins, listing=10.0)  # noqa: S311
        self._at(one.begins, self._begins, one)
        self._at(one.begins, self._tell, one, p.SourcesFound([Source(seed.address) for seed in seeds]))

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Run until every replica is done, has failed or is dead."""
        waits, steps = len(self.replicas), 0
        most = _STEPS * (len(self.replicas) + 4) * (self.scenario.blocks + 50)
        while self._queue and waits:
            steps += 1
            if steps > most:
                raise LocalProtocolError(f"it does not end: {waits} replicas are not done at {self.now:.3f} s")
            self.now, _, action = heapq.heappop(self._queue)
            action()
            if self._changed:
                self._changed = False
                waits = sum(one.alive and one.done_at is None and one.failed is None for one in self.replicas)
        if waits:
            raise LocalProtocolError("nothing happens any more, and replicas are not done")
        return self._result()

    _changed = False

    def _at(self, at: float, action: Callable[..., None], *args: object) -> None:
        heapq.heappush(self._queue, (max(at, self.now), next(self._count), lambda: action(*args)))

    def _result(self) -> Result:
        done = [one for one in self.replicas if one.done_at is not None and one.alive]
        took = sorted((one.done_at or 0.0) - one.begins for one in done)
        last = max(((one.done_at or 0.0) for one in done), default=0.0)
        whole, seconds = self.scenario.blocks, self.scenario.seconds
        hops = [hop for one in done for hop in one.depths]
        return Result(
            len(done),
            sum(not one.alive for one in self.replicas),
            sum(one.failed is not None for one in self.replicas),
            last / seconds,
            took[-1] / seconds if took else 0.0,
            took[len(took) // 2] / seconds if took else 0.0,
            self._seed_blocks / whole,
            self._far_blocks / whole,
            max(hops, default=0),
            sum(hops) / max(1, len(hops)),
            self._connects / len(self.replicas),
        )

    def _begins(self, one: _Replica) -> None:
        if one.alive and one.pull is not None:
            self._carry_out(one, one.pull.begin(self.now))

    def _dies(self, one: _Replica) -> None:
        one.alive = False
        self._changed = True
        for session in [*one.sessions.values(), *one.clients]:
            self._end(session, PeerLost("it died"))

    def _tell(self, one: _Replica, event: p.Event) -> None:
        if one.alive and one.pull is not None and not one.pull.over:
            self._carry_out(one, one.pull.handle(event, self.now))

    def _carry_out(self, one: _Replica, commands: Iterable[p.Command]) -> None:
        for command in commands:
            match command:
                case p.Connect():
                    self._connect(one, command)
                case p.Accept(number):
                    self._ready(one.sessions[number])
                case p.RequestBlocks(number, ranges):
                    self._at(self.now + self._delay(one.sessions[number]), self._wanted, one.sessions[number], ranges)
                case p.Finish(number) | p.CancelSession(number) | p.LeaveSource(number) | p.Reject(number):
                    error = command.error if isinstance(command, p.Reject) else None
                    left = NetloaderError(command.reason) if isinstance(command, p.LeaveSource) else error
                    if number in one.sessions:
                        self._end(one.sessions[number], left)
                case p.StartRelaying():
                    self._at(self.now + self.scenario.publish, self._published, one)
                case p.Succeed():
                    one.done_at, self._changed = self.now, True
                case p.Fail(error):
                    one.failed, self._changed = error, True
                case _:
                    pass
        if one.pull is not None and not one.pull.over:
            wakes = one.pull.wake_at(self.now)
            if wakes is not None and wakes < one.wakes:
                one.wakes = wakes
                self._at(wakes, self._wake, one, wakes)

    def _wake(self, one: _Replica, meant: float) -> None:
        if one.wakes != meant or one.pull is None or one.pull.over:
            return
        one.wakes = float("inf")
        wakes = one.pull.wake_at(self.now)
        if wakes is not None and wakes <= self.now:
            self._tell(one, p.TimerFired())
        elif wakes is not None:
            one.wakes = wakes
            self._at(wakes, self._wake, one, wakes)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def _delay(self, session: _Session) -> float:
        near = session.client.zone == session.server.zone
        return self.scenario.latency if near else self.scenario.far

    def _connect(self, one: _Replica, command: p.Connect) -> None:
        server = self.all[command.source.port - _PORT]
        session = one.sessions[command.session] = _Session(command.session, one, server)
        self._connects += 1
        self._at(self.now + 2 * self._delay(session), self._asked, session, command)

    def _asked(self, session: _Session, command: p.Connect) -> None:
        """The server decides whether it serves a client."""
        if session.over:
            return
        server = session.server
        if not server.alive:
            self._end(session, PeerLost("nobody is there"))
        elif not server.have:
            self._end(session, RefusedError("not-ready", "no block yet", retry_after=0.2))
        elif len(server.clients) >= self._room_for(command):
            named = [str(other.client.address) for other in reversed(server.clients) if other.client.have]
            usable = tuple(name for name in named if name not in command.avoid) if command.follow else ()
            self._end(session, RefusedError("busy", "others pass it on", retry_after=1.0, sources=usable))
        else:
            session.shared = server.pull is None and bool(server.clients)
            server.clients[session] = None
            session.partial = server.pull is not None and not server.pull.ledger.complete
            self._at(self.now + self._delay(session), self._announced, session)

    def _room_for(self, command: p.Connect) -> int:
        if command.others:
            return self.scenario.shares
        return self.scenario.fan_out if command.follow else self.scenario.turns

    def _announced(self, session: _Session) -> None:
        if not session.over:
            self._tell(session.client, p.SessionStarted(session.number))
            self._tell(session.client, p.HoldingAnnounced(session.number, self.known, session.partial, session.shared))

    def _ready(self, session: _Session) -> None:
        self._at(self.now + self.scenario.connect, self._opened, session)

    def _opened(self, session: _Session) -> None:
        if session.over:
            return
        session.joined = True
        self._tell(session.client, p.SessionReady(session.number))
        self._tell_client(session)
        self._tell(session.client, p.SessionIdle(session.number))

    def _end(self, session: _Session, error: NetloaderError | None) -> None:
        if session.over:
            return
        session.over = True
        session.wants.clear()
        session.server.clients.pop(session, None)
        self._at(self.now + self._delay(session), self._ended, session, error)

    def _ended(self, session: _Session, error: NetloaderError | None) -> None:
        session.client.sessions.pop(session.number, None)
        self._tell(session.client, p.SessionEnded(session.number, error, "model", opened=session.joined))

    # --- the registry -----------------------------------------------------------------------------------------------

    def _published(self, one: _Replica) -> None:
        if one.alive:
            for other in self._watchers.get(one.number, ()):
                if other.begins <= self.now:
                    self._tell(other, p.SourcesFound([Source(one.address)]))
                else:
                    self._at(other.begins, self._tell, other, p.SourcesFound([Source(one.address)]))

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _tell_clients(self, server: _Replica) -> None:
        """Tell the clients of a server about its blocks, soon."""
        if not server.telling and server.clients:
            server.telling = True
            self._at(self.now + self.scenario.tell, self._tell_now, server)

    def _tell_now(self, server: _Replica) -> None:
        server.telling = False
        for session in list(server.clients):
            if session.joined:
                self._tell_client(session)

    def _tell_client(self, session: _Session) -> None:
        server = session.server
        has = server.have & ~session.told if session.partial else 0
        sent = server.sent & ~(session.told_sent | session.own)
        if has or sent:
            session.told |= has
            session.told_sent |= sent
            event = p.BlocksOffered(session.number, _ranges(has), _ranges(sent))
            self._at(self.now + self._delay(session), self._offered, session, event)

    def _offered(self, session: _Session, event: p.BlocksOffered) -> None:
        if not session.over:
            self._tell(session.client, event)

    def _wanted(self, session: _Session, ranges: tuple[tuple[int, int], ...]) -> None:
        if session.over:
            return
        server, numbers = session.server, expand(ranges)
        mask = mask_of(ranges)
        if mask & ~server.have:
            raise LocalProtocolError("a replica was asked for a block that it does not have")
        if server.pull is None:
            server.sent |= mask
            session.own |= mask
            self._tell_clients(server)
        if not session.wants:
            server.turns.append(session)
        session.wants.extend(numbers)
        session.open_blocks += len(numbers)
        self._send_next(server)

    def _send_next(self, server: _Replica) -> None:
        """Send one block of the next client, if the uplink is free."""
        while not server.sending and server.turns:
            session = server.turns.popleft()
            if session.over or not session.wants:
                continue
            client, number = session.client, session.wants.popleft()
            if session.wants:
                server.turns.append(session)
            server.sending = True
            begins = self.now
            if self.scenario.one_window:  # both devices are taken for one block
                begins = max(begins, server.busy_until, client.busy_until)
                server.busy_until = client.busy_until = begins + self._block
            left = begins + self._block
            client.down_free = arrives = max(left + self._delay(session), client.down_free + self._block)
            if self._rng.random() < self.scenario.lost:
                arrives += self.scenario.resend
            self._at(left, self._sent, server)
            self._at(arrives + self.scenario.verify, self._arrived, session, number)

    def _sent(self, server: _Replica) -> None:
        server.sending = False
        if server.alive:
            self._send_next(server)

    def _arrived(self, session: _Session, number: int) -> None:
        one, server = session.client, session.server
        if session.over or not one.alive:
            return
        if server.pull is None:
            self._seed_blocks += 1
        if server.zone != one.zone:
            self._far_blocks += 1
        session.open_blocks -= 1
        one.depths[number] = server.depths[number] + 1
        one.have |= 1 << number
        self._tell(one, p.BlocksArrived(session.number, [(number, number.to_bytes(DIGEST_BYTES, "big"))]))
        self._tell_clients(one)
        if not session.open_blocks and not session.over:
            self._tell(one, p.SessionIdle(session.number))


def simulate(scenario: Scenario) -> Result:
    """Run one scenario."""
    return Fleet(scenario).run()
