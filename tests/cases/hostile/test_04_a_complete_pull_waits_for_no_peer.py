"""No step after completion waits for a peer: a property of the decisions, and measured with real sockets."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack

import anyio
import hypothesis
from hypothesis import given
from hypothesis import strategies as st

import netloader.client.pull
import netloader.client.session
import netloader.session.driver
import netloader.session.phase_clock
from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.options import PullOptions
from netloader.core.plan import expand
from netloader.core.pull import Pull
from netloader.core.report import Progress
from netloader.core.sources import Source
from netloader.errors import NetloaderError, PeerLost, RefusedError, TransferTimeout
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.core.pull_world import announcement, digest_of
from tests.drivers import jumping, kit
from tests.drivers.test_completion import AT_ONCE, HUB, PATIENT, lets_wait, silent

KNOWN, OTHER = announcement(5), announcement(5, b"other")
ENDS: tuple[NetloaderError | None, ...] = (
    None,
    PeerLost("the connection broke"),
    TransferTimeout("it says nothing"),
    RefusedError("not-ready", "loading"),
    RefusedError("busy", "others pass it on", sources=("h:8", "h:9")),
    RefusedError("root", "other weights"),
)


class Peers:
    """Sources that do anything in any order that sessions allow, told to a pull at times that go on or stand still."""

    def __init__(self, data: st.DataObject, stripe: int, *, adopts: bool) -> None:
        self.draw = data.draw
        self.now = 0.0
        sources = [Source(Address("h", port)) for port in range(1, 5)]
        self.pull = Pull(sources, PullOptions(stripe=stripe, wait=1e6), random.Random(1), adopts=adopts)
        self.state: dict[int, str] = {}
        self.asked: dict[int, list[int]] = {}
        self.allocating: int | None = None
        self.told_to_end: set[int] = set()
        self.succeeded = False
        self.carry_out(self.pull.begin(0.0))

    def carry_out(self, commands: list[p.Command]) -> None:
        for command in commands:
            assert not self.succeeded or isinstance(command, p.Log), f"{command} after the end"
            match command:
                case p.Connect(session):
                    self.state[session], self.asked[session] = "begun", []
                case p.Allocate(session):
                    self.allocating = session
                case p.Accept(session) if session in self.state:
                    self.state[session] = "accepted"
                case p.RequestBlocks(session, ranges):
                    self.asked[session] += expand(ranges)
                case p.Finish(session) | p.CancelSession(session) | p.LeaveSource(session) | p.Reject(session):
                    self.told_to_end.add(session)
                case p.Succeed():
                    self.succeeded = True

    def tell(self, event: p.Event) -> None:
        complete = self.pull.ledger.complete
        self.carry_out(self.pull.handle(event, self.now))
        if self.pull.ledger.complete:
            assert self.succeeded, "every block is verified, and the same call does not end the pull"
            assert self.pull.wake_at(self.now) is None, "it waits for a time"
            assert set(self.state) <= self.told_to_end, "a session was not told to end"
        assert complete <= self.pull.ledger.complete

    def step(self) -> None:
        """Any event that may come now."""
        self.now += self.draw(st.sampled_from([0.0, 0.0, 0.01, 1.0, 40.0]))
        if self.allocating is not None and self.draw(st.booleans()):
            number, self.allocating = self.allocating, None
            self.tell(p.MemoryAllocated(number))
            return
        if not self.state or self.draw(st.integers(0, 9)) == 0:
            self.tell(p.TimerFired())
            return
        number = self.draw(st.sampled_from(sorted(self.state)))
        wanted = self.asked[number]
        match self.state[number], self.draw(st.integers(0, 7)):
            case _, 0:
                del self.state[number]
                error = self.draw(st.sampled_from(ENDS))
                self.tell(p.SessionEnded(number, error, "tcp", others=False, opened=True))
            case "begun", 1:
                self.tell(p.SessionQueued(number))
            case "begun", _:
                self.state[number] = "announced"
                known = self.draw(st.sampled_from([KNOWN, KNOWN, KNOWN, OTHER]))
                self.tell(p.HoldingAnnounced(number, known))
            case "accepted", _:
                self.state[number] = "open"
                self.tell(p.SessionReady(number))
                self.tell(p.SessionIdle(number))
            case "open", _ if wanted:
                count = self.draw(st.integers(1, len(wanted)))
                blocks, self.asked[number] = wanted[:count], wanted[count:]
                lie = self.draw(st.integers(0, 19)) == 0
                salt = b"other" if self.pull.ledger.root == OTHER.root else b""
                landed = [(block, digest_of(block, b"a lie" if lie else salt)) for block in blocks]
                self.tell(p.BlocksArrived(number, landed))
            case "open", _ if number not in self.told_to_end:
                self.tell(p.SessionIdle(number))


@given(data=st.data(), stripe=st.integers(1, 4), adopts=st.booleans())
def test_with_the_last_block_the_pull_succeeds_in_the_same_call_and_waits_for_no_peer(
    data: st.DataObject, stripe: int, adopts: bool
) -> None:
    peers = Peers(data, stripe, adopts=adopts)
    for _ in range(100):
        if peers.pull.over or not (peers.state or peers.pull.wake_at(peers.now)):
            break
        peers.step()
    hypothesis.event("complete" if peers.succeeded else "not complete")
    if peers.succeeded:
        for number in list(peers.state):  # what comes later is of no interest
            peers.tell(p.SessionEnded(number, PeerLost("late")))


def test_two_honest_sources_one_busy_one_silent_one_waiting_for_ever_and_the_pull_returns_at_once() -> None:
    """The busy one has one turn, which another client holds; the clock jumps, so that seconds are those of waits."""

    async def story(clock: jumping.Clock) -> tuple[float, float]:
        source = kit.weights()
        holding = kit.held(source)
        last = Faults([Fault(FaultKind.HOLD, len(holding.announcement.plan.blocks) - 2)])
        taken = FaultyTransport(HUB.transport, Faults([Fault(FaultKind.HOLD, 1)]))
        times: dict[bool, float] = {}
        async with AsyncExitStack() as stack:
            serving = stack.enter_async_context
            busy = await serving(kit.serving(taken, holding, max_clients=1, timings=PATIENT))
            good = await serving(kit.serving(FaultyTransport(HUB.transport, last), holding, timings=PATIENT))
            fakes = [await serving(kit.fake_server(script)) for script in (silent, lets_wait)]
            tasks = await serving(anyio.create_task_group())
            other = anyio.CancelScope()

            async def hold_the_turn() -> None:
                with other:
                    await kit.pull(kit.blank(source), [kit.at(busy)], HUB.transport, timeout=1e4, timings=PATIENT)

            tasks.start_soon(hold_the_turn)
            await kit.until(lambda: any(s.transport for s in busy.sessions), "the turn is taken")

            async def release() -> None:
                await anyio.sleep(1.0)
                assert busy._turns.waiting == 1
                last.release()

            def progress(step: Progress) -> None:
                times[step.verified == step.total] = clock.now

            tasks.start_soon(release)
            into = kit.blank(source)
            sources = [kit.at(busy), kit.at(good), *(fake.address for fake in fakes)]
            await kit.pull(into, sources, HUB.transport, progress=progress, stripe=4, timeout=1e4, timings=PATIENT)
            ended = clock.now
            assert kit.contents(into) == kit.contents(source)
            assert all(fake.connections == 1 for fake in fakes)
            other.cancel()
        return times[True], ended

    modules = (netloader.client.pull, netloader.client.session, netloader.session.driver, netloader.session.phase_clock)
    last, ended = jumping.run(story, *modules)
    assert ended - last <= AT_ONCE
