# mypy: disable-error-code="return-value"
"""The example of docs/transports.md as release 0.1 had it, unchanged: a transport of the contract of 0.1."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.abc

from netloader.errors import ChannelBusy, ChannelClosed, PeerLost, TransferTimeout, TransportError
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup

T = TypeVar("T")
STEP = 1 << 18
KEY = 32


class LineChannel:
    def __init__(self, stream: anyio.abc.SocketStream, stall: float) -> None:
        self._stream = stream
        self._stall = stall
        self._ended = self._closed = False
        self._running: dict[str, anyio.Event] = {}

    async def send(self, blocks: Sequence[BlockView]) -> None:
        async with self._operation("send"):
            for block in blocks:
                for buffer in block.buffers():
                    for start in range(0, len(buffer), STEP):
                        await self._moved(self._stream.send(bytes(buffer[start : start + STEP])))

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        async with self._operation("recv"):
            for block in blocks:
                for buffer in block.buffers():
                    rest = buffer
                    while len(rest):
                        data = await self._moved(self._stream.receive(min(len(rest), STEP)))
                        rest[: len(data)] = data
                        rest = rest[len(data) :]
                if landed is not None:
                    landed(block)

    async def aclose(self) -> None:
        self._ended = self._closed = True
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)
            for over in list(self._running.values()):
                await over.wait()

    async def _moved(self, step: Awaitable[T]) -> T:
        """One step, which is progress; its failures as the contract names them."""
        try:
            with anyio.fail_after(self._stall):
                return await step
        except TimeoutError as error:
            raise TransferTimeout(f"nothing moved for {self._stall:g} s") from error
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise PeerLost("the connection was cut") from error

    @asynccontextmanager
    async def _operation(self, direction: str) -> AsyncIterator[None]:
        if direction in self._running:
            raise ChannelBusy(f"another {direction} is running")
        if self._ended:
            raise ChannelClosed("the channel has ended")
        over = self._running[direction] = anyio.Event()
        try:
            await anyio.lowlevel.checkpoint()
            yield
        except BaseException as error:
            self._ended = True
            with anyio.CancelScope(shield=True):
                await anyio.aclose_forcefully(self._stream)
            if self._closed and isinstance(error, TransportError):
                raise ChannelClosed("the channel was closed") from error
            raise
        finally:
            del self._running[direction]
            over.set()


class LinePending:
    def __init__(self, listener: anyio.abc.Listener[anyio.abc.SocketStream], key: bytes, setup: Setup) -> None:
        self.listener, self.key, self.setup = listener, key, setup

    async def aclose(self) -> None:
        await self.listener.aclose()


class LineTransport:
    name = "line"

    def missing(self, device: str) -> str | None:
        return None if device == "cpu" else "it moves the CPU's memory only"

    def facts(self, device: str) -> Mapping[str, str]:
        return {}

    async def offer(self, setup: Setup) -> tuple[bytes, Pending]:
        listener = await anyio.create_tcp_listener(local_host=setup.local_host)
        key = secrets.token_bytes(KEY)
        port: int = listener.extra(anyio.abc.SocketAttribute.local_port)
        return port.to_bytes(2, "big") + key, LinePending(listener, key, setup)

    async def accept(self, pending: Pending) -> Channel:
        if not isinstance(pending, LinePending):
            raise TransportError("this is no offer of this transport")
        accepted: list[anyio.abc.SocketStream] = []

        async def visit(stream: anyio.abc.SocketStream) -> None:
            if not accepted and await _reads(stream, pending.key):
                accepted.append(stream)
                tasks.cancel_scope.cancel()
            else:
                await anyio.aclose_forcefully(stream)

        try:
            with anyio.move_on_after(pending.setup.timeout):
                async with anyio.create_task_group() as tasks:
                    await pending.listener.serve(visit, tasks)
        finally:
            with anyio.CancelScope(shield=True):
                await pending.aclose()
        if not accepted:
            raise TransferTimeout(f"the client did not come within {pending.setup.timeout:g} s")
        return LineChannel(accepted[0], pending.setup.stall)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        if len(offer) != 2 + KEY:
            raise TransportError(f"an offer of {len(offer)} bytes makes no sense")
        try:
            with anyio.fail_after(setup.timeout):
                stream = await anyio.connect_tcp(setup.peer_host, int.from_bytes(offer[:2], "big"))
                await stream.send(offer[2:])
        except TimeoutError as error:
            raise TransferTimeout(f"the server did not answer within {setup.timeout:g} s") from error
        except (OSError, anyio.BrokenResourceError) as error:
            raise PeerLost(f"the server is not there: {error}") from error
        return LineChannel(stream, setup.stall)


async def _reads(stream: anyio.abc.SocketStream, key: bytes) -> bool:
    """Whether this key is what comes first. A stranger's connection ends here, or with the set-up."""
    said = b""
    try:
        while len(said) < KEY:
            said += await stream.receive(KEY - len(said))
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return False
    return secrets.compare_digest(said, key)
