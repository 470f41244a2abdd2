from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from netloader.errors import ChannelClosed, ConfigError, PeerLost
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from netloader.transports.memory import MemoryHub, MemoryTransport
from tests.transports.bytesview import BytesView, like
from tests.transports.pairs import opened


def blocks(count: int = 4, nbytes: int = 8) -> list[BytesView]:
    return [BytesView(number, bytes([number + 1]) * nbytes) for number in range(count)]


async def carried(
    faults: Faults, sent: Sequence[BytesView], received: Sequence[BytesView], *, client: bool = False
) -> None:
    inner = MemoryTransport(MemoryHub())
    faulty = FaultyTransport(inner, faults)
    async with opened(inner if client else faulty, faulty if client else inner, stall=0.2) as (server, puller):
        await server.send(sent)
        await puller.recv(received)


async def test_without_faults_nothing_changes() -> None:
    sent = blocks()
    into = like(sent)
    await carried(Faults(), sent, into)
    assert [block.data for block in into] == [block.data for block in sent]


@pytest.mark.parametrize("byte", [0, 5, 7])
async def test_corrupt_flips_one_bit_on_the_wire_and_none_in_memory(byte: int) -> None:
    sent = [BytesView(3, bytes(4), bytes(4))]
    into = like(sent)
    faults = Faults([Fault(FaultKind.CORRUPT, 3, byte=byte)])
    await carried(faults, sent, into)
    assert sent[0].data == bytes(8)
    assert into[0].data == bytes(byte) + b"\x01" + bytes(7 - byte)
    assert len(faults.fired) == 1


async def test_a_byte_past_the_end_of_the_block_changes_nothing() -> None:
    sent = blocks(1)
    into = like(sent)
    faults = Faults([Fault(FaultKind.CORRUPT, 0, byte=8)])
    await carried(faults, sent, into)
    assert into[0].data == sent[0].data
    assert faults.fired == ()


async def test_corrupt_on_the_receiving_side() -> None:
    sent = blocks(2)
    into = like(sent)
    await carried(Faults([Fault(FaultKind.CORRUPT, 1, byte=2, side=Side.RECV)]), sent, into, client=True)
    assert into[0].data == sent[0].data
    assert into[1].data == b"\x02\x02\x03\x02\x02\x02\x02\x02"


async def test_drop_leaves_the_block_out() -> None:
    sent = blocks(3)
    into = like(sent[:2])
    await carried(Faults([Fault(FaultKind.DROP, 1)]), sent, into)
    assert [block.data for block in into] == [sent[0].data, sent[2].data]


async def test_swap_exchanges_two_blocks() -> None:
    sent = blocks(4)
    into = like(sent)
    faults = Faults([Fault(FaultKind.SWAP, 0, other=2)])
    await carried(faults, sent, into)
    assert [block.data for block in into] == [sent[i].data for i in (2, 1, 0, 3)]
    assert len(faults.fired) == 1


async def test_truncate_sends_the_start_only() -> None:
    sent = blocks(2)
    into = [BytesView(0, bytes(3)), BytesView(1, bytes(8))]
    await carried(Faults([Fault(FaultKind.TRUNCATE, 0, byte=3)]), sent, into)
    assert [block.data for block in into] == [sent[0].data[:3], sent[1].data]


async def test_cut_closes_in_the_middle_of_a_block() -> None:
    sent = blocks(3)
    inner = MemoryTransport(MemoryHub(0))  # lockstep: blocks sent before the cut have been received
    faulty = FaultyTransport(inner, Faults([Fault(FaultKind.CUT, 1, byte=5)]))
    into = like(sent)
    async with opened(faulty, inner) as (server, client), anyio.create_task_group() as tasks:

        async def receive() -> None:
            with pytest.raises(PeerLost):
                await client.recv(into)

        tasks.start_soon(receive)
        with pytest.raises(PeerLost, match="block 1"):
            await server.send(sent)
    assert [block.data for block in into] == [sent[0].data, b"\x02" * 5 + bytes(3), bytes(8)]


