"""The schedulers of two ends of an HCCL group: without HCCL, with messages that cross each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import pytest

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.hccl import scheduler
from netloader.transports.hccl.messages import Go, GroupMessage, HcclMessage, Open, Ready, Take, Withdraw
from netloader.transports.hccl.scheduler import Scheduler

STALL = 0.4


@dataclass
class FakeTurn:
    """A turn that another link may have."""

    free: bool = True
    asked: int = 0
    taken: int = 0
    held: bool = False
    pace: TransferTimeout | None = None

    async def take(self) -> None:
        self.asked += 1
        while not self.free:  # noqa: ASYNC110 - a fake
            await anyio.sleep(0.001)
        self.held = True
        self.taken += 1

    def give(self) -> None:
        self.held = False

    def check_pace(self) -> None:
        if self.pace is not None:
            raise self.pace


@dataclass
class End:
    """One end, whose messages are held back until they are delivered."""

    turn: FakeTurn = field(default_factory=FakeTurn)
    said: list[HcclMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.windows = Scheduler(0, self._post, self.turn, STALL)

    async def _post(self, note: HcclMessage) -> None:
        await anyio.lowlevel.checkpoint()
        self.said.append(note)


def deliver(from_: End, to: End, count: int = 1) -> None:
    for _ in range(count):
        note = from_.said.pop(0)
        assert isinstance(note, GroupMessage)
        assert to.windows.handle_message(note)


@pytest.fixture
def ends() -> tuple[End, End]:
    return End(), End()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_PATIENCE", (0.2, 0.2))


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await anyio.sleep(0.001)


async def test_the_receiver_takes_its_turn_only_when_the_sender_has_its_own(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    counts: list[int] = []

    async def take() -> None:
        await receiver.windows.want(5)
        counts.append(await receiver.windows.take(5))

    async def send() -> None:
        counts.append(await sender.windows.open(3))
        await sender.windows.go()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        tasks.start_soon(send)
        await until(lambda: receiver.said)
        assert sender.turn.asked == 0, "not for a peer that is not there"
        deliver(receiver, sender)
        await until(lambda: sender.said)
        assert (sender.turn.taken, receiver.turn.asked) == (1, 0)
        deliver(sender, receiver)
        await until(lambda: receiver.said)
        assert receiver.turn.taken == 1
        assert counts == []
        deliver(receiver, sender)
        await until(lambda: sender.said)
        deliver(sender, receiver)
    assert counts == [3, 3]


async def test_a_late_answer_to_a_withdrawn_attempt_is_ignored(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    counts: list[int] = []

    async def take() -> None:
        counts.append(await receiver.windows.take(2))

    async def send() -> None:
        counts.append(await sender.windows.open(2))
        await sender.windows.go()

    sender.windows.handle_message(Ready(0, 2))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await until(lambda: sender.said)
        tasks.start_soon(take)
        deliver(sender, receiver)
        await until(lambda: receiver.said)  # the answer, which is not delivered yet
        await until(lambda: len(sender.said) == 2)
        assert sender.said == [Withdraw(0, 1), Open(0, 2, 2)]
        deliver(receiver, sender)
        deliver(sender, receiver)
        await until(lambda: not receiver.turn.held)
        deliver(sender, receiver)
        await until(lambda: receiver.said)
        assert receiver.said == [Take(0, 2)]
        assert counts == []
        deliver(receiver, sender)
        await until(lambda: sender.said)
        assert sender.said == [Go(0, 2)]
        deliver(sender, receiver)
    assert counts == [2, 2]
    assert (sender.turn.taken, receiver.turn.taken) == (2, 2)


async def test_a_turn_that_comes_too_late_is_given_back(ends: tuple[End, End]) -> None:
    _, receiver = ends
    receiver.turn.free = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receiver.windows.take, 2)
        assert receiver.windows.handle_message(Open(0, 1, 2))
        await until(lambda: receiver.turn.asked)
        assert receiver.windows.handle_message(Withdraw(0, 1))
        receiver.turn.free = True
        await until(lambda: receiver.turn.taken)
        await until(lambda: not receiver.turn.held)
        assert receiver.said == []
        tasks.cancel_scope.cancel()


async def test_no_turn_is_taken_for_a_receiver_that_wants_nothing(ends: tuple[End, End]) -> None:
    sender, _ = ends
    with pytest.raises(TransferTimeout, match=r"the peer takes no bytes for 0\.4 s"):
        await sender.windows.open(1)
    assert sender.turn.taken == 0


async def test_a_receiver_that_never_answers_times_out_unless_it_reports_that_it_waits(ends: tuple[End, End]) -> None:
    sender, _ = ends
    sender.windows.handle_message(Ready(0, 1))
    with pytest.raises(TransferTimeout, match=r"the peer takes no bytes for 0\.4 s"):
        await sender.windows.open(1)
    assert sender.turn.taken >= 4, "it was held for a part of that each time"
    assert not sender.turn.held
    with anyio.move_on_after(3 * STALL) as scope:
        async with anyio.create_task_group() as tasks:

            async def say() -> None:
                while True:
                    sender.windows.alive()
                    await anyio.sleep(STALL / 10)

            tasks.start_soon(say)
            await sender.windows.open(1)
    assert scope.cancelled_caught
    sender.turn.pace = TransferTimeout("too slow")
    with pytest.raises(TransferTimeout, match="too slow"):
        await sender.windows.open(1)


async def test_a_silent_sender_times_out_and_one_that_waits_does_not(ends: tuple[End, End]) -> None:
    _, receiver = ends
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:

        async def say() -> None:
            for _ in range(8):
                receiver.windows.alive()
                await anyio.sleep(STALL / 4)

        tasks.start_soon(say)
        with pytest.raises(TransferTimeout, match=r"the peer sends no bytes for 0\.4 s"):
            await receiver.windows.take(1)
    assert anyio.current_time() - began > 2 * STALL
    assert receiver.turn.taken == 0


@pytest.mark.parametrize("blocks", [0, 3])
async def test_a_sender_that_sends_unwanted_blocks(blocks: int, ends: tuple[End, End]) -> None:
    _, receiver = ends
    receiver.windows.handle_message(Open(0, 1, blocks))
    with pytest.raises(TransportError, match=f"about to send {blocks} blocks where 2 are wanted"):
        await receiver.windows.take(2)


async def test_a_loss_ends_every_wait(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    async with anyio.create_task_group() as tasks:

        async def lost(end: End, open_: bool) -> None:
            with pytest.raises(PeerLost, match="gone"):
                await (end.windows.open(1) if open_ else end.windows.take(1))

        tasks.start_soon(lost, sender, True)
        tasks.start_soon(lost, receiver, False)
        await anyio.lowlevel.checkpoint()
        for end in ends:
            end.windows.lose("gone")


def test_invalid_messages_are_detected(ends: tuple[End, End]) -> None:
    windows = ends[0].windows
    for note in (Ready(0, -1), Open(0, 0, 1), Open(0, 1, -1), Go(0, 1)):
        assert not windows.handle_message(note)
    assert windows.handle_message(Open(0, 1, 1))
    assert windows.handle_message(Go(0, 1))
    assert not windows.handle_message(Open(0, 1, 1)), "a number is used once"
