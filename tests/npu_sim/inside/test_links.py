"""What is specific to HCCL: device turns, waits, lost peers, and clean-up."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
import torch_npu
from torch._C._distributed_c10d import HashStore
from torch_npu import _hccl as sim
from torch_npu._memory import accounts

from netloader.errors import PeerLost, RefusedError, TransferTimeout, TransportError
from netloader.transports.base import Signals
from netloader.transports.conformance import LocalSignals, TensorBlockView, local_signals
from netloader.transports.hccl import HcclTransport, devices
from netloader.transports.hccl import link as hccl_link
from netloader.transports.hccl import transport as hccl
from netloader.transports.hccl.messages import Go, Open, Ready, Take, Value, Waiting, _encode
from netloader.transports.io import worker
from tests.npu_sim.inside.pairs import CLIENT, SERVER, Placed, pair, setup_for

_opened: list[LocalSignals] = []
npu: Any = torch.get_device_module("npu")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Check after each test: no communicator, no turn and no changed environment is left."""
    yield
    while _opened:
        _opened.pop().close()
    assert not sim.open_now
    assert "TORCH_HCCL_BLOCKING_WAIT" not in os.environ
    for device in (CLIENT, SERVER):
        account = devices.device_of(device)
        assert account.usage() == (0, 0)
        account.turns.take("test", 0.0)
        account.turns.give("test")


def signals() -> tuple[LocalSignals, LocalSignals]:
    """Both ends of a control connection, which is closed after the test."""
    ends = local_signals()
    _opened.extend(ends)
    return ends


def block(number: int, data: bytes, device: str) -> TensorBlockView:
    return TensorBlockView(number, [data], device)


async def test_a_channel_makes_one_communicator_of_point_to_point_size_and_counts_its_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = len(sim.created)
    async with pair() as (server, client), anyio.create_task_group() as tasks:
        assert devices.device_of(SERVER).usage() == (1, 40 << 20)
        tasks.start_soon(server.send, [block(0, b"abc", SERVER)])
        await client.recv([block(0, bytes(3), CLIENT)])
    assert sim.created[before:] == ["0:1", "0:1"]  # one at each end: both are in this process


def test_the_simulator_shows_old_bytes_to_a_reader_that_does_not_wait() -> None:
    """Without this property the other tests would prove nothing about waits."""
    store = HashStore()
    early: list[bool] = []

    def end(rank: int) -> None:
        npu.set_device(rank)
        options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.global_ranks_in_group = [0, 1]
        with devices.blocking_wait():
            group = torch_npu._C._distributed_c10d.ProcessGroupHCCL(store, rank, 2, options)
        tensor = torch.full((1 << 20,), rank, dtype=torch.uint8, device=f"npu:{rank}")
        first = torch.empty(1, dtype=torch.uint8, device=f"npu:{rank}")  # this operation connects both ends
        if rank:
            group.send([first], 0, 0).wait()
            was_read.wait(30)
            group.send([tensor], 0, 0).wait()
        else:
            group.recv([first], 1, 0).wait()
            work = group.recv([tensor], 1, 0)
            with npu.stream(npu.Stream()):
                early.append(bool(tensor.cpu().all()))
            was_read.set()
            work.wait()
            early.append(bool(tensor.cpu().all()))
            group.abort_hccl_comm("done")
            done.set()
        done.wait(30)
        if rank:
            group.abort_hccl_comm("done")

    was_read, done = threading.Event(), threading.Event()
    threads = [threading.Thread(target=end, args=(rank,), name=f"test-{rank}") for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert early == [False, True]


async def test_links_of_one_device_take_turns_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hccl_link, "WINDOW_BYTES", 4 << 20)
    holders: list[object] = []
    take = devices.FifoLock.take

    def noted(self: devices.FifoLock, who: object, *args: Any) -> None:
        take(self, who, *args)
        if self is devices.device_of(SERVER).turns:
            holders.append(who)

    monkeypatch.setattr(devices.FifoLock, "take", noted)
    async with pair() as (one, client_one), pair(client="npu:2") as (two, client_two):
        turns = devices.device_of(SERVER).turns
        await anyio.to_thread.run_sync(turns.take, "starter", 1.0)
        del holders[:]
        async with anyio.create_task_group() as tasks:
            for server, client, device in ((one, client_one, CLIENT), (two, client_two, "npu:2")):
                sent = [block(number, bytes([number + 1]) * (2 << 20), SERVER) for number in range(8)]
                into = [block(number, bytes(2 << 20), device) for number in range(8)]
                tasks.start_soon(server.send, sent)
                tasks.start_soon(client.recv, into)
            with anyio.fail_after(30):
                while len(turns._waiters) < 3:  # both wait, in either order
                    await anyio.lowlevel.checkpoint()
            turns.give("starter")
    order = [holders.index(who) for who in holders]
    assert len(order) >= 8  # 16 MiB each, in windows of 4
    assert len(set(order)) == 2
    assert order != sorted(order)  # the two links alternate