async def test_stall_ends_when_the_channel_is_closed() -> None:
    faulty = FaultyTransport(MemoryTransport(), Faults([Fault(FaultKind.STALL, 1)]))
    async with opened(faulty) as (server, client), anyio.create_task_group() as tasks:
        sent = blocks(3)

        async def send() -> None:
            with pytest.raises(ChannelClosed):
                await server.send(sent)

        tasks.start_soon(send)
        into = like(sent[:1])
        await client.recv(into)
        assert into[0].data == sent[0].data
        await anyio.wait_all_tasks_blocked()
        await server.aclose()
        with pytest.raises(PeerLost):
            await client.recv(like(sent[:1]))


@pytest.mark.parametrize("how", ["release", "event", "file"])
@pytest.mark.parametrize("side", list(Side))
async def test_hold_waits_after_the_block_until_released(how: str, side: Side, tmp_path: Path) -> None:
    event, file = threading.Event(), tmp_path / "go"
    until = {"release": None, "event": event, "file": file}[how]
    faults = Faults([Fault(FaultKind.HOLD, 1, side=side, until=until)])
    async with (
        opened(FaultyTransport(MemoryTransport(), faults)) as (server, client),
        anyio.create_task_group() as tasks,
    ):
        sent = blocks(4)
        into = like(sent)
        landed: list[int] = []
        done = anyio.Event()

        async def receive() -> None:
            await client.recv(into, lambda block: landed.append(block.number))
            done.set()

        tasks.start_soon(receive)
        tasks.start_soon(server.send, sent)
        with anyio.move_on_after(0.1):
            await done.wait()
        assert landed == [0, 1]
        match how:
            case "release":
                faults.release()
            case "event":
                event.set()
            case _:
                await anyio.Path(file).touch()
        await done.wait()
        assert [block.data for block in into] == [block.data for block in sent]


async def test_delay_only_delays() -> None:
    sent = blocks(2)
    into = like(sent)
    faults = Faults([Fault(FaultKind.DELAY, 1, seconds=0.01), Fault(FaultKind.DELAY, 0, side=Side.RECV, seconds=0.01)])
    await carried(faults, sent, into)
    assert [block.data for block in into] == [block.data for block in sent]
    assert [fault.block for fault in faults.fired] == [1]


async def test_cancelled_hold_ends_the_channel_for_both() -> None:
    faulty = FaultyTransport(MemoryTransport(), Faults([Fault(FaultKind.HOLD, 0)]))
    async with opened(faulty, faulty) as (server, client):
        with anyio.move_on_after(0.05):
            await server.send(blocks(2))
        with pytest.raises(ChannelClosed):
            await server.send(blocks(1))
        with pytest.raises(PeerLost):
            await client.recv(like(blocks(2)))


async def test_a_fault_occurs_as_often_as_configured() -> None:
    faults = Faults([Fault(FaultKind.CORRUPT, 0, times=2)])
    for expected in (b"\x00", b"\x00", b"\x01"):
        into = [BytesView(0, bytes(1))]
        await carried(faults, [BytesView(0, b"\x01")], into)
        assert into[0].data == expected
    always = Faults([Fault(FaultKind.CORRUPT, 0, times=None)])
    for _ in range(5):
        into = [BytesView(0, bytes(1))]
        await carried(always, [BytesView(0, b"\x01")], into)
        assert into[0].data == b"\x00"


def test_parse_takes_the_forms_of_the_command_line() -> None:
    faults = Faults.parse("corrupt:12:345")
    assert faults.take(Side.SEND, 12, 346) == [Fault(FaultKind.CORRUPT, 12, byte=345)]
    assert Faults.parse("cut:3").take(Side.SEND, 3, 1) == [Fault(FaultKind.CUT, 3)]
    assert Faults.parse("stall:0").take(Side.SEND, 0, 1) == [Fault(FaultKind.STALL, 0)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "corrupt",
        "corrupt:",
        "corrupt:x",
        "corrupt:1:2:3",
        "stall:1:2",
        "burn:1",
        "cut:-1",
        "cut:٣",
        "cut:1234567890123",
    ],
)
def test_parse_refuses_everything_else(text: str) -> None:
    with pytest.raises(ConfigError, match="BLOCK"):
        Faults.parse(text)


def test_some_faults_exist_on_one_side_only() -> None:
    with pytest.raises(ConfigError, match="side"):
        Fault(FaultKind.DROP, 0, side=Side.RECV)
    with pytest.raises(ConfigError, match="other"):
        Fault(FaultKind.SWAP, 0)
