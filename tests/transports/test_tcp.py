from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.errors import ChannelClosed, PeerLost, TransferTimeout, TransportError
from netloader.transports.base import BlockView, Channel, Setup
from netloader.transports.conformance import CHECKS, Check, check_transport, pair_maker
from netloader.transports.io import socket_options
from netloader.transports.tcp import TcpTransport
from netloader.transports.tcp import transport as tcp
from tests.preloaded import PYTHON
from tests.transports.bytesview import BytesView, like
from tests.transports.pairs import PATIENCE, opened

spans = st.lists(st.binary(max_size=40), min_size=0, max_size=5)
grouping = st.lists(st.integers(1, 4), min_size=1, max_size=6)
kinds = pytest.mark.parametrize(
    "transport",
    [TcpTransport(1), TcpTransport(2), TcpTransport(3), TcpTransport(2, staged=1000)],
    ids=["1 lane", "2 lanes", "3 lanes", "staged"],
)


class NoSignals:
    """Both ends exchange only the port and the key."""

    async def post(self, data: bytes) -> None:
        raise NotImplementedError

    async def fetch(self) -> bytes:
        raise NotImplementedError


def setup(timeout: float = PATIENCE) -> Setup:
    return Setup(
        device="cpu",
        local_host="127.0.0.1",
        peer_host="127.0.0.1",
        peer_facts={},
        signals=NoSignals(),
        timeout=timeout,
        stall=PATIENCE,
    )


def groups(blocks: list[BytesView], sizes: list[int]) -> list[list[BytesView]]:
    cut: list[list[BytesView]] = []
    rest = list(blocks)
    while rest:
        size = sizes[len(cut) % len(sizes)]
        cut.append(rest[:size])
        rest = rest[size:]
    return cut


def numbered(count: int, nbytes: int) -> list[BytesView]:
    return [BytesView(number, bytes([number + 1]) * nbytes) for number in range(count)]


async def sends_until_lost(end: Channel, blocks: list[BytesView]) -> None:
    """Bytes that the kernel accepted may be lost silently, so only one of many sends has to fail."""

    async def send() -> None:
        for _ in range(50):
            await end.send(blocks)

    with pytest.raises(PeerLost):
        await send()


def port_of(offer: bytes) -> int:
    return int(msgspec.msgpack.decode(offer, type=tcp._TcpOffer).port)


async def reaches(port: int, host: str = "127.0.0.1") -> bool:
    try:
        stream = await anyio.connect_tcp(host, port)
    except OSError:
        return False
    await stream.aclose()
    return True


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@kinds
async def test_conformance(transport: TcpTransport, check: Check) -> None:
    await check_transport(pair_maker(transport), [check])


@given(
    data=st.lists(spans, max_size=8),
    sent=grouping,
    received=grouping,
    lanes=st.integers(1, 4),
    staged=st.none() | st.integers(1, 50),
)
def test_any_blocks_in_any_grouping_arrive_in_order(
    data: list[list[bytes]], sent: list[int], received: list[int], lanes: int, staged: int | None
) -> None:
    blocks = [BytesView(number, *parts) for number, parts in enumerate(data)]
    into = like(blocks)
    seen: list[int] = []

    async def main() -> None:
        async with opened(TcpTransport(lanes, staged=staged)) as (server, client), anyio.create_task_group() as tasks:

            async def send() -> None:
                for group in groups(blocks, sent):
                    await server.send(group)

            tasks.start_soon(send)
            for group in groups(into, received):
                await client.recv(group, lambda block: seen.append(block.number))

    anyio.run(main)
    assert [block.data for block in into] == [block.data for block in blocks]
    assert sorted(seen) == list(range(len(blocks)))


@kinds
async def test_large_blocks_and_many_spans_both_ways(transport: TcpTransport, no_leaked_descriptors: None) -> None:
    many = BytesView(1, *(bytes([number % 251]) * (number % 7) for number in range(5000)))
    blocks = [BytesView(0, bytes(range(256)) * 40_000), many, BytesView(2, b"x" * 3_000_000, b"", b"y" * 34_000_000)]
    async with opened(transport) as (server, client):
        for here, there in ((server, client), (client, server)):
            into = like(blocks)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(here.send, blocks)
                await there.recv(into)
            assert [block.data for block in into] == [block.data for block in blocks]


