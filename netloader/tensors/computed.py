"""Blocks whose bytes are computed from tensors that hold them in another form: transposed, tiled, or in a wider dtype.

The bytes are computed when a transport first asks for them, and only those of the block. They are in host memory, which
the view owns. On a device, a fixed scratch memory is used, one computation at a time, on a stream of its own.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from netloader.codecs.block_view import BlockView
from netloader.codecs.npu_formats import copy_tiles, is_private, to_plain
from netloader.codecs.regions import Regions, regions_over
from netloader.codecs.staging import staging
from netloader.core.plan import Block, Plan
from netloader.errors import ManifestError
from netloader.tensors.memory import TensorMemory

__all__ = ["CALL_BYTES", "SCRATCH_BYTES", "ComputedBlock", "ComputedMemory", "Inverse", "Scratch", "read"]

SCRATCH_BYTES = 8 << 20
"""Bytes of each scratch buffer. A block of the usual size is computed in one step, a larger one in several."""

CALL_BYTES = 16 << 20
"""The size from which on no further block is added to a call of a channel, because each view owns its bytes until the
call returns. A call has one block more at most."""

_PAUSED_SECONDS = 15.0
"""Seconds that a computation waits while :meth:`Scratch.paused` lasts: less than clients wait for a source."""

_ALIGNMENT = 512
"""Tiles are copied from and to multiples of this. The copy needs 64 bytes, and tensors begin at multiples of 512."""


@dataclass(frozen=True)
class Inverse:
    """How raw bytes are read from the memory of a tensor in another form.

    The raw elements, in the order of their memory, are those of a view of that memory in row-major order.

    Attributes:
        read: The dtype as which the memory is read.
        into: The dtype to which each element is cast.
        shape: Shape of the view.
        stride: Its strides, in elements of `read`. The view begins where the tensor begins.
        tiled: Whether the tensor has a private memory format, so that operators can't read the view.
        steps: The names of the steps, for logs and tests.
    """

    read: torch.dtype
    into: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    tiled: bool = False
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Box:
    """A part of a view: where it begins and how far it extends, in each dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def extent(self, inverse: Inverse) -> tuple[int, int]:
        """The first and past-last byte that it has, counted from the start of the tensor."""
        first = sum(at * step for at, step in zip(self.start, inverse.stride, strict=True))
        last = first + sum((size - 1) * step for size, step in zip(self.size, inverse.stride, strict=True))
        return first * inverse.read.itemsize, (last + 1) * inverse.read.itemsize

    def halves(self) -> Iterator[_Box]:
        """Two parts of it that follow each other in row-major order."""
        axis = next(axis for axis, size in enumerate(self.size) if size > 1)
        half = self.size[axis] // 2
        for start, size in ((0, half), (half, self.size[axis] - half)):
            yield _Box(
                (*self.start[:axis], self.start[axis] + start, *self.start[axis + 1 :]),
                (*self.size[:axis], size, *self.size[axis + 1 :]),
            )


