"""What lies on the wire: frames of real peers byte by byte, digests, proofs, the first bytes of a data channel.

The other end is `tests.kept.by_hand`. Every message with every field is in tests/core/golden.json.
"""

from __future__ import annotations

import ctypes
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from anyio.abc import SocketAttribute, SocketStream

import netloader
from tests.kept import by_hand, records
from tests.kept.by_hand import KEY_BYTES, NONCE, DataPort, Message, Weights, Wire

HOST = "127.0.0.1"
TOKEN = b"a secret, long enough"
SMALL = Weights()
LARGE = Weights(rows=5 << 10, block_bytes=1 << 20)
"""Of which a server makes six blocks by itself."""

IDENTITY = netloader.ModelIdentity(model="kept")
ADDRESSES = ("host:1", "10.0.0.7:19374", "[::1]:65535", "[fe80::1%eth0]:2", "HOST.example:80")
GOLDEN = Path(__file__).parents[1] / "core" / "golden.json"


def masked(raw: bytes) -> str:
    """A frame in hex, without what is random in it or belongs to the moment: zeros stand there."""
    body = raw[4:]
    message = msgspec.msgpack.decode(body)
    for name in ("nonce", "proof", "node", "offer"):
        if name in message:
            value = message[name].encode() if isinstance(message[name], str) else message[name]
            body = body.replace(value, bytes(len(value)))
    if "software" in message:
        body = body.replace(msgspec.msgpack.encode(message["software"]), msgspec.msgpack.encode("netloader"))
    assert raw[:4] == len(raw[4:]).to_bytes(4, "big")
    return (len(body).to_bytes(4, "big") + body).hex()


@asynccontextmanager
async def server(weights: Weights, transport: str, **options: Any) -> AsyncIterator[netloader.Server]:
    async with netloader.Server(weights.tensors(), IDENTITY, host=HOST, transport=transport, **options) as one:
        yield one


@asynccontextmanager
async def client(one: netloader.Server) -> AsyncIterator[Wire]:
    async with await anyio.connect_tcp(HOST, one.port) as stream:
        yield Wire(stream)


async def greet(
    wire: Wire, transport: str, facts: Message | None = None, *, token: bool = False, **identify: Any
) -> list[bytes]:
    """Say Hello and Identify as a client does; what the server said until it announced, or refused."""
    ability = {"name": transport, **({"facts": facts} if facts else {})}
    version = {"protocol": 2, "proves": True} if token else {"protocol": 1}
    await wire.say("Hello", **version, nonce=NONCE, abilities=[ability])
    heard = [await wire.hear_frame()]
    if token:
        wire.welcomed(TOKEN)
    await wire.say("Identify", **{"identity": {"model": "kept"}, "layouts": ["raw"], **identify})
    while msgspec.msgpack.decode(heard[-1][4:])["type"] not in {"Announce", "Refusal", "Waiting"}:
        heard.append(await wire.hear_frame())
    return heard


async def offered(wire: Wire, transport: str, plan: str) -> tuple[bytes, Message]:
    """Agree, and take what the server offers."""
    await wire.say("Agree", plan=plan, transport=transport)
    raw = await wire.hear_frame()
    message = msgspec.msgpack.decode(raw[4:])
    return raw, msgspec.msgpack.decode(message["offer"])


async def from_server() -> dict[str, str]:
    """The frames of a real server: a pull with a token, one that waits, one that is refused."""
    found = {}
    async with server(LARGE, "tcp", token=TOKEN, max_clients=1, fan_out=0) as one, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(client(one)) for _ in range(3)]
        said = await greet(wires[0], "tcp", token=True, manifest=LARGE.manifest_digest)
        raw, _ = await offered(wires[0], "tcp", LARGE.plan_digest)
        said += [raw, *(await greet(wires[1], "tcp", token=True, follow=True))[1:]]
        said += (await greet(wires[2], "tcp", token=True, identity={"model": "another"}))[1:]
        for raw in said:
            found[f"server: {msgspec.msgpack.decode(raw[4:])['type']}"] = masked(raw)
    async with server(SMALL, "tcp") as one, client(one) as wire:
        whole = (await greet(wire, "tcp"))[-1]
        found["server: Announce, with the manifest"] = masked(whole)
    return found


