"""Chains and several sources over HCCL: complete servers and pulls, each engine on its own simulated device.

On every device one window moves at a time, which the fixture of this folder checks in all tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from anyio.abc import TaskGroup
from torch_npu import _hccl as sim
from torch_npu._traffic import traffic

import netloader
from netloader.core import pull_state
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.core.protocol import State
from netloader.core.report import Progress, PullReport
from netloader.tensors import hold
from netloader.transports.conformance import TensorBlockView
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from netloader.transports.hccl import HcclTransport, devices, scheduler
from netloader.transports.hccl import link as hccl_link
from netloader.transports.hccl.messages import HcclMessage, Messenger, Withdraw
from tests.npu_sim.inside.kit import tiled
from tests.npu_sim.inside.pairs import pair

BLOCK = 256 << 10
WINDOW = 2 * BLOCK
HELD_AFTER = 6
IDENTITY = ModelIdentity(model="m")
DEVICES = tuple(f"npu:{index}" for index in range(4))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many small windows, slow enough to overlap; on exit, checks that no communicator and no turn is left."""
    monkeypatch.setattr(sim, "LATENCY", 0.01)
    monkeypatch.setattr(hccl_link, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(pull_state, "_WINDOW_BYTES", (4 * WINDOW, 4 * WINDOW))
    traffic.journal.clear()
    yield
    assert not sim.open_now
    for name in DEVICES:
        account = devices.device_of(name)
        assert account.usage() == (0, 0)
        account.turns.take("test", 0.0)
        account.turns.give("test")


def weights(device: str, seed: int) -> Tensors:
    """Large, small, empty, tied and in tiles; about 30 blocks."""
    rng = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)

    made = {
        "large": bits(24, BLOCK).to(device),
        "half": bits(300, 500, 2).view(torch.float16).squeeze(-1).to(device),
        "permuted": bits(128, 1000).to(device).t(),
        "empty": torch.empty(0, 4, device=device),
        "scale": bits(4).view(torch.float32).reshape(()).to(device),
        "tiles": tiled(bits(512, 256).view(torch.int8), device),
    }
    made["tied"] = made["half"]
    return made


EXPECTED = {name: tensor.cpu() for name, tensor in weights(DEVICES[0], 1).items()}


def holding(device: str) -> Any:
    return hold(weights(device, 1), IDENTITY, block_bytes=BLOCK, threads=1)


HELD = {device: holding(device) for device in DEVICES[:3]}
PLAN = HELD["npu:0"].announcement.plan
BLOCKS = len(PLAN.blocks)
HELD_BYTES = sum(block.nbytes for block in PLAN.blocks[:HELD_AFTER])


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The values as bytes."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def wrong(tensors: Tensors) -> list[str]:
    return [name for name, tensor in tensors.items() if as_bytes(tensor) != as_bytes(EXPECTED[name])]


async def until(condition: Callable[[], object], what: str) -> None:
    with anyio.move_on_after(30):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await anyio.sleep(0.002)
        return
    raise AssertionError(f"waited in vain: {what}")


def server(device: str, faults: Faults | None = None, **options: Any) -> netloader.Server:
    carrier = HcclTransport() if faults is None else FaultyTransport(HcclTransport(), faults)
    return netloader.Server(host="127.0.0.1", transport=carrier, device=device, **options)


def at(source: netloader.Server) -> Address:
    return Address("127.0.0.1", source.port)


def serves(source: netloader.Server) -> bool:
    return any(session.state is State.TRANSFER for session in source.sessions)


@dataclass
class Replica:
    """A pull of a device, and its outcome."""

    into: Tensors
    verified: int = 0
    report: PullReport | None = None

    def start(self, tasks: TaskGroup, *sources: netloader.Server, **options: Any) -> None:
        async def run() -> None:
            self.report = await netloader.pull(
                self.into,
                IDENTITY,
                sources=[at(source) for source in sources],
                transport="hccl",
                progress=self._progressed,
                timeout=60,
                **options,
            )

        tasks.start_soon(run)

    def _progressed(self, progress: Progress) -> None:
        self.verified = progress.verified

    def gave(self, source: netloader.Server) -> int:
        """Number of blocks that came from this source."""
        assert self.report is not None
        share = self.report.sources.get(str(at(source)))
        return 0 if share is None else share.blocks


def replica(device: str) -> Replica:
    made = Replica(weights(device, 2))
    assert wrong(made.into)
    return made


def directions(device: int) -> list[bool]:
    """The direction of each window of a device: True where it sent."""
    return [sends for sends, _ in itertools.groupby(one.sends for one in traffic.journal if one.device == device)]


