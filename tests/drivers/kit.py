"""Helpers of the driver tests: weights, servers with short deadlines, scripted peers on real sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableSequence, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
import msgspec
import pytest
import torch
from anyio.abc import SocketAttribute, SocketStream

from netloader.client.probe import relay_at
from netloader.client.pull import pull_from
from netloader.codecs.frames import FrameDecoder, client_messages, encode_frame, seal_frame, server_messages
from netloader.core import messages as m
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.core.keys import NO_PROOF, FrameSeal, SessionKeys, session_keys, without_proof
from netloader.core.options import PullOptions, ServeOptions, Timings
from netloader.core.report import ProgressCallback, PullReport
from netloader.discovery.fixed import FixedSources
from netloader.errors import PeerLost
from netloader.observe import Observer
from netloader.observe.logging import RateLimitedLog
from netloader.server.server import HoldingServer
from netloader.server.session import ServerSession
from netloader.tensors import destination, digest_of, hold
from netloader.tensors.holding import TensorHolding
from netloader.transports import registry
from netloader.transports.base import Setup, Transport
from netloader.transports.memory import MemoryHub, MemoryTransport
from tests.tensor_sets import memory_bytes

PATIENCE = 60.0
"""Seconds after which a test that waits for something has failed."""

BLOCK = 1024
IDENTITY = ModelIdentity(model="kit")
QUICK = Timings(hello=1.0, validate=1.0, plan=1.0, stall=1.0, finalize=1.0)
"""Deadlines for tests about peers that let them pass; everybody else has :data:`CALM`."""
CALM = Timings(hello=PATIENCE, validate=PATIENCE, plan=PATIENCE, stall=PATIENCE, finalize=PATIENCE)

Tensors = dict[str, torch.Tensor]
M = TypeVar("M")


def weights(seed: int = 0, rows: int = 40) -> Tensors:
    """One large tensor of `rows` blocks, and small ones of many dtypes, 0-dim, empty, tied and permuted."""
    rng = torch.Generator().manual_seed(seed)

    def bits(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        size = torch.empty(0, dtype=dtype).element_size()
        count = torch.Size(shape).numel() * size
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=rng).view(dtype).reshape(shape)

    made = {
        "large": bits(rows, BLOCK),
        "half": bits(100, 7, dtype=torch.float16),
        "brain": bits(33, 5, dtype=torch.bfloat16),
        "eighth": bits(50, 3, dtype=torch.float8_e4m3fn),
        "flags": torch.randint(0, 2, (77,), generator=rng).bool(),
        "scale": bits(1, dtype=torch.float32).reshape(()),
        "counts": bits(9, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "permuted": bits(6, 50, dtype=torch.float32).t(),
    }
    made["tied"] = made["half"]
    return made


def blank(like: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors of the same names, dtypes, shapes and ties, filled with 0x5A."""
    made: dict[int, torch.Tensor] = {}
    result = {}
    for name, tensor in like.items():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor)
            _bytes(made[id(tensor)]).fill_(0x5A)
        result[name] = made[id(tensor)]
    return result


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def contents(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Name -> the bytes in memory."""
    return {name: memory_bytes(tensor) for name, tensor in tensors.items()}


def held(tensors: Mapping[str, torch.Tensor], identity: ModelIdentity = IDENTITY) -> TensorHolding:
    """A holding that is cut into small blocks."""
    return hold(tensors, identity, block_bytes=BLOCK, threads=1)


def held_weakly(tensors: Mapping[str, torch.Tensor], identity: ModelIdentity = IDENTITY) -> TensorHolding:
    """Like `held`, but the holding does not keep its tensors alive."""
    return hold(tensors, identity, block_bytes=BLOCK, threads=1, weak=True)


class _NoSignals:
    async def post(self, data: bytes) -> None:
        raise PeerLost("there is no other end")

    async def fetch(self) -> bytes:
        raise PeerLost("there is no other end")


def setup() -> Setup:
    """The setup for the transport of a scripted peer."""
    host = "127.0.0.1"
    return Setup(
        device="cpu",
        local_host=host,
        peer_host=host,
        peer_facts={},
        signals=_NoSignals(),
        timeout=PATIENCE,
        stall=PATIENCE,
    )


class Hub:
    """The memory transport that a server and its clients share."""

    def __init__(self, capacity: int = 64 << 10) -> None:
        self.transport = MemoryTransport(MemoryHub(capacity))


def carrier(name: str) -> Transport:
    """A transport between CPUs, by name; skips the test where it cannot run."""
    if name == "memory":
        return Hub().transport
    transport = registry.load(name)
    if why := transport.missing("cpu"):
        pytest.skip(f"{name} cannot run here: {why}")
    return transport


class WatchedServer(HoldingServer):
    """A server that keeps its ended sessions.

    Attributes:
        ended: The sessions that have ended.
        gone: Connections that were turned away, with and without a session.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ended: MutableSequence[ServerSession] = []
        self.gone = 0
        self._turned_away.happened = self._turns_away  # type: ignore[method-assign]

    def _turns_away(self, detail: str) -> None:
        self.gone += 1
        RateLimitedLog.happened(self._turned_away, detail)

    def _report(self, session: ServerSession) -> None:
        self.ended.append(session)
        super()._report(session)


@asynccontextmanager
async def serving(
    transport: Transport,
    *holdings: TensorHolding,
    timings: Timings = CALM,
    observers: Sequence[Observer] = (),
    **options: Any,
) -> AsyncIterator[WatchedServer]:
    """A server on the loopback address. On exit, checks that no session and no turn is left."""
    chosen = {"host": "127.0.0.1", "timings": timings, **options}
    made = ServeOptions(**chosen, software="test")
    check = partial(relay_at, options=PullOptions(token=made.token, timings=timings))
    server = WatchedServer([transport], made, observers=observers, check_relay=check)
    async with server:
        for holding in holdings:
            server.add(holding)
        yield server
    assert server.sessions == ()
    assert (server._turns.taken, server._turns.waiting, server._turns.channels) == (0, 0, 0)
    assert not len(server._connections)


def at(server: HoldingServer) -> Address:
    return Address("127.0.0.1", server.port)


async def pull(
    into: Tensors | None,
    sources: Sequence[Address],
    transport: Transport,
    *,
    identity: ModelIdentity | None = IDENTITY,
    progress: ProgressCallback | None = None,
    timings: Timings = CALM,
    **options: Any,
) -> PullReport:
    """A pull into `into` whose deadlines are shorter than the test's."""
    usual = {"stripe": 1, "timeout": PATIENCE, "connect_timeout": PATIENCE}
    chosen = PullOptions(**{**usual, "timings": timings, **options})
    return await pull_from(destination(into), identity, FixedSources(sources), [transport], digest_of, chosen, progress)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until `condition` holds."""
    with anyio.move_on_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await anyio.sleep(0.002)
        return
    raise AssertionError(f"waited in vain: {what or condition}")


class Wire(Generic[M]):
    """The control connection of a scripted peer, which may send any message or bytes.

    Attributes:
        said: Body of the first message that it sent.
    """

    def __init__(self, stream: SocketStream, decoder: FrameDecoder[M]) -> None:
        self.stream = stream
        self._decoder = decoder
        self._ahead: list[M] = []
        self._seal: FrameSeal | None = None
        self.said = b""

    async def say(self, *messages: m.ClientMessage | m.ServerMessage) -> None:
        self.said = self.said or m.wire_body(messages[0])
        await self.raw(b"".join(self.sealed(encode_frame(message)) for message in messages))

    def sealed(self, frame: bytes) -> bytes:
        """A frame with its authentication code, once there are keys."""
        return frame if self._seal is None else seal_frame(frame, self._seal)

    def authenticate(self, token: bytes, welcome: m.Welcome) -> SessionKeys:
        """Client: from here on, frames are authenticated in both directions."""
        transcript = without_proof(self._decoder.first_body, welcome.proof)
        assert transcript is not None
        keys = session_keys(token, self.said, transcript)
        self._seal = FrameSeal(keys.client)
        self._decoder.authenticate(FrameSeal(keys.server))
        return keys

    async def prove(self, token: bytes, welcome: m.Welcome) -> SessionKeys:
        """Server: say `welcome` with a proof. From here on, frames are authenticated in both directions."""
        welcome = msgspec.structs.replace(welcome, proof=NO_PROOF)
        keys = session_keys(token, self._decoder.first_body, m.wire_body(welcome))
        await self.say(msgspec.structs.replace(welcome, proof=keys.proof))
        self._seal = FrameSeal(keys.server)
        self._decoder.authenticate(FrameSeal(keys.client))
        return keys

    async def raw(self, data: bytes) -> None:
        with contextlib.suppress(anyio.BrokenResourceError):  # the other side closes after a violation
            await self.stream.send(data)

    async def hear(self) -> M:
        """The next message. Raises EndOfStream or BrokenResourceError when the connection has ended."""
        with anyio.fail_after(PATIENCE):
            while not self._ahead:
                first = not self._decoder.first_body
                self._ahead += self._decoder.feed(b"", greeting=first)  # what came with the greeting
                if not self._ahead:
                    self._ahead += self._decoder.feed(await self.stream.receive(), greeting=first)
        return self._ahead.pop(0)

    async def hear_until(self, kind: type) -> Any:
        """The next message of this kind."""
        while True:
            message = await self.hear()
            if isinstance(message, kind):
                return message

    async def hear_all(self) -> list[M]:
        """All messages until the connection ends."""
        heard = []
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                heard.append(await self.hear())
        return heard

    async def closed(self) -> None:
        """Wait until the other side has closed the connection."""
        await self.hear_all()

    async def reset(self) -> None:
        """Close the connection with a RST."""
        raw = self.stream.extra(SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await anyio.aclose_forcefully(self.stream)


ServerScript = Callable[[Wire[m.ClientMessage]], Awaitable[None]]


@dataclass
class FakeServer:
    address: Address
    connections: int = 0


@asynccontextmanager
async def fake_server(script: ServerScript) -> AsyncIterator[FakeServer]:
    """A server that follows `script` on each connection, and closes when the script ends."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    fake = FakeServer(Address("127.0.0.1", port))

    async def handle(stream: SocketStream) -> None:
        fake.connections += 1
        async with stream:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                await script(Wire(stream, client_messages()))

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield fake
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def fake_client(server: HoldingServer) -> AsyncIterator[Wire[m.ServerMessage]]:
    """A new connection to `server` on which no message was sent."""
    async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
        yield Wire(stream, server_messages())


NONCE = bytes(range(m.NONCE_BYTES))


def hello(transport: Transport, token: bytes | None = None) -> m.Hello:
    return m.Hello(protocol=m.PROTOCOL, nonce=NONCE, abilities=abilities(transport), proves=token is not None)


def welcome(transport: Transport) -> m.Welcome:
    return m.Welcome(protocol=m.PROTOCOL, nonce=NONCE, abilities=abilities(transport))


def abilities(transport: Transport) -> tuple[m.Ability, ...]:
    return (m.Ability(transport.name, dict(transport.facts("cpu"))),)


def announce(holding: TensorHolding, **changed: Any) -> m.Announce:
    known = holding.announcement
    return m.Announce(
        **{
            "manifest": known.manifest,
            "block_bytes": known.plan.block_bytes,
            "algorithm": known.algorithm,
            "digests": known.digests,
            "root": known.root,
            "plan": known.plan.digest,
            **changed,
        }
    )


def agree(holding: TensorHolding, transport: Transport) -> m.Agree:
    return m.Agree(plan=holding.announcement.plan.digest, transport=transport.name)


def variant(identity: ModelIdentity = IDENTITY, **changed: Any) -> ModelIdentity:
    return msgspec.structs.replace(identity, **changed)
