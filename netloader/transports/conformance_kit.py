"""Helpers for conformance checks: two ends within one process, blocks in their own tensors, and calls in tasks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.abc
import anyio.lowlevel
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from netloader.codecs.regions import Regions, regions_of
from netloader.errors import (
    PeerLost,
    TransportError,
    TransportUnavailable,
)
from netloader.transports.base import Channel, Pending, Setup, Transport
from netloader.transports.contract_0_1 import adapted

if TYPE_CHECKING:
    import torch

__all__ = [
    "PATIENCE",
    "Failed",
    "LocalSignals",
    "MakePair",
    "RunningCall",
    "TensorBlockView",
    "live_threads",
    "local_signals",
    "mixed_blocks",
    "open_descriptors",
    "pair_maker",
    "raises",
    "require",
    "run_pipelined",
    "started",
    "within",
]

_MIB = 1 << 20

PATIENCE = 30.0
"""Seconds after which a check fails when something that should happen at once has not happened."""


class Failed(AssertionError):
    """An implementation does not do what its contract says."""


class MakePair(Protocol):
    """Opens two ends of one channel and closes them afterwards."""

    def __call__(self, *, stall: float = PATIENCE) -> AbstractAsyncContextManager[tuple[Channel, Channel]]:
        """The server's end and the client's end. `stall`: see :class:`~netloader.transports.base.Setup`."""
        ...


class TensorBlockView:
    """A block in its own tensors.

    Args:
        number: Its number.
        spans: The bytes of each span.
        device: Device of the tensors.
    """

    def __init__(self, number: int, spans: Sequence[bytes | bytearray], device: str = "cpu") -> None:
        import torch

        self.number = number
        self.nbytes = sum(map(len, spans))
        self._device = device
        self._spans = [_tensor(torch, span).to(device) for span in spans]

    @classmethod
    def zeros(cls, number: int, nbytes: int, device: str = "cpu") -> TensorBlockView:
        """A block of one span of zeros."""
        import torch

        block = cls(number, [], device)
        block.nbytes = nbytes
        block._spans.append(torch.zeros(nbytes, dtype=torch.uint8, device=device))
        return block

    @property
    def data(self) -> bytes:
        """All its bytes."""
        return b"".join(span.cpu().numpy().tobytes() for span in self._spans)

    def tensors(self) -> Sequence[torch.Tensor]:
        """See :class:`~netloader.transports.base.BlockView`."""
        return self._spans

    def buffers(self) -> Sequence[memoryview]:
        """See :class:`~netloader.transports.base.BlockView`."""
        if self._device != "cpu":
            raise TransportUnavailable(f"block {self.number} is on {self._device}")
        return [memoryview(span.numpy()) for span in self._spans]

    def regions(self) -> Regions[int]:
        """See :class:`~netloader.transports.base.BlockView`."""
        return regions_of(self.buffers())

    def settle(self) -> None:
        """See :class:`~netloader.transports.base.BlockView`: its bytes are where they belong."""

    def fill(self, value: int) -> None:
        """Write one value everywhere."""
        for span in self._spans:
            span.fill_(value)


def _tensor(torch: Any, span: bytes | bytearray) -> Any:
    return torch.frombuffer(bytearray(span), dtype=torch.uint8) if span else torch.empty(0, dtype=torch.uint8)


def mixed_blocks() -> list[TensorBlockView]:
    """Blocks from one byte to several MiB, with one span or with a thousand, some of them empty."""
    shapes: list[list[int]] = [
        [1],
        [3 * _MIB + 1],
        [1 + number % 5 for number in range(1024)],
        [0, 7, 0],
        [_MIB, 1, _MIB],
        [2 * _MIB],
        [4096] * 1024,
        [],
        [17],
    ]
    return [TensorBlockView(number, [os.urandom(span) for span in spans]) for number, spans in enumerate(shapes)]


class LocalSignals:
    """One end of a control connection within the process; see :func:`local_signals`."""

    def __init__(self, outgoing: MemoryObjectSendStream[bytes], incoming: MemoryObjectReceiveStream[bytes]) -> None:
        self._outgoing = outgoing
        self._incoming = incoming

    async def post(self, data: bytes) -> None:
        """See :class:`~netloader.transports.base.Signals`."""
        if len(data) > 64 << 10:
            raise Failed(f"a signal has {len(data)} bytes, at most 64 KiB are allowed")
        try:
            await self._outgoing.send(bytes(data))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise PeerLost("the control connection ended") from error

    async def fetch(self) -> bytes:
        """See :class:`~netloader.transports.base.Signals`."""
        try:
            return await self._incoming.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError) as error:
            raise PeerLost("the control connection ended") from error

    def close(self) -> None:
        """End the connection for both sides."""
        self._outgoing.close()
        self._incoming.close()


def local_signals() -> tuple[LocalSignals, LocalSignals]:
    """Both ends of a control connection within the process."""
    there, at_there = anyio.create_memory_object_stream[bytes](64)
    back, at_back = anyio.create_memory_object_stream[bytes](64)
    return LocalSignals(there, at_back), LocalSignals(back, at_there)


def pair_maker(
    server: Transport, client: Transport | None = None, *, device: str = "cpu", host: str = "127.0.0.1"
) -> MakePair:
    """A maker of pairs for :func:`check_transport`.

    Args:
        server: The transport at the server's end.
        client: The one at the client's end; the same object by default.
        device: Device of the blocks.
        host: The address of both ends.
    """
    server = adapted(server)
    other = server if client is None else adapted(client)

    @asynccontextmanager
    async def make_pair(*, stall: float = PATIENCE) -> AsyncIterator[tuple[Channel, Channel]]:
        ours, theirs = local_signals()
        setups = [
            Setup(
                device=device,
                local_host=host,
                peer_host=host,
                peer_facts=peer.facts(device),
                signals=signals,
                timeout=PATIENCE,
                stall=stall,
                data_key=b"d" * 32,  # as with a token
            )
            for signals, peer in ((ours, other), (theirs, server))
        ]
        opened: list[Channel] = []
        try:
            pending = await server.offer(setups[0])
            require(isinstance(pending, Pending), f"offer returns no Pending, but {type(pending).__name__}")
            require(isinstance(pending.offer, bytes), f"pending.offer is not bytes, but {type(pending.offer).__name__}")
            async with anyio.create_task_group() as tasks:
                accepting = RunningCall(tasks, pending.accept)
                connecting = RunningCall(tasks, lambda: other.connect(pending.offer, setups[1]))
                opened.append(await accepting.value())
                opened.append(await connecting.value())
            for end, channel in zip(("accept", "connect"), opened, strict=True):
                require(isinstance(channel, Channel), f"{end} returns no Channel, but {type(channel).__name__}")
            yield opened[0], opened[1]
        finally:
            with anyio.CancelScope(shield=True):
                for channel in opened:
                    with within(PATIENCE, "aclose does not end"):
                        await channel.aclose()
            ours.close()
            theirs.close()

    return make_pair


class RunningCall:
    """An operation that runs in its own task, and its result."""

    def __init__(self, tasks: anyio.abc.TaskGroup, start: Callable[[], Awaitable[Any]]) -> None:
        self._start = start
        self._over = anyio.Event()
        self._value: Any = None
        self.error: BaseException | None = None
        self.scope = anyio.CancelScope()
        tasks.start_soon(self._main)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    async def value(self) -> Any:
        """Wait for its result; raises what it raised."""
        await self.wait()
        if self.error is not None:
            raise self.error
        return self._value

    async def wait(self) -> None:
        """Wait until it has ended, with or without an error."""
        with within(PATIENCE, "an operation does not end"):
            await self._over.wait()

    async def ends_with(self, kind: type[BaseException], what: str) -> None:
        """Fail unless it ends with this error."""
        await self.wait()
        if not isinstance(self.error, kind):
            raise Failed(f"{what}: expected {kind.__name__}, got {self.error!r}") from self.error

    async def cancelled(self) -> None:
        """Cancel it. Fail unless it ends soon, as cancelled."""
        self.scope.cancel()
        await self.wait()
        if self.error is not None or not self.scope.cancelled_caught:
            raise Failed(f"a cancelled operation ended with {self.error!r}") from self.error

    async def _main(self) -> None:
        try:
            with self.scope:
                self._value = await self._start()
        except Exception as error:  # noqa: BLE001 - raised by value()
            self.error = error
        finally:
            self._over.set()


async def started(tasks: anyio.abc.TaskGroup, call: Callable[[], Awaitable[None]]) -> RunningCall:
    """Start a call in a task, and let it run until it blocks."""
    operation = RunningCall(tasks, call)
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    return operation


async def run_pipelined(channel: Channel, calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Make calls in order, up to `depth` at a time."""
    slots = anyio.Semaphore(channel.depth)

    async def make(call: Callable[[], Awaitable[None]]) -> None:
        await call()
        slots.release()

    async with anyio.create_task_group() as tasks:
        for call in calls:
            await slots.acquire()
            tasks.start_soon(make, call)


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Fail if the body takes longer."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        raise Failed(f"{what} within {seconds:g} s") from error


@contextmanager
def raises(kind: type[BaseException], what: str) -> Iterator[None]:
    """Fail if the body does not raise this error."""
    try:
        yield
    except kind:
        return
    except TransportError as error:
        raise Failed(f"{what}: expected {kind.__name__}, got {error!r}") from error
    raise Failed(f"{what}: expected {kind.__name__}, nothing was raised")


def require(condition: object, what: str) -> None:
    """Fail if `condition` is false."""
    if not condition:
        raise Failed(what)


def live_threads() -> set[str]:
    """Names of all live threads, except those that event loops keep for blocking calls."""
    names = {thread.name for thread in threading.enumerate() if thread.is_alive()}
    return {name for name in names if not name.startswith(("asyncio_", "AnyIO worker"))}


def open_descriptors() -> dict[int, str]:
    """The target of each open descriptor of this process."""
    gc.collect()
    found = {}
    for path in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # the descriptor of the folder itself
            found[int(path.name)] = str(path.readlink())
    return found