async def test_a_relay_sends_while_its_source_is_idle_and_then_alternates_between_both_directions() -> None:
    faults = Faults([Fault(FaultKind.HOLD, HELD_AFTER - 1, side=Side.SEND)])
    async with (
        server("npu:0", faults) as seed,
        server("npu:1") as relay,
        anyio.create_task_group() as tasks,
    ):
        seed.add(HELD["npu:0"])
        first, last = replica("npu:1"), replica("npu:2")
        first.start(tasks, seed, relay=relay)
        await until(lambda: first.verified == HELD_BYTES, "the seed gives some blocks and stops")
        last.start(tasks, seed)
        await until(lambda: last.verified == HELD_BYTES, "the relay passes on what it has")
        assert first.verified == HELD_BYTES, "and waits for its parent meanwhile"
        assert not devices.device_of("npu:1").turns._waiters, "without its device's turn"
        assert serves(relay)
        passed = [one.sends for one in traffic.journal if one.device == 1]
        assert passed.count(False) == passed.count(True) == HELD_AFTER
        traffic.journal.clear()
        faults.release()
    assert wrong(first.into) == wrong(last.into) == []
    assert first.gave(seed) == BLOCKS
    assert last.gave(relay) == BLOCKS, "no block left the seed twice"
    moved = [(one.device, one.peer, one.sends) for one in traffic.journal]
    assert {(0, 1, True), (1, 0, False), (1, 2, True), (2, 1, False)} == set(moved)
    # From here on both directions had work most of the time. A window has two blocks, more where they are small.
    assert len(directions(1)) >= (BLOCKS - HELD_AFTER) // 2


async def test_one_client_alternates_between_two_seeds() -> None:
    slow = Faults([Fault(FaultKind.HOLD, 0, side=Side.SEND)])
    async with (
        server("npu:1", slow) as one,
        server("npu:2") as two,
        anyio.create_task_group() as tasks,
    ):
        for seed, device in ((one, "npu:1"), (two, "npu:2")):
            seed.add(HELD[device])
        client = replica("npu:0")
        client.start(tasks, one, two)
        # The first seed stops after its first block; otherwise no blocks might be left for the other one.
        await until(lambda: any(b.device == 2 for b in traffic.journal), "the second one gives blocks")
        slow.release()
    assert wrong(client.into) == []
    assert client.gave(one) > 1
    assert client.gave(two) > 1
    assert client.gave(one) + client.gave(two) == BLOCKS
    sources = [peer for peer, _ in itertools.groupby(one.peer for one in traffic.journal if one.device == 0)]
    assert set(sources) == {1, 2}
    assert len(sources) >= 4, "not all of one and then all of the other"


async def test_two_clients_of_the_same_two_seeds_do_not_deadlock() -> None:
    async with (
        server("npu:0", fan_out=0) as one,
        server("npu:1", fan_out=0) as two,
        anyio.create_task_group() as tasks,
    ):
        for seed, device in ((one, "npu:0"), (two, "npu:1")):
            seed.add(HELD[device])
        clients = [replica("npu:2"), replica("npu:3")]
        clients[0].start(tasks, one, two)
        clients[1].start(tasks, two, one)
    assert [wrong(client.into) for client in clients] == [[], []]
    for client in clients:
        assert client.gave(one) + client.gave(two) == BLOCKS


async def test_devices_that_send_to_each_other_at_once_do_not_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relays do so only for a short time; a side that holds its turn while it waits for the other gives it back."""
    withdrawn = []
    post = Messenger.post

    async def noted(self: Messenger, note: HcclMessage) -> None:
        if isinstance(note, Withdraw):
            withdrawn.append(note)
        await post(self, note)

    monkeypatch.setattr(Messenger, "post", noted)
    monkeypatch.setattr(scheduler, "_PATIENCE", (0.02, 0.03))
    async with pair(stall=10.0) as (down, at_down), pair(stall=10.0, server="npu:0", client="npu:1") as (up, at_up):
        turns = [devices.device_of(name).turns for name in ("npu:0", "npu:1")]
        for turn in turns:
            await anyio.to_thread.run_sync(turn.take, "starter", 1.0)
        into = [TensorBlockView.zeros(0, 3 << 20, device) for device in ("npu:0", "npu:1")]
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(down.send, [TensorBlockView(0, [b"d" * (3 << 20)], "npu:1")])
                tasks.start_soon(up.send, [TensorBlockView(0, [b"u" * (3 << 20)], "npu:0")])
                tasks.start_soon(at_down.recv, into[:1])
                tasks.start_soon(at_up.recv, into[1:])
                await until(lambda: all(len(turn._waiters) == 2 for turn in turns), "both senders are in line")
                for turn in turns:
                    turn.give("starter")
    assert [view.data[:1] + view.data[-1:] for view in into] == [b"dd", b"uu"]
    assert withdrawn