async def test_one_device_sends_to_three_receivers() -> None:
    async with (
        pair(server="npu:3") as one,
        pair(server="npu:3", client="npu:1") as two,
        pair(server="npu:3", client="npu:2") as three,
        anyio.create_task_group() as tasks,
    ):
        received = []
        for (server, client), device in zip((one, two, three), (CLIENT, "npu:1", "npu:2"), strict=True):
            into = block(0, bytes(3 << 20), device)
            received.append(into)
            tasks.start_soon(server.send, [block(0, device.encode()[-1:] * (3 << 20), "npu:3")])
            tasks.start_soon(client.recv, [into])
    assert [into.data for into in received] == [bytes(f"{n}", "ascii") * (3 << 20) for n in (0, 1, 2)]


async def test_a_peer_that_never_connects_times_out() -> None:
    ours, theirs = signals()
    transport = HcclTransport()
    pending = await transport.offer(setup_for(ours, SERVER, timeout=0.2))
    with pytest.raises(TransferTimeout, match=r"did not open its end of the HCCL group within 0\.2 s"):
        await pending.accept()
    theirs.close()


async def test_an_offer_can_be_closed_twice() -> None:
    ours, _ = signals()
    pending = await HcclTransport().offer(setup_for(ours, SERVER))
    await pending.aclose()
    await pending.aclose()


async def test_a_peer_that_is_lost_before_the_first_operation_is_an_error() -> None:
    """Each end in turn disappears after the hand-shake: the other would wait for HCCL's own timeout."""
    ours, theirs = signals()
    transport = HcclTransport()
    pending = await transport.offer(setup_for(ours, SERVER))
    await theirs.post(_encode(Ready(0)))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:

            async def lose() -> None:
                await theirs.fetch()
                await theirs.post(_encode(Take(0, 1)))
                await theirs.fetch()  # Go: the server is in its first operation now, or soon
                theirs.close()

            tasks.start_soon(lose)
            with pytest.raises(PeerLost):
                await pending.accept()
    ours, theirs = signals()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCCL_CONNECT_TIMEOUT", "1")  # bounds the wait of the end that listens inside HCCL
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:

                async def go_and_leave() -> None:
                    await ours.fetch()
                    await ours.post(_encode(Open(0, 1, 0)))
                    await ours.fetch()
                    await ours.post(_encode(Go(0, 1)))
                    await ours.fetch()  # the address to connect to
                    ours.close()

                tasks.start_soon(go_and_leave)
                with pytest.raises(PeerLost):
                    await transport.connect(pending.offer, setup_for(theirs, CLIENT))
    theirs.close()


class Counted:
    """The client's control connection, which cancels a scope when it is used for the n-th time after `arm`."""

    def __init__(self, inner: Signals) -> None:
        self._inner = inner
        self._left: int | None = None
        self._scope = anyio.CancelScope()

    def arm(self, uses: int, scope: anyio.CancelScope) -> None:
        self._left, self._scope = uses, scope

    def _use(self) -> None:
        if self._left is not None:
            if self._left == 0:
                self._scope.cancel()
            self._left -= 1

    async def post(self, data: bytes) -> None:
        self._use()
        await self._inner.post(data)

    async def fetch(self) -> bytes:
        self._use()
        return await self._inner.fetch()