@kinds
async def test_a_slow_callback_is_called_by_every_lane(transport: TcpTransport) -> None:
    blocks = numbered(12, 200_000)
    into = like(blocks)
    seen: list[tuple[int, bool]] = []
    told: set[str] = set()

    def landed(block: BlockView) -> None:
        time.sleep(0.002)
        told.add(threading.current_thread().name)
        seen.append((block.number, into[block.number].data == blocks[block.number].data))

    async with opened(transport) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, blocks)
        await client.recv(into, landed)
    assert sorted(seen) == [(number, True) for number in range(12)]
    assert len(told) == transport._lanes


@kinds
async def test_an_error_of_the_callback_ends_the_channel(transport: TcpTransport) -> None:
    class Unwanted(Exception):
        pass

    seen: list[int] = []

    def landed(block: BlockView) -> None:
        seen.append(block.number)
        if block.number == 2:
            raise Unwanted

    blocks = numbered(8, 2_000_000)
    async with opened(transport) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(sends_until_lost, server, blocks)
        with pytest.raises(Unwanted):
            await client.recv(like(blocks), landed)
        with pytest.raises(ChannelClosed):
            await client.recv(like(blocks))
        await client.aclose()  # as sessions do at once: the reset ends a sender that waits for buffer space
    assert 2 in seen
    assert len(set(seen)) == len(seen)
    assert transport._lanes != 1 or seen == [0, 1, 2]


@kinds
async def test_a_peer_that_neither_sends_nor_receives_is_detected(transport: TcpTransport) -> None:
    async with opened(transport, stall=0.1) as (server, client):
        with pytest.raises(TransferTimeout, match="sends nothing"):
            await client.recv(like(numbered(3, 10)))
        with pytest.raises(PeerLost):
            await server.send(numbered(2, 50_000_000))
    async with opened(transport, stall=0.1) as (server, client):
        with pytest.raises(TransferTimeout, match="takes no bytes"):
            await server.send(numbered(2, 50_000_000))


@kinds
async def test_closing_ends_what_runs_on_both_sides(transport: TcpTransport, no_leaked_descriptors: None) -> None:
    async with opened(transport) as (server, client), anyio.create_task_group() as tasks:

        async def wait_for(end: Channel, error: type[Exception]) -> None:
            with pytest.raises(error):
                await end.recv(like(numbered(4, 100)))

        tasks.start_soon(wait_for, client, PeerLost)
        tasks.start_soon(wait_for, server, ChannelClosed)
        await anyio.wait_all_tasks_blocked()
        await server.aclose()
        await server.aclose()
        with pytest.raises(ChannelClosed):
            await server.send([])


@kinds
async def test_after_a_cancelled_receive_nothing_lands(transport: TcpTransport) -> None:
    into = like(numbered(6, 1_000_000))
    first = anyio.Event()
    async with opened(transport) as (server, client), anyio.create_task_group() as tasks:
        token = anyio.lowlevel.current_token()
        scope, over = anyio.CancelScope(), anyio.Event()

        async def receive() -> None:
            with scope:
                await client.recv(into, lambda _: anyio.from_thread.run_sync(first.set, token=token))
            over.set()

        tasks.start_soon(receive)
        await server.send(numbered(1, 1_000_000))
        await first.wait()
        scope.cancel()
        await over.wait()
        before = [block.data for block in into]
        await sends_until_lost(server, numbered(6, 1_000_000))
        assert [block.data for block in into] == before
        assert before[0] == b"\x01" * 1_000_000
        assert before[5] == bytes(1_000_000)


