from __future__ import annotations

import threading
from functools import partial

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.errors import ChannelClosed, PeerLost, TransferTimeout
from netloader.transports.memory import MemoryHub, MemoryTransport
from tests.transports.bytesview import BytesView, like
from tests.transports.pairs import opened, setup_for, signals

spans = st.lists(st.binary(max_size=40), min_size=0, max_size=5)
grouping = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def groups(blocks: list[BytesView], sizes: list[int]) -> list[list[BytesView]]:
    cut: list[list[BytesView]] = []
    rest = list(blocks)
    while rest:
        size = sizes[len(cut) % len(sizes)]
        cut.append(rest[:size])
        rest = rest[size:]
    return cut


@given(data=st.lists(spans, max_size=8), capacity=st.integers(0, 64), sent=grouping, received=grouping)
def test_any_blocks_in_any_grouping_arrive_in_order(
    data: list[list[bytes]], capacity: int, sent: list[int], received: list[int]
) -> None:
    blocks = [BytesView(number, *parts) for number, parts in enumerate(data)]
    into = like(blocks)
    seen: list[int] = []

    async def main() -> None:
        async with opened(MemoryTransport(MemoryHub(capacity))) as (server, client), anyio.create_task_group() as tasks:

            async def send() -> None:
                for group in groups(blocks, sent):
                    await server.send(group)

            tasks.start_soon(send)
            for group in groups(into, received):
                await client.recv(group, lambda block: seen.append(block.number))

    anyio.run(main)
    assert [block.data for block in into] == [block.data for block in blocks]
    assert seen == list(range(len(blocks)))


async def test_lockstep_send_ends_only_when_the_bytes_were_taken() -> None:
    async with opened(MemoryTransport(MemoryHub(0))) as (server, client), anyio.create_task_group() as tasks:
        done = anyio.Event()

        async def send() -> None:
            await server.send([BytesView(0, b"abc")])
            done.set()

        tasks.start_soon(send)
        await anyio.wait_all_tasks_blocked()
        assert not done.is_set()
        into = BytesView(0, bytes(3))
        await client.recv([into])
        await done.wait()
        assert into.data == b"abc"


async def test_a_full_pipe_stalls_the_sender() -> None:
    async with opened(MemoryTransport(MemoryHub(8)), stall=0.05) as (server, client):
        await server.send([BytesView(0, bytes(8))])
        with pytest.raises(TransferTimeout):
            await server.send([BytesView(1, b"x")])
        with pytest.raises(PeerLost):
            await client.recv([BytesView(0, bytes(8))])
        with pytest.raises(ChannelClosed):
            await server.send([])


async def test_ends_may_live_in_two_event_loops() -> None:
    """Like a server in a background thread and a synchronous client."""
    transport = MemoryTransport(MemoryHub(16))
    ours, theirs = signals()
    pending = await transport.offer(setup_for(ours))
    data = bytes(range(256)) * 64
    received = bytearray(len(data))

    async def client() -> None:
        channel = await transport.connect(pending.offer, setup_for(theirs))
        await channel.recv([BytesView(0, received)])
        await channel.aclose()

    thread = threading.Thread(target=partial(anyio.run, client))
    thread.start()
    channel = await pending.accept()
    await channel.send([BytesView(0, data)])
    await anyio.to_thread.run_sync(thread.join)
    await channel.aclose()
    ours.close()
    theirs.close()
    assert received == data


async def test_an_offer_can_be_taken_once_and_withdrawn() -> None:
    hub = MemoryHub()
    transport = MemoryTransport(hub)
    ours, theirs = signals()
    pending = await transport.offer(setup_for(ours))
    first = await transport.connect(pending.offer, setup_for(theirs))
    with pytest.raises(PeerLost):
        await transport.connect(pending.offer, setup_for(theirs))
    # The server gives up although a client has connected; the client gets an error.
    await pending.aclose()
    with pytest.raises(PeerLost):
        await first.recv([BytesView(0, bytes(1))])

    pending = await transport.offer(setup_for(ours))
    assert hub.open_offers == 1
    await pending.aclose()
    assert hub.open_offers == 0
    with pytest.raises(PeerLost):
        await transport.connect(pending.offer, setup_for(theirs))
    ours.close()
    theirs.close()


async def test_accept_waits_no_longer_than_its_timeout() -> None:
    hub = MemoryHub()
    transport = MemoryTransport(hub)
    ours, theirs = signals()
    pending = await transport.offer(setup_for(ours, timeout=0.02))
    with pytest.raises(TransferTimeout):
        await pending.accept()
    assert hub.open_offers == 0
    pending = await transport.offer(setup_for(ours))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await pending.accept()
    assert hub.open_offers == 0
    ours.close()
    theirs.close()


def test_two_hubs_never_match() -> None:
    assert MemoryTransport().facts("cpu") != MemoryTransport().facts("cpu")
    hub = MemoryHub()
    assert MemoryTransport(hub).facts("cpu") == MemoryTransport(hub).facts("cpu")
    assert MemoryTransport().missing("cpu") is None
    assert "npu:3" in str(MemoryTransport().missing("npu:3"))