async def second_group_cancelled(uses: int) -> bool:
    """Cancel the client's first send, which connects the second group; return whether it was still running."""
    counted: list[Counted] = []

    def heard(signals: Signals) -> Signals:
        counted.append(Counted(signals))
        return counted[0]

    async with pair(heard=heard) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(_ignoring_loss, server.recv, [block(0, bytes(3), SERVER)])
        with anyio.CancelScope() as scope:
            counted[0].arm(uses, scope)
            await client.send([block(0, b"abc", CLIENT)])
    return scope.cancelled_caught


async def test_cancelling_while_the_second_group_connects_does_not_leave_the_peer_waiting() -> None:
    """HCCL itself would wait 120 s, and that wait can't be interrupted."""
    uses = 0
    with anyio.fail_after(60):
        while True:
            with anyio.fail_after(10):
                if not await second_group_cancelled(uses):
                    break
            uses += 1
    assert uses >= 6  # Ready, Open, Take, Go, the address to connect to, its version: each sent or received


async def test_a_device_turn_is_kept_until_the_call_of_hccl_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may have stopped waiting for a thread inside HCCL; the next link may not enter HCCL meanwhile."""
    inside, leave = threading.Event(), threading.Event()

    def stuck(self: hccl_link.HcclLink, *_: Any, **__: Any) -> None:
        inside.set()
        leave.wait(30)
        raise PeerLost("HCCL gave up")

    monkeypatch.setattr(hccl_link.HcclLink, "_post", stuck)
    monkeypatch.setattr(worker, "_PATIENCE", 0.1)
    monkeypatch.setattr(hccl, "_CLOSING", 0.1)
    ours, theirs = signals()
    transport = HcclTransport()
    pending = await transport.offer(setup_for(ours, SERVER, timeout=0.3))
    await theirs.post(_encode(Ready(0)))
    await theirs.post(_encode(Take(0, 1)))
    with pytest.raises(TransferTimeout):
        await pending.accept()
    turns = devices.device_of(SERVER).turns
    assert inside.is_set()
    try:
        with pytest.raises(TransferTimeout, match="1 other links"):
            await anyio.to_thread.run_sync(turns.take, "next", 0.0)
    finally:
        leave.set()
    await anyio.to_thread.run_sync(turns.take, "next", 10.0)
    turns.give("next")


async def test_a_receiver_below_the_minimum_rate_times_out_although_no_single_operation_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each operation is within its own limit; all of them together are not."""
    monkeypatch.setattr(hccl_link, "LEEWAY", 0.2)
    sent = 0
    async with pair(stall=1.0) as (server, client):

        async def serve() -> None:
            nonlocal sent
            while sent < 1000:
                await server.send([block(sent, b"x", SERVER)])
                sent += 1

        async def drip() -> None:
            for number in itertools.count():
                with anyio.move_on_after(0.05):
                    await anyio.sleep_forever()
                await client.recv([block(number, b"y", CLIENT)])

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_ignoring_loss, drip)
                with pytest.raises(TransferTimeout, match="less than 5 MB/s"):
                    await serve()
                tasks.cancel_scope.cancel()
    assert 1 <= sent < 1000


async def reports_that_it_waits(end: Signals) -> None:
    while True:
        await end.post(_encode(Waiting()))
        with anyio.move_on_after(0.05):
            await anyio.sleep_forever()