async def test_unauthenticated_peers_have_no_effect() -> None:
    transport = TcpTransport(2)
    pending = await transport.offer(setup())
    port = port_of(pending.offer)
    async with anyio.create_task_group() as tasks:
        # More silent connections than are kept at a time.
        visits = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(20)]
        for said in (b"\x00" * 17, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"x"):
            visits.append(await anyio.connect_tcp("127.0.0.1", port))
            await visits[-1].send(said)
        ends: list[Channel] = []
        both = anyio.Event()

        async def accept() -> None:
            ends.append(await pending.accept())
            both.set()

        tasks.start_soon(accept)
        client = await transport.connect(pending.offer, setup())
        await both.wait()
        ends.append(client)
        into = like(numbered(3, 1000))
        tasks.start_soon(ends[1].send, numbered(3, 1000))
        await ends[0].recv(into)
        assert [block.data for block in into] == [block.data for block in numbered(3, 1000)]
        assert not await reaches(port)
        for stream in visits:
            await stream.aclose()
    for end in ends:
        await end.aclose()


async def test_a_connection_from_another_host_is_refused_even_with_the_key() -> None:
    transport = TcpTransport(1)
    pending = await transport.offer(setup(timeout=0.3))
    failed = []

    async def accept() -> None:
        with pytest.raises(TransferTimeout, match="firewall"):
            await pending.accept()
        failed.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept)
        with pytest.raises(PeerLost):
            await transport.connect(pending.offer, replace(setup(), local_host="127.0.0.2"))
    assert failed == [True]


@pytest.mark.parametrize("how", ["given up", "too late", "cancelled"])
async def test_the_listener_closes_when_no_peer_connects(how: str, no_leaked_descriptors: None) -> None:
    transport = TcpTransport()
    pending = await transport.offer(setup(timeout=0.05 if how == "too late" else 20))
    port = port_of(pending.offer)
    if how == "given up":
        await pending.aclose()
        await pending.aclose()
    elif how == "too late":
        with pytest.raises(TransferTimeout):
            await pending.accept()
    else:
        with anyio.move_on_after(0.05):
            await pending.accept()
    assert not await reaches(port)
    with pytest.raises(PeerLost, match="can't be reached"):
        await transport.connect(pending.offer, setup())


async def test_a_client_that_disconnects_during_set_up_is_detected_at_once(no_leaked_descriptors: None) -> None:
    transport = TcpTransport(2)
    pending = await transport.offer(setup())
    wanted = msgspec.msgpack.decode(pending.offer, type=tcp._TcpOffer)

    async def come_and_go() -> None:
        async with await anyio.connect_tcp("127.0.0.1", wanted.port) as stream:
            await stream.send(wanted.key + b"\x00")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(come_and_go)
        with pytest.raises(PeerLost, match="and disconnected"):
            await pending.accept()


async def test_a_server_that_does_not_answer_is_given_up() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        offer = msgspec.msgpack.encode(tcp._TcpOffer(silent.getsockname()[1], 1, bytes(16), bytes(16)))
        with pytest.raises(TransferTimeout, match="firewall"):
            await TcpTransport().connect(offer, setup(timeout=0.05))


async def test_another_program_at_the_servers_port_is_detected() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(b"?" * 16)
            await stream.receive()

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        offer = msgspec.msgpack.encode(tcp._TcpOffer(port, 1, bytes(16), bytes(16)))
        with pytest.raises(TransportError, match="another program listens"):
            await TcpTransport().connect(offer, setup())
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("offer", [b"", b"\xc1", b"\x90", msgspec.msgpack.encode([0, 1, bytes(16), bytes(16)])])
async def test_invalid_offers_are_refused(offer: bytes) -> None:
    with pytest.raises(TransportError, match="invalid"):
        await TcpTransport().connect(offer, setup())


async def test_over_ipv6() -> None:
    blocks = numbered(4, 1000)
    into = like(blocks)
    async with opened(TcpTransport(), host="::1") as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, blocks)
        await client.recv(into)
    assert [block.data for block in into] == [block.data for block in blocks]


