"""A server session and a client session joined by two byte pipes and a block channel, all in one thread.

This is a driver without I/O: effects become tasks, which a test finishes in any order and with any outcome. It checks
the invariants at every step, and records all messages.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from netloader.codecs.frames import client_messages, encode_frame, seal_frame, server_messages
from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.core.keys import FrameSeal
from netloader.core.ledger import BlockState, Ledger
from netloader.core.manifest import Manifest, TensorSpec, compute_root, manifest_digest
from netloader.core.options import PullOptions, ServeOptions
from netloader.core.plan import Plan, Ranges, expand, make_plan, to_ranges
from netloader.core.protocol import FINAL, ClientTerms, ServerTerms, Session, Side, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.announcement import examine
from netloader.errors import DigestMismatch, LocalProtocolError, NetloaderError, PeerLost, RemoteProtocolError

BLOCK = 1024
ABILITIES = (m.Ability("memory"), m.Ability("gloo", {"host": "h"}))
IDENTITY = ModelIdentity(model="m", dtype="bfloat16")
SERVER_NONCE, CLIENT_NONCE = b"s" * 16, b"c" * 16


def digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True)
class Weights:
    """What a server holds: some blocks. Another `salt` gives other weights."""

    blocks: int = 4
    salt: bytes = b""
    identity: ModelIdentity = IDENTITY

    @property
    def manifest(self) -> Manifest:
        size = max(self.blocks * BLOCK - 9, 0)
        return Manifest((TensorSpec("w", "uint8", (size,)), TensorSpec("w.tied", "uint8", (size,), alias_of="w")))

    def content(self, number: int) -> bytes:
        return self.salt + b"block %d" % number

    def announcement(self) -> e.Announcement:
        manifest = self.manifest
        plan = make_plan(manifest, BLOCK)
        assert len(plan.blocks) == self.blocks
        digests = b"".join(digest_of(self.content(n)) for n in range(self.blocks))
        root = compute_root(manifest, BLOCK, "test", digests)
        return e.Announcement(self.identity, manifest, manifest_digest(manifest), plan, "test", digests, root)


_CLIENT_TERMS = frozenset(known.name for known in fields(ClientTerms))


def client_terms(weights: Weights | None = None, **given: Any) -> ClientTerms:
    """A client that is about to fill `weights`, or adopts what the server holds; `given` are terms and options."""
    terms = {name: value for name, value in given.items() if name in _CLIENT_TERMS}
    options = {name: value for name, value in given.items() if name not in _CLIENT_TERMS}
    if weights is not None:
        manifest = weights.manifest
        terms = {
            "identity": weights.identity,
            "manifest": manifest,
            "manifest_digest": manifest_digest(manifest),
            **terms,
        }
    return ClientTerms(
        PullOptions(**{"software": "client", "follow": False, **options}), **{"abilities": ABILITIES, **terms}
    )


def server_terms(**options: Any) -> ServerTerms:
    return ServerTerms(ServeOptions(software="server", **options), ABILITIES)


@dataclass
class Task:
    """An effect that is being carried out."""

    effect: f.Effect
    stage: int = 0


@dataclass
class Peer:
    """One side: its session, its unfinished tasks, and the messages that it sent and received."""

    pair: Pair
    session: Session
    decoder: Any
    token: bytes | None
    seal: FrameSeal | None = None
    pipe: bytearray = field(default_factory=bytearray)  # sent, and not yet received by the other side
    tasks: list[Task] = field(default_factory=list)
    deadline: float | None = None
    closed: bool = False
    lost: bool = False
    said: list[Any] = field(default_factory=list)
    heard: list[Any] = field(default_factory=list)
    signals_posted: list[bytes] = field(default_factory=list)
    signals_delivered: list[bytes] = field(default_factory=list)
    chains: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    effects: list[f.Effect] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.session.state in FINAL

    @property
    def other(self) -> Peer:
        return self.pair.client if self is self.pair.server else self.pair.server

    def sealed(self, frame: bytes) -> bytes:
        """A frame as this side sends it, once there are keys."""
        return frame if self.seal is None else seal_frame(frame, self.seal)

    def feed(self, event: e.Event) -> None:
        """Feed one event to the session, carry out its effects, and check the invariants."""
        if isinstance(event, m.Wire):
            self.heard.append(event)
        was_final = self.ended
        effects = self.session.handle(event)
        self.session.check_invariants()
        assert not (was_final and effects)
        for effect in effects:
            assert not self.closed, f"{effect} after Close"
            self.effects.append(effect)
            self._perform(effect)
        if self.ended:
            assert self.closed, "an ended session has closed"
            self._check_end()

    def _check_end(self) -> None:
        error = self.session.error
        assert (error is None) == (self.session.state is State.DONE)
        if error is not None:
            assert error.message
            assert error.hint
            assert error.story
            assert error.story[-1].endswith("-> FAILED")
            assert not isinstance(error, LocalProtocolError), f"this driver must not cause a local error: {error}"

    def _perform(self, effect: f.Effect) -> None:
        match effect:
            case f.Send(message):
                self._check_secrecy(message)
                self.said.append(message)
                self.pipe += self.pair.forwarded(self, self.sealed(self.pair.altered(self, message)))
            case f.Authenticate(sending, receiving):
                self.seal = FrameSeal(sending)
                self.decoder.authenticate(FrameSeal(receiving))
            case f.SetTimer(seconds):
                self.deadline = seconds
            case f.Note(text):
                self.notes.append(text)
            case f.NoteChain(node, chain):
                assert not self.pair.client_node or self.pair.client_node not in (node, *chain), "a circle"
                self.chains.append((node, *chain))
            case f.NoteBlocks(has, sent):
                assert has or sent
            case f.NoteQueued(position):
                assert position >= 0
            case f.DeliverSignal(data):
                self.signals_delivered.append(data)
            case f.ReturnBlocks(ranges, _, _):
                self.pair.ledger.give_back(self.session, ranges)
            case f.Close():
                self.closed = True
                self.tasks.clear()
                self.deadline = None
                if self is self.pair.client:
                    self.pair.ledger.lose(self.session)
            case f.Examine() if not self.pair.examines_late:
                self._examine(effect)
            case f.SendBlocks(ranges):
                self.pair.check_asked_for(ranges)
                self.tasks.append(Task(effect))
            case f.ReceiveBlocks(ranges):
                self.pair.check_granted(ranges)
                self.tasks.append(Task(effect))
            case _:
                once = (f.LookUp, f.TakeTurn, f.Examine, f.Pin, f.AcceptChannel, f.ConnectChannel)
                if isinstance(effect, once):
                    before = [known for known in self.effects[:-1] if type(known) is type(effect)]
                    assert not before, f"{type(effect).__name__} twice"
                if isinstance(effect, f.LookUp):
                    self._check_proven()
                self.tasks.append(Task(effect))

    # --- messages that are allowed before both sides have proven that they know the token ---------------------------

    def _check_secrecy(self, message: Any) -> None:
        about_the_model = isinstance(
            message,
            m.Identify | m.Accepted | m.Announce | m.Waiting | m.ChannelOffer | m.Grant | m.Gone | m.Agree | m.Upstream,
        ) or (isinstance(message, m.Refusal) and message.code in ("identity", "root", "plan", "manifest"))
        if about_the_model:
            self._check_proven()

    def _check_proven(self) -> None:
        if self.token is None:
            return
        tokens = {peer.token for peer in self.pair.peers}
        frames_are_authentic = any(isinstance(known, f.Authenticate) for known in self.effects)
        heard = m.Identify if self is self.pair.server else m.Welcome
        proven = len(tokens) == 1 and frames_are_authentic and any(isinstance(said, heard) for said in self.heard)
        assert proven, "the model was mentioned to a peer that has not proven itself"

    # --- tasks ------------------------------------------------------------------------------------------------------

    def ready(self) -> list[Task]:
        """Tasks that can be finished now. Blocks move in order, so only the first of their tasks is included."""
        found, moving = [], False
        for task in self.tasks:
            if isinstance(task.effect, f.SendBlocks | f.ReceiveBlocks):
                if moving:
                    continue
                moving = True
                if isinstance(task.effect, f.ReceiveBlocks) and not (self.pair.wire or self.pair.broken):
                    continue
            if isinstance(task.effect, f.AskForWork) and not self.pair.work_is_known(self.session):
                continue
            found.append(task)
        return found

    def finish(self, task: Task, *, ok: bool = True, subset: Callable[[int], bool] = lambda _: True) -> None:
        """Finish one step of a task, successfully or not. `subset` selects some of its blocks."""
        pair, effect = self.pair, task.effect
        if not (isinstance(effect, f.TakeTurn | f.AcceptChannel) and ok and task.stage == 0):
            self.tasks.remove(task)
        match effect:
            case f.LookUp():
                held: e.Event = e.Held(pair.announcement)
                self.feed(held if ok else e.NotHeld("not-ready", "still loading", retry_after=1.0))
            case f.TakeTurn() if not ok:
                self.feed(e.NotHeld("busy", "the queue is full", sources=("h:1",)))
            case f.TakeTurn():
                task.stage += 1
                self.feed(e.Queued("others come first", 1) if task.stage == 1 else e.TurnTaken(*pair.upstream))
            case f.Examine():
                self._examine(effect)
            case f.Pin(announcement):
                self._pin(announcement, ok=ok)
            case f.AcceptChannel() | f.ConnectChannel() if not ok:
                pair.broken = True
                self.feed(e.WorkFailed(PeerLost("could not connect")))
            case f.AcceptChannel():
                task.stage += 1
                self.feed(e.ChannelOffered(b"offer") if task.stage == 1 else e.ChannelOpened())
            case f.ConnectChannel():
                self.feed(e.ChannelOpened())
            case f.AskForWork():
                self._ask()
            case f.CheckBlocks(ranges):
                gone = to_ranges(n for n in expand(ranges) if not (ok or subset(n)))
                ready = to_ranges(set(expand(ranges)) - set(expand(gone)))
                if gone:
                    self.feed(e.BlocksGone(gone, "freed", ("h:2",)))
                if ready:
                    self.feed(e.BlocksReady(ready))
            case f.SendBlocks(ranges):
                if not ok or pair.broken:
                    pair.broken = True
                    self.feed(e.WorkFailed(PeerLost("the channel broke")))
                    return
                pair.wire.extend((n, pair.weights.content(n)) for n in expand(ranges))
                self.feed(e.BlocksSent(ranges))
            case f.ReceiveBlocks(ranges):
                self._receive(expand(ranges), ok=ok)
            case f.CloseChannel():
                pair.broken = True
                self.feed(e.ChannelDown())
            case _:
                raise AssertionError(effect)

    def _examine(self, question: f.Examine) -> None:
        try:
            self.feed(e.Examined(examine(question)))
        except NetloaderError as error:
            self.feed(e.Failed(error))

    def _pin(self, announcement: e.Announcement, *, ok: bool) -> None:
        pair = self.pair
        if self.session.probing:
            self.feed(e.Finished("probed"))
            return
        try:
            if not ok:
                raise NetloaderError("no memory")
            pair.ledger.pin(announcement.root, announcement.plan, announcement.digests, "the source")
        except NetloaderError as error:
            self.feed(e.WorkFailed(error))
            return
        self.feed(e.Pinned())

    def _ask(self) -> None:
        ledger = self.pair.ledger
        ranges = ledger.assign(self.session, 2 * BLOCK)
        if ranges:
            self.feed(e.BlocksWanted(ranges))
        elif not ledger.in_flight(self.session):
            self.feed(e.Finished("complete" if ledger.complete else "partial", ledger.verified_blocks))

    def _receive(self, numbers: tuple[int, ...], *, ok: bool) -> None:
        pair = self.pair
        arrived: list[int] = []
        for number in numbers:
            if not pair.wire:
                if pair.broken:
                    self.feed(e.WorkFailed(PeerLost("the channel broke")))
                else:  # the rest follows later
                    self.tasks.insert(0, Task(f.ReceiveBlocks(to_ranges(set(numbers) - set(arrived)))))
                break
            _, content = pair.wire.popleft()
            content = content if ok else content + b"!"
            pair.memory[number] = content
            pair.ledger.received(self.session, number)
            try:
                pair.ledger.verify(self.session, number, digest_of(content))
            except DigestMismatch as error:
                self.feed(e.WorkFailed(error))
                return
            arrived.append(number)
        if arrived:
            self.feed(e.BlocksReceived(to_ranges(arrived)))


class Pair:
    """One session between a server and a client. The ledger and the memory outlive it."""

    def __init__(
        self,
        client: ClientTerms,
        server: ServerTerms,
        weights: Weights | None = None,
        *,
        ledger: Ledger | None = None,
        memory: dict[int, bytes] | None = None,
        speaks: tuple[int, int] | None = None,
        upstream: tuple[str, tuple[str, ...]] = ("", ()),
        examines_late: bool = False,  # like a client that checks a long manifest in a thread
    ) -> None:
        self.weights = Weights() if weights is None else weights
        self.announcement = self.weights.announcement()
        self.ledger = Ledger() if ledger is None else ledger
        self.memory: dict[int, bytes] = {} if memory is None else memory
        self.wire: deque[tuple[int, bytes]] = deque()
        self.broken = False
        self.client_node = client.node
        self.upstream = upstream
        self.examines_late = examines_late
        self._speaks = speaks
        self.server = Peer(self, Session(Side.SERVER, server=server), client_messages(), server.options.token)
        self.client = Peer(self, Session(Side.CLIENT, client=client), server_messages(), client.options.token)
        self.peers = (self.server, self.client)
        self.server.feed(e.Connected(SERVER_NONCE))
        self.client.feed(e.Connected(CLIENT_NONCE))

    def altered(self, peer: Peer, message: Any) -> bytes:
        """The Hello of a client of another release, which this code can't send by itself."""
        if self._speaks is not None and isinstance(message, m.Hello):
            newest, oldest = self._speaks
            message = msgspec.structs.replace(message, protocol=newest, oldest=oldest)
            peer.session._ctx.greeting = m.wire_body(message)
        return encode_frame(message)

    def forwarded(self, peer: Peer, frame: bytes) -> bytes:
        """What becomes of a frame of `peer` on its way."""
        return frame

    # --- invariants ---------------------------------------------------------------------------------------------------

    def check_asked_for(self, ranges: Ranges) -> None:
        """The server sends a block only when it was requested, and once for each request."""
        wanted = [n for w in self.server.heard if isinstance(w, m.Want) for n in expand(w.ranges)]
        sent = [n for s in self.server.effects if isinstance(s, f.SendBlocks) for n in expand(s.ranges)]
        for number in expand(ranges):
            assert sent.count(number) <= wanted.count(number)

    def check_granted(self, ranges: Ranges) -> None:
        """The client receives only blocks that it requested and that were granted."""
        asked = [n for w in self.client.said if isinstance(w, m.Want) for n in expand(w.ranges)]
        granted = [n for g in self.client.heard if isinstance(g, m.Grant) for n in expand(g.ranges)]
        received = [n for r in self.client.effects if isinstance(r, f.ReceiveBlocks) for n in expand(r.ranges)]
        for number in expand(ranges):
            assert received.count(number) <= min(asked.count(number), granted.count(number))

    def check(self) -> None:
        """Check the invariants that hold between any two steps."""
        self.ledger.check_invariants()
        plan = self.ledger.plan
        for number in () if plan is None else range(len(plan.blocks)):
            if self.ledger.state(number) is BlockState.VERIFIED:
                assert digest_of(self.memory[number]) == self.ledger.expected_digest(number)
        for verdict in (v for v in self.client.said if isinstance(v, m.Verdict)):
            assert (verdict.outcome == "complete") <= self.ledger.complete
            assert (verdict.outcome == "probed") <= self.client.session.probing

    # --- steps --------------------------------------------------------------------------------------------------------

    def work_is_known(self, session: Session) -> bool:
        """Whether AskForWork can be answered now: blocks are pending, none will be, or its own blocks come first."""
        others = any(
            self.ledger.state(n) in (BlockState.IN_FLIGHT, BlockState.RECEIVED)
            for n in range(len(self._plan().blocks))
            if n not in self.ledger.in_flight(session)
        )
        return self.ledger.has_work_for(session) or bool(self.ledger.in_flight(session)) or not others

    def _plan(self) -> Plan:
        assert self.ledger.plan is not None
        return self.ledger.plan

    def deliver(self, to: Peer, nbytes: int) -> None:
        """Deliver up to `nbytes` to `to`; then the end of the connection if the other side closed it."""
        data = bytes((pipe := to.other.pipe)[:nbytes])
        del pipe[:nbytes]
        if to.closed:
            return
        if data:
            self._hear(to, data)
        elif to.other.closed and not pipe:
            self.lose(to, "the peer closed")

    def _hear(self, to: Peer, data: bytes) -> None:
        try:
            messages = to.decoder.feed(data, greeting=not to.decoder.first_body)
            while messages:
                if to.session.state is State.LISTEN:
                    to.session.greeted(to.decoder.first_body)
                for message in messages:
                    to.feed(message)
                messages = to.decoder.feed(b"")
        except RemoteProtocolError as error:
            to.feed(e.Failed(error))

    def lose(self, peer: Peer, reason: str) -> None:
        if not peer.lost:
            peer.lost = True
            peer.feed(e.ConnectionLost(reason))

    def cut(self) -> None:
        """Both sides lose the connection, and all bytes in flight."""
        for peer in self.peers:
            peer.pipe.clear()
        for peer in self.peers:
            self.lose(peer, "cut")

    def post_signal(self, peer: Peer, data: bytes) -> None:
        """The transport of `peer` sends a signal, while or after a channel is set up."""
        if any(isinstance(known, f.AcceptChannel | f.ConnectChannel) for known in peer.effects) and not peer.ended:
            peer.signals_posted.append(data)
            peer.feed(e.SignalPosted(data))

    def change_upstream(self, chain: tuple[str, ...]) -> None:
        """The server, a relay, pulls its blocks from other relays now."""
        if self.server.session.state in (State.PLAN, State.TRANSFER, State.FINALIZE):
            self.upstream = (self.upstream[0], chain)
            self.server.feed(e.UpstreamChanged(chain))

    def time_out(self, peer: Peer) -> None:
        if peer.deadline is not None:
            peer.deadline = None
            peer.feed(e.TimedOut())

    def idle(self) -> bool:
        """Whether nothing can happen any more except timeouts."""
        return not any(peer.ready() or self.has_news(peer) for peer in self.peers)

    def has_news(self, peer: Peer) -> bool:
        """Whether there are bytes that `peer` has not yet received."""
        return not peer.closed and bool(peer.other.pipe or (peer.other.closed and not peer.lost))

    def drain(self, rounds: int = 500) -> None:
        """Deliver everything, and finish all tasks successfully."""
        for _ in range(rounds):
            if self.idle():
                return
            for peer in self.peers:
                self.deliver(peer, 1 << 20)
                for task in peer.ready()[:1]:
                    peer.finish(task)
            self.check()
        raise AssertionError(f"the sessions do not end: {[(p.session, p.said[-4:]) for p in self.peers]}")

    def end(self) -> None:
        """Without further steps, each side that has not ended has a deadline, after which both have ended."""
        self.drain()
        for peer in self.peers:
            assert peer.ended or peer.deadline is not None, f"{peer.session} waits for ever: {peer.session.story}"
        for peer in self.peers:
            self.time_out(peer)
            self.drain()
        assert self.server.ended
        assert self.client.ended

    def states(self) -> tuple[State, State]:
        return self.server.session.state, self.client.session.state


def run(pair: Pair) -> Pair:
    pair.end()
    return pair


def snapshots(pair: Pair) -> Iterable[tuple[Side, Session]]:
    """Both sessions before each step of a successful session. They change with the next step, so copy them.

    Bytes are delivered in small parts, so that there is a step between any two messages.
    """
    while not pair.idle():
        for peer in pair.peers:
            for act in _acts(pair, peer):
                yield from ((p.session.side, p.session) for p in pair.peers)
                act()


def _acts(pair: Pair, peer: Peer) -> Sequence[Callable[[], None]]:
    acts: list[Callable[[], None]] = [lambda: pair.deliver(peer, 20)]
    acts += [lambda task=task: peer.finish(task) for task in peer.ready()[:1]]  # type: ignore[misc]
    return acts
