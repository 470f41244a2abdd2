"""Messages on a control connection are sent in order, also when the socket is not writable at once."""

from __future__ import annotations

import os
import resource
from typing import cast

import anyio
import pytest
import torch
from anyio.abc import SocketAttribute, SocketListener, SocketStream

from netloader.codecs.frames import client_messages
from netloader.core.messages import Accepted, Announce, ChannelOffer, ClientMessage, Grant, Identify, Want, Welcome
from netloader.errors import PeerLost
from netloader.session.connection import ControlConnection
from tests.drivers import kit

MUCH = 16 << 20
TRIES = 25
"""Tries, some milliseconds apart, after which a socket that took nothing in all of them is full."""


async def connected() -> tuple[ControlConnection[ClientMessage], SocketStream]:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        far = await anyio.connect_tcp("127.0.0.1", listener.extra(SocketAttribute.local_port))
        near = await cast("SocketListener", listener.listeners[0]).accept()
    return ControlConnection(near, client_messages()), far


async def receive(stream: SocketStream, nbytes: int) -> bytes:
    data = bytearray()
    with anyio.fail_after(kit.PATIENCE):
        while len(data) < nbytes:
            data += await stream.receive(1 << 20)
    return bytes(data)


async def test_bytes_that_do_not_fit_wait_until_the_socket_is_writable() -> None:
    connection, far = await connected()
    async with far:
        small, large = b"hello", os.urandom(MUCH)
        over = anyio.Event()

        async def say() -> None:
            await connection.send(large)
            over.set()

        await connection.send(small)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(say)
            await anyio.wait_all_tasks_blocked()
            assert not over.is_set()
            assert await receive(far, len(small) + MUCH) == small + large
        await connection.send(b"room again")
        assert await receive(far, 10) == b"room again"
        await connection.aclose()


async def test_bytes_that_do_not_fit_are_returned_to_be_sent_later() -> None:
    connection, far = await connected()
    async with far:
        small, large = b"hello", os.urandom(MUCH)
        assert connection.send_now(small) == b""
        rest = connection.send_now(large)
        tries = 0

        def is_full() -> bool:  # the kernel moves some of it on to the peer's buffer, now and then
            nonlocal rest, tries
            less = connection.send_now(rest)
            tries = tries + 1 if less == rest else 0
            rest = less
            return tries == TRIES

        await kit.until(is_full)
        assert 0 < len(rest) < MUCH
        assert large.endswith(rest)
        assert connection.send_now(b"no room") == b"no room"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.send, rest)
            assert await receive(far, len(small) + MUCH) == small + large
        assert connection.send_now(b"room again") == b""
        assert await receive(far, 10) == b"room again"
        await connection.aclose()


async def test_writing_to_a_broken_connection_raises() -> None:
    connection, far = await connected()
    await kit.Wire(far, client_messages()).reset()
    with pytest.raises(PeerLost):
        await connection.receive()
    assert connection.send_now(b"hello") == b"hello"
    with pytest.raises(PeerLost):
        await connection.send(b"hello")
    await connection.aclose()


async def test_a_control_connection_needs_no_descriptor_beside_that_of_its_stream() -> None:
    connection, far = await connected()
    taken: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with far:
        try:
            taken.append(os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 10, limits[1]))
            with pytest.raises(OSError, match="Too many"):  # noqa: PT012 - some calls succeed
                while True:
                    taken.append(os.dup(0))
            other = ControlConnection(far, client_messages())
            assert other.send_now(b"hello") == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in taken:
                os.close(descriptor)
        await connection.aclose()
        await other.aclose()
    assert connection.send_now(b"hello") == b"hello"


async def test_messages_keep_their_order_when_the_peer_reads_slowly() -> None:
    """A long announcement does not fit into the socket's buffer; later messages are sent after it."""
    holding = kit.held({f"{n:05}-{'x' * 900}": torch.zeros(1) for n in range(9_000)})
    hub = kit.Hub()
    async with kit.serving(hub.transport, holding) as server, kit.fake_client(server) as wire:
        await wire.say(kit.hello(hub.transport), Identify(identity=kit.IDENTITY), kit.agree(holding, hub.transport))
        await kit.until(lambda: any(len(session._outbox) for session in server._sessions), "something has to wait")
        heard = [await wire.hear() for _ in range(4)]
        assert [type(message) for message in heard] == [Welcome, Accepted, Announce, ChannelOffer]
        assert heard[2] == kit.announce(holding)
        # Messages after the queue was empty again are sent as well.
        channel = await hub.transport.connect(cast("ChannelOffer", heard[3]).offer, kit.setup())
        await wire.say(Want(ranges=((0, 1),)))
        assert await wire.hear() == Grant(ranges=((0, 1),))
        await channel.aclose()