def congestion(sock: socket.socket) -> bytes:
    """Name of a socket's congestion control."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


async def test_congestion_control_is_chosen_within_a_host_and_where_bbr_would_pace_a_private_network() -> None:
    async with opened(TcpTransport(1)) as (server, _):
        assert congestion(server._lanes[0]._sock) == b"reno"  # type: ignore[attr-defined]
    with closing(socket.socket()) as sock:
        usual = congestion(sock)
    private = b"reno" if usual == b"bbr" else usual
    for local, peer, expected in (
        ("10.1.2.3", "10.1.2.3", b"reno"),
        ("::ffff:10.1.2.3", "10.1.2.3", b"reno"),
        ("10.1.2.3", "127.0.0.1", b"reno"),
        ("10.1.2.3", "10.9.9.9", usual),
        ("10.1.2.3", "10.1.2.9", private),
        ("8.8.8.8", "8.8.8.9", usual),
        ("10.1.2.3", "fd00::1", usual),
    ):
        with closing(socket.socket()) as sock:
            socket_options.tune(sock, local, peer)
            assert congestion(sock) == expected, (local, peer)


@pytest.mark.parametrize(("processors", "lanes"), [(1, 2), (2, 2), (15, 2), (16, 4)])
async def test_with_many_processors_there_are_more_lanes(
    processors: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    pending = await TcpTransport().offer(setup())
    await pending.aclose()
    assert msgspec.msgpack.decode(pending.offer, type=tcp._TcpOffer).lanes == lanes


async def test_a_lane_that_has_nothing_to_do_has_no_thread() -> None:
    blocks = numbered(3, 1000)
    into = like(blocks)
    async with opened(TcpTransport(4)) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, blocks[:1])
        await client.recv(into[:1])
        names = {thread.name for thread in threading.enumerate() if thread.name.startswith("netloader-tcp-recv")}
        assert names == {"netloader-tcp-recv-0"}
        tasks.start_soon(server.send, blocks[1:])  # for the next lane
        await client.recv(into[1:])
    assert [block.data for block in into] == [block.data for block in blocks]


def send_room(sock: socket.socket) -> int:
    """Bytes of a socket's send buffer, as the kernel counts them (twice the requested size)."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2


def test_the_send_buffer_is_small_within_a_host_and_the_systems_default_elsewhere() -> None:
    with closing(socket.socket()) as asked, closing(socket.socket()) as near, closing(socket.socket()) as far:
        asked.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, socket_options._HOST_SEND_BYTES
        )  # the system may allow less
        usual = send_room(near)
        socket_options.tune(near, "10.1.2.3", "10.1.2.3")
        socket_options.tune(far, "10.1.2.3", "10.1.2.9")
        assert send_room(near) == send_room(asked) != usual
        assert send_room(far) == usual


KILLED = """
import sys, anyio
from netloader.transports.tcp import TcpTransport
from tests.transports.bytesview import BytesView
from tests.transports.test_tcp import setup

async def main():
    pending = await TcpTransport().offer(setup())
    print(pending.offer.hex(), flush=True)
    channel = await pending.accept()
    await channel.send([BytesView(0, bytes(1000))])
    print("sent", flush=True)
    await channel.recv([BytesView(0, bytes(10))])

anyio.run(main)
"""


@pytest.mark.allow_blocking(reason="talks to a process of its own")
async def test_a_killed_server_is_lost_at_once() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(  # noqa: ASYNC220
        [PYTHON, "-c", KILLED], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        try:
            channel = await TcpTransport().connect(bytes.fromhex(process.stdout.readline()), setup())
            into: Sequence[BytesView] = [BytesView(0, b"x" * 1000), BytesView(1, b"x" * 1000)]
            await channel.recv(into[:1])
            assert process.stdout.readline() == "sent\n"
            process.kill()
            with pytest.raises(PeerLost):
                await channel.recv(into[1:])
            await channel.aclose()
            assert [block.data for block in into] == [bytes(1000), b"x" * 1000]
        finally:
            process.kill()


def test_its_name_facts_and_requirements() -> None:
    assert TcpTransport().missing("cpu") is None
    assert TcpTransport().missing("npu:3") is None
    assert TcpTransport().missing("meta") is not None
    assert TcpTransport().facts("cpu") == {}
    with pytest.raises(TransportError):
        TcpTransport(0)