async def from_client() -> dict[str, str]:
    """The frames of a real client: a pull with a token that passes on and gets all, one that has to leave."""
    found: dict[str, str] = {}

    async def serve(stream: SocketStream) -> None:
        async with stream:
            wire = Wire(stream)

            async def hear() -> Message:
                raw = await wire.hear_frame()
                message: Message = msgspec.msgpack.decode(raw[4:])
                found.setdefault(f"client: {message['type']}", masked(raw))
                return message

            hello = await hear()
            assert hello["proves"]
            await wire.welcome(TOKEN, protocol=2, nonce=NONCE, abilities=[{"name": "tcp"}])
            data = DataPort(wire.keys["data"])
            identify = await hear()
            await wire.say("Accepted", identity={"model": "kept"})
            leaves = "client: Verdict" in found
            announcement = SMALL.announcement(manifest_known=identify["manifest"] == SMALL.manifest_digest)
            await wire.say("Announce", **{**announcement, **({"plan": "00" * 32} if leaves else {})})
            try:
                if (await hear())["type"] == "Goodbye":
                    return
                await wire.say("ChannelOffer", transport="tcp", offer=msgspec.msgpack.encode(data.offer))
                await data.let_in()
                while (message := await hear())["type"] == "Want":
                    await wire.say("Grant", ranges=message["ranges"])
                    await data.send(b"".join(SMALL.blocks[n] for n in by_hand.expand(message["ranges"])))
                await wire.say("Goodbye")
                with pytest.raises(anyio.EndOfStream):
                    await wire.hear()
            finally:
                data.close()

    async with await anyio.create_tcp_listener(local_host=HOST) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        source = f"{HOST}:{listener.extra(SocketAttribute.local_port)}"
        for _ in range(2):
            into = SMALL.blank()
            try:
                await netloader.pull(into, IDENTITY, sources=[source], transport="tcp", token=TOKEN, stripe=1)
            except netloader.NoSourceLeft:
                assert "client: Verdict" in found
        tasks.cancel_scope.cancel()
    return found


async def whole_record() -> dict[str, Any]:
    values = {
        f"{name} of {'cuts' if weights is SMALL else 'one pack'}": getattr(weights, name)
        for weights in (Weights(rows=1, block_bytes=1 << 20), SMALL)
        for name in ("manifest_digest", "plan_digest", "root")
    }
    derived = by_hand.keys(TOKEN, b"hello", b"welcome")
    proofs = {f"key {name!r}": key.hex() for name, key in derived.items()}
    proofs["key on a data connection"] = by_hand.data_key(derived["data"], "client", NONCE).hex()
    proofs["code of frame 1"] = by_hand.code(derived["client"], 1, b"body").hex()
    addresses = {f"address {text}": str(netloader.parse_address(text)) for text in ADDRESSES}
    return {**values, **proofs, **addresses, **await from_server(), **await from_client()}


def record() -> dict[str, Any]:
    return anyio.run(whole_record)


async def test_bytes_on_the_wire_are_what_they_were() -> None:
    assert records.differences("wire", await whole_record(), records.load("wire")) == ""


@pytest.mark.parametrize("name", json.loads(GOLDEN.read_text(encoding="utf-8")))
def test_frames_are_maps_of_names(name: str) -> None:
    """The golden frames, read without netloader's code."""
    raw = bytes.fromhex(json.loads(GOLDEN.read_text(encoding="utf-8"))[name])
    message = msgspec.msgpack.decode(raw[4:])
    assert int.from_bytes(raw[:4], "big") == len(raw) - 4
    assert message["type"] == name.partition(",")[0]
    assert next(iter(message)) == "type"


# --- data channels --------------------------------------------------------------------------------------------------


async def receive(sock: socket.socket, nbytes: int) -> bytes:
    found = b""
    with anyio.fail_after(by_hand.PATIENCE):
        while len(found) < nbytes:
            await anyio.wait_readable(sock)
            part = sock.recv(nbytes - len(found))
            assert part, "the server closed a data connection"
            found += part
    return found


async def test_a_tcp_channel_is_a_key_an_answer_and_blocks_in_turn() -> None:
    async with server(LARGE, "tcp") as one, client(one) as wire:
        await greet(wire, "tcp", manifest=LARGE.manifest_digest)
        _, offer = await offered(wire, "tcp", LARGE.plan_digest)
        assert [(name, type(value)) for name, value in offer.items()] == [
            ("port", int),
            ("lanes", int),
            ("key", bytes),
            ("answer", bytes),
        ]
        lanes = [socket.socket() for _ in range(offer["lanes"])]
        try:
            for index, lane in enumerate(lanes):
                lane.setblocking(False)
                lane.connect_ex((HOST, offer["port"]))
                await anyio.wait_writable(lane)
                lane.send(offer["key"] + bytes([index]))
            assert {await receive(lane, KEY_BYTES) for lane in lanes} == {offer["answer"]}
            await wire.say("Want", ranges=[[0, 3], [5, 6]])
            assert await wire.hear() == {"type": "Grant", "ranges": [[0, 3], [5, 6]]}
            for place, number in enumerate((0, 1, 2, 5)):
                block = LARGE.blocks[number]
                assert await receive(lanes[place % len(lanes)], len(block)) == block
            await wire.say("Verdict", outcome="partial", blocks=4)
            assert await wire.hear() == {"type": "Goodbye"}
        finally:
            for lane in lanes:
                lane.close()