def _boxes(shape: Sequence[int], first: int, past: int) -> Iterator[_Box]:
    """The elements from `first` to before `past`, in row-major order, as boxes: few, whatever the shape."""
    if first >= past:
        return
    if len(shape) == 1:
        yield _Box((first,), (past - first,))
        return
    inner = math.prod(shape[1:])
    head, tail = -(-first // inner), past // inner
    if head > tail:  # within one row
        yield from _within(shape, tail, first - tail * inner, past - tail * inner)
        return
    if first < head * inner:
        yield from _within(shape, head - 1, first - (head - 1) * inner, inner)
    if head < tail:
        yield _Box((head, *[0] * (len(shape) - 1)), (tail - head, *shape[1:]))
    if tail * inner < past:
        yield from _within(shape, tail, 0, past - tail * inner)


def _within(shape: Sequence[int], row: int, first: int, past: int) -> Iterator[_Box]:
    for box in _boxes(shape[1:], first, past):
        yield _Box((row, *box.start), (1, *box.size))


class Scratch:
    """The memory with which blocks are computed on one device: allocated once, and never larger.

    Thread-safe. On the CPU it needs none. It also counts the bytes that computed views own, whoever asked for them.

    Args:
        device: The device of the tensors.
        tiled: Whether tensors in a private memory format are read, which needs a second buffer.
        nbytes: Bytes of each buffer.

    Attributes:
        owned: Bytes in host memory that computed views own now.
    """

    def __init__(self, device: torch.device, *, tiled: bool = False, nbytes: int = SCRATCH_BYTES) -> None:
        self.nbytes = nbytes
        self.owned = 0
        self._counting = threading.Lock()
        self._device = device
        self._lock = threading.Lock()
        self._tiles: torch.Tensor | None = None
        if device.type == "cpu":
            return
        self._module: Any = torch.get_device_module(device)
        self._rows = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._stage = staging(nbytes, device)
        self._stream = self._module.Stream(device=device)
        if tiled:
            self._tiles = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def follow(self) -> None:
        """Wait until all that is queued on the device is complete: what is read from now on comes after it."""
        if self._device.type != "cpu":
            self._module.synchronize(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do nothing on the device meanwhile. Computations wait, and fail if it lasts long.

        Raises:
            ManifestError: The computation that runs does not end.
        """
        if not self._lock.acquire(timeout=_PAUSED_SECONDS):
            raise ManifestError(f"a computation on {self._device} does not end")
        try:
            yield
        finally:
            self._lock.release()

    def host_bytes(self, nbytes: int) -> torch.Tensor:
        """Host memory for a view, counted until it is freed: one-dimensional ``uint8`` of undefined content."""
        made = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._count(nbytes)
        weakref.finalize(made, self._count, -nbytes).atexit = False
        return made

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self.owned += nbytes

    def read(self, tensor: torch.Tensor, inverse: Inverse, box: _Box, out: torch.Tensor) -> None:
        """Read a part of a view.

        Args:
            tensor: Its memory.
            inverse: The view.
            box: The part.
            out: One-dimensional, contiguous, of the dtype `inverse.into`, in host memory.

        Raises:
            ManifestError: The device can't copy it.
        """
        if tensor.device.type == "cpu":
            out.view(box.size).copy_(_strided(tensor, inverse, box))
            return
        first, past = box.extent(inverse)
        if out.nbytes > self.nbytes or (inverse.tiled and past - first + 2 * _ALIGNMENT > self.nbytes):
            done = 0
            for half in box.halves():
                count = math.prod(half.size)
                self.read(tensor, inverse, half, out[done : done + count])
                done += count
            return
        if not self._lock.acquire(timeout=_PAUSED_SECONDS):
            raise ManifestError(
                f"{self._device} is busy: weights can't be computed on it now",
                hint="it is over soon: a client tries again while its WAIT lasts",
            )
        before = self._module.current_device()
        try:
            if self._device.index is not None:
                self._module.set_device(self._device)
            with self._module.stream(self._stream):
                found = self._tile(tensor, inverse, box) if inverse.tiled else _strided(tensor, inverse, box)
                _typed(self._rows, 0, out.dtype, box.size).copy_(found)
                self._stage[: out.nbytes].copy_(self._rows[: out.nbytes], non_blocking=True)
                self._stream.synchronize()
            out.view(torch.uint8).copy_(self._stage[: out.nbytes])
        finally:
            self._module.set_device(before)
            self._lock.release()

    def _tile(self, tensor: torch.Tensor, inverse: Inverse, box: _Box) -> torch.Tensor:
        """The part, over a copy of the tiles that it is in."""
        if self._tiles is None:
            raise ManifestError("tiles are read with a scratch memory that was made for plain tensors")
        storage, (first, past) = tensor.untyped_storage(), _place(tensor, inverse, box)
        begin = first // _ALIGNMENT * _ALIGNMENT
        end = min(-(-past // _ALIGNMENT) * _ALIGNMENT, storage.nbytes())
        copy_tiles(storage.data_ptr() + begin, end - begin, self._tiles, self._stream)
        return _typed(self._tiles, (first - begin) // inverse.read.itemsize, inverse.read, box.size, inverse.stride)


def read(tensor: torch.Tensor, inverse: Inverse, offset: int, out: torch.Tensor, scratch: Scratch) -> None:
    """Compute raw bytes.

    Args:
        tensor: Holds them in another form.
        inverse: How they are read from its memory.
        offset: The first raw byte; may be within an element.
        out: One-dimensional, contiguous ``uint8`` in host memory, as long as the bytes to compute.
        scratch: For the device of `tensor`.

    Raises:
        ManifestError: The device can't copy them.
    """
    item = inverse.into.itemsize
    first, past = offset // item, -(-(offset + out.numel()) // item)
    skipped = offset - first * item
    aligned = not skipped and out.numel() == (past - first) * item and not out.storage_offset() % item
    whole = out if aligned else torch.empty((past - first) * item, dtype=torch.uint8, device="cpu")
    elements, done = whole.view(inverse.into), 0
    with torch.no_grad():
        for box in _boxes(inverse.shape, first, past):
            count = math.prod(box.size)
            scratch.read(tensor, inverse, box, elements[done : done + count])
            done += count
        if not aligned:
            out.copy_(whole[skipped : skipped + out.numel()])


def _strided(tensor: torch.Tensor, inverse: Inverse, box: _Box) -> torch.Tensor:
    first, _ = _place(tensor, inverse, box)
    return _typed(tensor, first // inverse.read.itemsize, inverse.read, box.size, inverse.stride)


def _place(tensor: torch.Tensor, inverse: Inverse, box: _Box) -> tuple[int, int]:
    """The bytes of the storage that the part is in. torch would enlarge a storage that is too small, so check it."""
    storage = tensor.untyped_storage()
    first, past = (tensor.data_ptr() - storage.data_ptr() + at for at in box.extent(inverse))
    if past > storage.nbytes():
        raise ManifestError("a tensor that others are computed from has less memory than it had")
    return first, past


def _typed(
    memory: torch.Tensor, offset: int, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int] | None = None
) -> torch.Tensor:
    """A tensor over the storage of `memory`, whatever the dtype of that is."""
    if stride is None:
        stride = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    empty = torch.empty(0, dtype=dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, tuple(size), tuple(stride))


class ComputedBlock:
    """One block whose bytes are computed; see :class:`~netloader.codecs.block_view.BlockView`. For sending only.

    The bytes are computed once, in the thread that first asks for them, and freed with this object. Until then it keeps
    the memory alive from which they are computed.

    Args:
        block: The block.
        parts: For each of its tensors the tensor that holds the bytes, and how they are read; None: as they are.
        scratch: For the device of the tensors.
    """

    def __init__(self, block: Block, parts: Sequence[tuple[torch.Tensor, Inverse | None]], scratch: Scratch) -> None:
        self.number = block.number
        self.nbytes = block.nbytes
        self._block = block
        self._parts = list(parts)
        self._scratch = scratch
        self._lock = threading.Lock()
        self._bytes: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"<block {self.number}: {self.nbytes} bytes, computed>"

    def tensors(self) -> Sequence[torch.Tensor]:
        """The bytes, as one span in host memory.

        Raises:
            ManifestError: The device can't copy them.
        """
        return [self._computed()]

    def buffers(self) -> Sequence[memoryview]:
        """The same as a byte view."""
        return [self._computed().numpy().data]

    def regions(self) -> Regions[int]:
        """The same by address. Valid while this object exists."""
        return regions_over([self._computed().data_ptr()], [self.nbytes])

    def settle(self) -> None:
        """Does nothing, because nothing is received into it."""

    def _computed(self) -> torch.Tensor:
        with self._lock:
            if self._bytes is None:
                made = self._scratch.host_bytes(self.nbytes)
                start = 0
                for (tensor, inverse), nbytes in zip(self._parts, self._block.sizes, strict=True):
                    source, way = (tensor, inverse) if inverse is not None else _as_it_is(tensor)
                    read(source, way, self._block.offset, made[start : start + nbytes], self._scratch)
                    start += nbytes
                self._bytes = made
                self._parts.clear()
            return self._bytes


def _as_it_is(tensor: torch.Tensor) -> tuple[torch.Tensor, Inverse]:
    plain = to_plain(tensor) if is_private(tensor) else tensor
    return plain, Inverse(torch.uint8, torch.uint8, (plain.nbytes,), (1,))


class ComputedMemory:
    """The memory of one set of tensors, some of which are computed.

    Args:
        memory: The tensors that are in memory. For a tensor that is computed, the one that it is computed from.
        inverses: By place in the manifest, how the computed ones are read.
        scratch: For the device of the tensors.

    Attributes:
        call_bytes: The size from which on no further block is added to a call of a channel; None: the channel's own.
    """

    def __init__(self, memory: TensorMemory, inverses: Mapping[int, Inverse], scratch: Scratch) -> None:
        self._memory = memory
        self._inverses = inverses
        self._scratch = scratch
        self.call_bytes = CALL_BYTES if inverses else None

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order.

        Raises:
            ManifestError: Some of the memory is gone or was replaced.
        """
        views: list[BlockView] = list(self._memory.views(plan, numbers))
        if self._inverses:
            for place, number in enumerate(numbers):
                block = plan.blocks[number]
                if not self._inverses.keys().isdisjoint(block.tensors):
                    views[place] = self._computed(block)
        return views

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:
        """The blocks among `numbers` whose memory is gone, each with the tensor and the reason."""
        return self._memory.missing(plan, numbers)

    def _computed(self, block: Block) -> ComputedBlock:
        parts = [(self._memory.detached(index), self._inverses.get(index)) for index in block.tensors]
        return ComputedBlock(block, parts, self._scratch)
