"""ProcessGroupHCCL over sockets, with the checks, the order and the failures of the real one.

As in torch_npu: one dense contiguous ``npu`` tensor a call; private formats travel in base format; a communicator per
pair, made by the first operation, its root information in the store; operations in order on a stream of their own;
``wait`` that blocks the current stream and not the host, unless TORCH_HCCL_BLOCKING_WAIT was set in the constructor;
a lost peer that shows only when the timeout of the group has passed, and a watchdog that ends the process then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from . import _formats as formats
from . import _memory as memory
from ._cards import visible
from ._streams import Joinable, Stream, communicators, streams
from ._traffic import Began, traffic

_DTYPES = {
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
_ROOT = struct.Struct("=16sH")
_ROOT_BYTES = 4108
_LENGTH = struct.Struct("=Q")
_CARD = struct.Struct("=I")
_MIB = 1 << 20

LATENCY = 0.001  # seconds that each receive takes at least

_numbers = itertools.count()
created: list[str] = []  # keys of communicators made in this process
open_now: set[int] = set()  # those of them that are open
_making: set[int] = set()  # devices on which one is being made
_alive: set[ProcessGroupHCCL] = set()  # the library keeps its groups alive until they are shut down or aborted


def _flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("0", "")


class Work:
    """One running operation."""

    def __init__(self, group: ProcessGroupHCCL, what: str) -> None:
        self.group = group
        self.what = what
        self.error: Exception | None = None
        self.done = threading.Event()
        self._began = time.monotonic()

    def join(self) -> None:
        self.done.wait()

    def is_completed(self) -> bool:
        return self.done.is_set()

    def left(self) -> float:
        """Seconds until the timeout of the group has passed for this operation."""
        until: float = self._began + self.group.timeout.total_seconds()
        return max(0.0, until - time.monotonic())

    def wait(self, timeout: timedelta | None = None) -> bool:
        streams.current().pending.append(self)
        if self.group.blocking:
            if not self.done.wait(self.left() if timeout is None else timeout.total_seconds()):
                raise RuntimeError(
                    f"[Rank {self.group.rank()}] Watchdog caught collective operation timeout: {self.what}"
                )
            if self.error is not None:
                raise RuntimeError(str(self.error))
        return True


class Options:
    """Options of a group."""

    def __init__(self) -> None:
        self._timeout = timedelta(minutes=30)
        self.op_timeout = timedelta(seconds=10)
        self.is_high_priority_stream = False
        self.global_ranks_in_group: list[int] = []
        self.group_id = ""
        self.hccl_config: dict[str, Any] = {}


class _Communicator:
    """A connected pair, its stream, and the thread that runs its operations."""

    def __init__(self, group: ProcessGroupHCCL, device: int) -> None:
        self.device = device
        self.number = next(_numbers)
        self.peer = -1
        self.operations = 0
        self.stream = Stream()
        self.jobs: queue.SimpleQueue[tuple[Work, list[Joinable], Callable[[socket.socket], None]] | None]
        self.jobs = queue.SimpleQueue()
        self._group = group
        # Twice the buffer is device memory; the buffer of a pair is its own setting.
        self._reserved = 2 * int(os.environ.get("P2P_HCCL_BUFFSIZE", "20")) * _MIB
        memory.accounts.take(device, self._reserved)
        try:
            self._sock = self._connect()
        except OSError as error:
            memory.accounts.give(device, self._reserved)
            raise RuntimeError(f"HCCL function error: the communicator could not be made: {error}") from error
        except BaseException:
            memory.accounts.give(device, self._reserved)
            raise
        created.append("0:1")
        open_now.add(id(self))
        communicators.append(self.stream)
        self._thread = threading.Thread(target=self._run_operations, daemon=True, name="sim-hccl")
        self._thread.start()

    def _connect(self) -> socket.socket:
        limit = float(os.environ.get("HCCL_CONNECT_TIMEOUT", "120"))
        if self._group.rank() == 0:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                root = _ROOT.pack(b"127.0.0.1", listener.getsockname()[1]).ljust(_ROOT_BYTES, b"\0")
                self._group.store.set("0:1", root)
                self._group.store.set("version_key", b"sim")
                listener.settimeout(limit)
                sock, _ = listener.accept()
        else:
            host, port = _ROOT.unpack_from(bytes(self._group.store.get("0:1")))
            self._group.store.get("version_key")
            sock = socket.create_connection((host.rstrip(b"\0").decode(), port), limit)
        sock.settimeout(None)
        own = visible()[self.device]
        sock.sendall(_CARD.pack(own))
        (card,) = _CARD.unpack(_exactly(sock, _CARD.size))
        if card == own:
            sock.close()
            raise RuntimeError("EI0009: two ranks of a communicator are on one device")
        self.peer = card
        return sock

    def _run_operations(self) -> None:
        while (job := self.jobs.get()) is not None:
            work, before, body = job
            for one in before:
                one.join()
            try:
                body(self._sock)
            except Exception as error:  # noqa: BLE001 - HCCL itself reports no failure until the timeout
                work.error = error
                if self._group.ends_process(work):
                    sys.stderr.write("To avoid data inconsistency, we are taking the entire process down.\n")
                    sys.stderr.flush()
                    faulthandler.disable()
                    os.abort()
                return  # neither this operation nor any behind it ever completes
            traffic.end(self.number, self.device)
            work.done.set()

    def start(self, work: Work, before: list[Joinable], body: Callable[[socket.socket], None], *, sends: bool) -> None:
        """Queue an operation behind those that were started before."""
        traffic.begin(self.number, Began(self.device, self.peer, sends), first=not self.operations)
        self.operations += 1
        self.stream.pending.append(work)
        self.jobs.put((work, before, body))

    def destroy(self) -> None:
        """Free the pair; running operations never complete, and write nothing any more."""
        self.jobs.put(None)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()
        traffic.destroyed(self.number, self.device)
        communicators.remove(self.stream)
        open_now.discard(id(self))
        memory.accounts.give(self.device, self._reserved)


def _exactly(sock: socket.socket, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise ConnectionError("the peer is gone")
        view = view[got:]
    return data


class ProcessGroupHCCL:
    """See torch_npu's class of that name."""

    Options = Options

    def __init__(self, store: Any, rank: int, size: int, options: Any = None) -> None:
        options = Options() if options is None else options
        if size != 2 or rank not in (0, 1):
            raise RuntimeError("only pairs are simulated")
        if not options.global_ranks_in_group:
            raise RuntimeError("an empty list of ranks would make this the world group of the process")
        self.store, self.options, self.timeout = store, options, options._timeout
        self.blocking = _flag("TORCH_HCCL_BLOCKING_WAIT")
        self.teardown = not self.blocking and os.environ.get("TORCH_HCCL_ASYNC_ERROR_HANDLING", "1") in ("1", "3")
        self._rank = rank
        self._comm: _Communicator | None = None
        self._closed = threading.Event()
        _alive.add(self)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2

    def ends_process(self, work: Work) -> bool:
        """After a failed operation: whether the watchdog ends the process."""
        if not self.teardown:
            return False
        return not self._closed.wait(work.left())

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work:
        tensor = self._checked(tensors, dst)
        base = formats.cast(tensor, formats.Format.ND)

        def body(sock: socket.socket) -> None:
            data = memory.alias(base).reshape(-1).view(torch.uint8)
            sock.sendall(_LENGTH.pack(data.numel()))
            sock.sendall(data.numpy().data)

        return self._start(f"SEND {tuple(tensor.shape)}", tensor, body)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work:
        tensor = self._checked(tensors, src)
        nbytes = tensor.numel() * tensor.element_size()

        def body(sock: socket.socket) -> None:
            (coming,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
            if coming != nbytes:
                raise RuntimeError(f"{coming} bytes were sent, {nbytes} are received")
            data = torch.frombuffer(_exactly(sock, nbytes), dtype=torch.uint8) if nbytes else torch.empty(0)
            time.sleep(LATENCY)  # a reader that does not wait sees old bytes
            if self._closed.is_set():
                raise ConnectionError("destroyed meanwhile")
            values = data.view(tensor.dtype).reshape(tensor.shape)
            formats.to_cpu(tensor).copy_(values)
            formats.write_back(tensor, values)

        return self._start(f"RECV {tuple(tensor.shape)}", tensor, body)

    def barrier(self, opts: object = None) -> Work:
        raise RuntimeError("a barrier would make a second communicator, of 400 MB")

    def shutdown(self) -> None:
        if self._comm is not None:
            self._comm.stream.drain()
        self.abort_hccl_comm("shutdown")

    def abort_hccl_comm(self, reason: str) -> None:
        self._closed.set()
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.destroy()
        _alive.discard(self)

    def _checked(self, tensors: list[torch.Tensor], peer: int) -> torch.Tensor:
        if len(tensors) != 1:
            raise RuntimeError("Tensor list mustn't be larger than the number of available NPUs")
        (tensor,) = tensors
        if peer != 1 - self._rank:
            raise RuntimeError(f"there is no rank {peer} but this one")
        if tensor.device.type != "npu" or tensor.is_sparse:
            raise RuntimeError("Tensors must be NPU and dense")
        if not tensor.is_contiguous():
            raise RuntimeError("Tensors must be contiguous")
        if formats.format_of(tensor) != memory.ND and tensor.storage_offset() != 0:
            raise RuntimeError("For a tensor of internal format, it's storage_offset must be 0")
        if tensor.dtype not in _DTYPES:
            raise RuntimeError("Unsupported data type for HCCL process group")
        return tensor

    def _start(self, what: str, tensor: torch.Tensor, body: Callable[[socket.socket], None]) -> Work:
        if self._closed.is_set():
            raise RuntimeError("HCCL communicator was aborted")
        if tensor.device.index != streams.device:
            raise RuntimeError(f"the tensor is on npu:{tensor.device.index}, this thread uses npu:{streams.device}")
        if self._comm is None:
            with _one_at_a_time(tensor.device.index):
                self._comm = _Communicator(self, tensor.device.index)
        elif self._comm.device != tensor.device.index:
            raise RuntimeError("one device per process only")
        work = Work(self, what)
        self._comm.start(work, list(streams.current().pending), body, sends=what.startswith("SEND"))
        return work


@contextlib.contextmanager
def _one_at_a_time(device: int) -> Iterator[None]:
    """Check that only one thread at a time makes a communicator on a device."""
    if device in _making:
        raise RuntimeError(f"two communicators are being made on npu:{device} at once")
    _making.add(device)
    try:
        yield
    finally:
        _making.discard(device)