async def seqpacket(sock: socket.socket) -> bytes:
    with anyio.fail_after(by_hand.PATIENCE):
        await anyio.wait_readable(sock)
    return sock.recv(1 << 15)


@asynccontextmanager
async def shm_channel(wire: Wire, reason: str) -> AsyncIterator[list[socket.socket]]:
    """Both sockets of a channel within this host, opened up to the point where each end knows how the other reads."""
    _, offer = await offered(wire, "shm", LARGE.plan_digest)
    assert [(name, type(value)) for name, value in offer.items()] == [("name", str), ("key", bytes), ("answer", bytes)]
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    try:
        for index, sock in enumerate(sockets):
            sock.setblocking(False)
            sock.connect("\0" + offer["name"])
            sock.send(offer["key"] + bytes([index]))
        for sock in sockets:
            assert await seqpacket(sock) == offer["answer"]
        blocks, back = sockets
        hello = msgspec.msgpack.decode(await seqpacket(blocks))
        assert list(hello) == ["address", "content"]
        assert ctypes.string_at(hello["address"], 32) == hello["content"]  # this process is the server's
        mine = ctypes.create_string_buffer(b"m" * 32, 32)
        back.send(msgspec.msgpack.encode({"address": ctypes.addressof(mine), "content": mine.raw}))
        assert list(msgspec.msgpack.decode(await seqpacket(back))) == ["reason"]
        blocks.send(msgspec.msgpack.encode({"reason": reason}))
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


async def shm_facts(wire: Wire) -> Message:
    """What the server says that both ends have to have in common."""
    await wire.say("Hello", protocol=1, nonce=NONCE)
    (ability,) = (await wire.hear())["abilities"]
    facts: Message = ability["facts"]
    assert list(facts) == ["host", "network namespace", "user"]
    return facts


async def test_a_channel_within_a_host_says_where_blocks_lie() -> None:
    async with server(LARGE, "shm") as one, AsyncExitStack() as stack:
        facts = await shm_facts(await stack.enter_async_context(client(one)))
        wire = await stack.enter_async_context(client(one))
        await greet(wire, "shm", facts, manifest=LARGE.manifest_digest)
        async with shm_channel(wire, "") as (blocks, _):
            await wire.say("Want", ranges=[[0, 1], [5, 6]])
            assert await wire.hear() == {"type": "Grant", "ranges": [[0, 1], [5, 6]]}
            said = await seqpacket(blocks)
            assert said[:1] == b"S"
            words = struct.unpack(f"={(len(said) - 1) // 8}Q", said[1:])
            found = []
            while words:
                pieces, nbytes, *rest = words
                spans = [(rest[2 * n], rest[2 * n + 1]) for n in range(pieces)]
                words = tuple(rest[2 * pieces :])
                found.append(b"".join(ctypes.string_at(address, size) for address, size in spans))
                assert len(found[-1]) == nbytes
            assert found == [LARGE.blocks[0], LARGE.blocks[5]]
            blocks.send(b"R" + struct.pack("=Q", 2))
            await wire.say("Verdict", outcome="partial", blocks=2)
            assert await wire.hear() == {"type": "Goodbye"}


async def test_a_channel_within_a_host_hands_over_pipes_where_memory_may_not_be_read() -> None:
    async with server(LARGE, "shm") as one, AsyncExitStack() as stack:
        facts = await shm_facts(await stack.enter_async_context(client(one)))
        wire = await stack.enter_async_context(client(one))
        await greet(wire, "shm", facts, manifest=LARGE.manifest_digest)
        async with shm_channel(wire, "it is forbidden") as (blocks, _):
            await anyio.wait_readable(blocks)
            data, numbers, _, _ = socket.recv_fds(blocks, 16, 32)
            try:
                assert data == b"pipes"
                assert len(numbers) > 1
                assert len(numbers) % 2 == 0
            finally:
                for number in numbers:
                    socket.close(number)


async def test_a_gloo_channel_begins_with_an_address() -> None:
    async with server(LARGE, "gloo") as one, AsyncExitStack() as stack:
        hello = await stack.enter_async_context(client(one))
        await hello.say("Hello", protocol=1, nonce=NONCE)
        (ability,) = (await hello.hear())["abilities"]
        wire = await stack.enter_async_context(client(one))
        await greet(wire, "gloo", ability.get("facts"), manifest=LARGE.manifest_digest)
        _, offer = await offered(wire, "gloo", LARGE.plan_digest)
        assert list(offer) == ["is", "host", "port", "pairs"]
        assert (offer["is"], offer["host"]) == ("Address", HOST)
        assert [type(pair) for pair in offer["pairs"]] == [int, int]