@pytest.mark.parametrize(("wants", "end"), [(False, "takes no bytes for 0.5 s"), (True, "less than 5 MB/s")])
async def test_a_receiver_that_reports_for_ever_that_it_waits_for_its_turn_times_out(
    wants: bool, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver without requests has no turn to wait for; one with requests has a time limit for its turn."""
    monkeypatch.setattr(hccl_link, "LEEWAY", 3.0)
    ends: list[Signals] = []

    def heard(signals: Signals) -> Signals:
        ends.append(signals)
        return signals

    turns = devices.device_of(SERVER).turns
    async with pair(stall=0.5, heard=heard) as (server, _), anyio.create_task_group() as tasks:
        if wants:
            await ends[0].post(_encode(Ready(0, 1)))
        tasks.start_soon(reports_that_it_waits, ends[0])
        free = 0

        async def look() -> None:
            nonlocal free
            while True:
                free += not turns._waiters
                with anyio.move_on_after(0.005):
                    await anyio.sleep_forever()

        tasks.start_soon(look)
        with anyio.fail_after(10), pytest.raises(TransferTimeout, match=end):
            await server.send([block(0, bytes(64 << 20), SERVER)])
        assert not turns._waiters
        tasks.cancel_scope.cancel()
    if not wants:
        assert free > 10, "this side's device turn does not wait for it either"


async def test_a_sender_that_announces_more_blocks_than_requested_is_an_error() -> None:
    async with pair() as (server, client):
        assert isinstance(server, Placed)
        assert isinstance(server.channel, hccl._HcclChannel)
        await server.channel._messenger.post(Open(0, 2, 2))
        with pytest.raises(TransportError, match="about to send 2 blocks where 1 are wanted"):
            await client.recv([block(0, bytes(3), CLIENT)])


async def test_two_ends_on_one_device_fail_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in two processes: each end has its own account of the device.
    monkeypatch.setattr(hccl_link, "device_of", devices.Device)
    monkeypatch.setattr(sim, "_making", _Forgetful())
    ours, theirs = signals()
    transport = HcclTransport()
    pending = await transport.offer(setup_for(ours, SERVER))

    async def connect() -> None:
        with pytest.raises(TransportError, match="EI0009"):
            await transport.connect(pending.offer, setup_for(theirs, SERVER))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connect)
        with pytest.raises(TransportError, match="EI0009"):
            await pending.accept()


class _Forgetful(set[int]):
    def __contains__(self, device: object) -> bool:
        return False


async def test_wrong_lengths_are_an_error_at_the_receiver() -> None:
    async with pair(stall=1.0) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(_ignoring_loss, server.send, [block(0, bytes(10), SERVER)])
        with pytest.raises(TransportError):
            await client.recv([block(0, bytes(11), CLIENT)])


async def _ignoring_loss(call: Any, *args: Any) -> None:
    try:
        await call(*args)
    except TransportError:
        return


@pytest.mark.parametrize("spans", [1, 3])
async def test_a_full_device_ends_the_channel_only(spans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair() as (server, client), anyio.create_task_group() as tasks:
        into = TensorBlockView(0, [bytes(1 << 20)] * spans, CLIENT)
        tasks.start_soon(_ignoring_loss, server.send, [TensorBlockView(0, [b"x" * (1 << 20)] * spans, SERVER)])
        monkeypatch.setattr(accounts, "limit", 0)
        with pytest.raises(TransportError, match="NPU out of memory"):
            await client.recv([into])
        monkeypatch.undo()
        assert into.data == bytes(spans << 20)


async def test_a_device_without_memory_for_a_communicator_is_an_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "limit", 30 << 20)
        with pytest.raises((TransportError, BaseExceptionGroup)) as caught:
            async with pair(stall=2.0, timeout=5.0):
                pass
    assert "NPU out of memory" in repr(caught.value) or "ended the channel" in repr(caught.value)


async def test_while_memory_is_measured_no_communicator_is_opened_or_freed() -> None:
    device = devices.device_of(SERVER)
    async with pair():
        await anyio.to_thread.run_sync(devices.hold_still, SERVER, "profiling", 2.5)
        ours, _ = signals()
        with pytest.raises(RefusedError, match="profiling") as caught:
            await HcclTransport().offer(setup_for(ours, SERVER))
        assert (caught.value.code, caught.value.retry_after) == ("busy", 2.5)
    assert device.usage()[0] == 1  # closed, but not freed
    assert len(sim.open_now) == 1
    await anyio.to_thread.run_sync(devices.move_again, SERVER)
    assert device.usage() == (0, 0)
    await anyio.to_thread.run_sync(devices.move_again, SERVER)
    async with pair():
        pass


async def test_measuring_that_begins_between_offer_and_connection_refuses_the_channel() -> None:
    ours, theirs = signals()
    transport = HcclTransport()
    pending = await transport.offer(setup_for(ours, SERVER))
    await anyio.to_thread.run_sync(devices.hold_still, SERVER, "profiling", 1.0)

    async def connect() -> None:
        with pytest.raises(PeerLost, match="profiling"):
            await transport.connect(pending.offer, setup_for(theirs, CLIENT))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connect)
        with pytest.raises(RefusedError, match="profiling"):
            await pending.accept()
    await anyio.to_thread.run_sync(devices.move_again, SERVER)


def test_measuring_waits_until_a_communicator_is_made() -> None:
    account = devices.device_of(SERVER)
    account.turns.take("maker", 1.0)
    with pytest.raises(TransferTimeout):
        devices.hold_still(SERVER, "profiling", 1.0, wait=0.0)
    account.turns.give("maker")
    devices.move_again(SERVER)


@pytest.mark.parametrize(
    ("device", "variable", "reason"),
    [
        ("cpu", None, "it moves tensors in an NPU's memory only, not on cpu"),
        ("npu:9", None, "there are 4 NPUs here"),
        ("npu:0", ("RANK_TABLE_FILE", "/etc/table.json"), "RANK_TABLE_FILE is set"),
        ("npu:0", ("ROOTINFO_SUBCOMM_ENABLE", "1"), "ROOTINFO_SUBCOMM_ENABLE=1 is set"),
        ("npu:0", ("ROOTINFO_SUBCOMM_ENABLE", "0"), None),
    ],
)
async def test_where_hccl_cannot_run_the_reason_is_named(
    device: str, variable: tuple[str, str] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv(*variable)
    missing = HcclTransport().missing(device)
    if reason is None:
        assert missing is None
        return
    assert missing is not None
    assert missing.startswith(reason)
    ours, _ = signals()
    with pytest.raises(TransportError, match=reason):
        await HcclTransport().offer(setup_for(ours, device))


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\x00garbage",
        b"\x81\xa2is\xa5Value",
        b"\x82\xa2is\xa2Go\xa5group\x07",
        _encode(Ready(7)),
        _encode(Ready(0, -1)),
        _encode(Go(0, 1)),
        _encode(Open(0, 0, 1)),
        _encode(Open(0, 1, -1)),
    ],
)
async def test_invalid_messages(note: bytes) -> None:
    ours, theirs = signals()
    pending = await HcclTransport().offer(setup_for(ours, SERVER, timeout=5.0))
    await theirs.post(note)
    with anyio.fail_after(4), pytest.raises(PeerLost, match=r"can't be read|invalid message"):
        await pending.accept()


async def test_too_many_store_values_from_a_peer_are_an_error() -> None:
    ours, theirs = signals()
    pending = await HcclTransport().offer(setup_for(ours, SERVER, timeout=5.0))
    for number in range(20):
        await theirs.post(_encode(Value(0, f"key{number}", b"x")))
    with pytest.raises(PeerLost, match="value that no group of two needs"):
        await pending.accept()


@pytest.mark.parametrize("offer", [b"", b"\x80", b"\xc1", b"\x82\xa6device\x01"])
async def test_invalid_offers(offer: bytes) -> None:
    ours, _ = signals()
    with pytest.raises(TransportError, match="offer of an HCCL group can't be read"):
        await HcclTransport().connect(offer, setup_for(ours, CLIENT))


def test_the_blocking_wait_variable_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HCCL_BLOCKING_WAIT", "0")

    def make() -> None:
        with devices.blocking_wait():
            assert os.environ["TORCH_HCCL_BLOCKING_WAIT"] == "1"
            raise ValueError("not made")

    with pytest.raises(ValueError, match="not made"):
        make()
    assert os.environ.pop("TORCH_HCCL_BLOCKING_WAIT") == "0"


def test_device_turns_are_first_in_first_out_and_waiting_can_be_abandoned() -> None:
    lock = devices.FifoLock()
    lock.take("a", 1.0)
    with pytest.raises(TransferTimeout, match="1 other links"):
        lock.take("b", 0.0)
    with pytest.raises(PeerLost):
        lock.take("c", 10.0, lambda: True)
    lock.give("b")  # it has no turn: no effect
    lock.give("a")
    lock.take("d", 0.0)
    lock.give("d")
