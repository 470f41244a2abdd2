"""Ways back from a tensor that post-processing made to the raw tensor, where that only moved elements or widened them.

Tried are: the same bytes under another shape, the bytes as another dtype, the last two dimensions exchanged, a narrower
dtype, and tiles (FRACTAL_NZ). Which of them is right for a tensor is first told by samples. The digests of its blocks
then prove it; a way that only looks right is never served.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import xxhash

from netloader.codecs.npu_formats import format_of, is_private
from netloader.core.manifest import is_dense
from netloader.tensors import Inverse, Scratch, read

__all__ = ["Form", "as_it_is", "find_inverse", "sample_of"]

_SAMPLE_BYTES = 128
_PLACES = (0.0, 0.618, 0.236, 0.854, 0.472, 0.09, 0.708, 1.0)
"""Samples of a tensor: their size, and where they are, as parts of its bytes. At even distances, all could be on the
diagonal of a tensor, which a transposition leaves as it is."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NZ, _TILE_BYTES, _TILE_ROWS = "fractal-nz", 32, 16


@dataclass(frozen=True)
class Form:
    """Dtype, shape and strides of a raw tensor, which is dense."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def order(self) -> list[int]:
        """Its dimensions in the order of memory, the outermost first."""
        return sorted(range(len(self.shape)), key=lambda axis: (-self.stride[axis], self.shape[axis] != 1))


def as_it_is(nbytes: int) -> Inverse:
    """The bytes of a plain tensor in the order of its memory."""
    return Inverse(torch.uint8, torch.uint8, (nbytes,), (1,))


def sample_of(tensor: torch.Tensor, inverse: Inverse, nbytes: int, scratch: Scratch) -> bytes:
    """A digest of a few of the raw bytes that are read from `tensor`.

    Raises:
        ManifestError: The device can't copy them.
    """
    size = min(nbytes, _SAMPLE_BYTES)
    found = torch.empty(len(_PLACES) * size, dtype=torch.uint8, device="cpu")
    for number, place in enumerate(_PLACES):
        offset = int(place * (nbytes - size))
        read(tensor, inverse, offset, found[number * size : (number + 1) * size], scratch)
    return xxhash.xxh3_128(found.numpy().data).digest()


def find_inverse(raw: Form, sample: bytes, tensor: torch.Tensor, scratch: Scratch) -> Inverse | None:
    """The way from `tensor` to the raw bytes whose sample is `sample`; None when none of those tried has that sample.

    If the bytes of `tensor` are the raw bytes as they are, the way is `as_it_is`.

    Raises:
        ManifestError: The device can't copy them.
    """
    found = _tiled(raw, tensor) if is_private(tensor) else _plain(raw, tensor)
    return next((way for way in found if sample_of(tensor, way, raw.nbytes, scratch) == sample), None)


def _plain(raw: Form, tensor: torch.Tensor) -> Iterator[Inverse]:
    stride = tuple(tensor.stride())
    if tensor.nbytes == raw.nbytes and is_dense(tuple(tensor.shape), stride):
        yield as_it_is(raw.nbytes)
    for base, into, steps in _typed(raw, tensor):
        for turned in (False, True):
            if turned and base.dim() <= 1:
                continue
            view = base.transpose(-1, -2) if turned else base
            named = (*steps, "transpose") if turned else steps
            if tuple(view.shape) != raw.shape:
                try:
                    view = view.view(raw.shape)
                except RuntimeError:  # these elements are not in one row of memory
                    continue
                named = (*named, "reshape")
            view = view.permute(raw.order)
            if tensor.data_ptr() % base.dtype.itemsize == 0:
                yield Inverse(base.dtype, into, tuple(view.shape), view.stride(), steps=named)


def _typed(raw: Form, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.dtype, tuple[str, ...]]]:
    """Tensors without memory that say how the elements lie, the dtype to cast them to, and the steps."""
    whole = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    bits, own = _BITS.get(raw.dtype.itemsize), _BITS.get(tensor.dtype.itemsize)
    if tensor.nbytes == raw.nbytes and bits is not None and own is not None:
        with suppress(RuntimeError):  # its last dimension is not contiguous
            yield whole.view(own).view(bits), bits, () if own == bits else (f"view {_name(raw.dtype)}",)
    # A cast to a narrower dtype lost bits, except by chance.
    floats = tensor.dtype.is_floating_point and raw.dtype.is_floating_point
    wider = tensor.dtype.itemsize > raw.dtype.itemsize
    if floats and wider and tensor.numel() == math.prod(raw.shape):
        yield whole, raw.dtype, (f"cast to {_name(raw.dtype)}",)


def _tiled(raw: Form, tensor: torch.Tensor) -> Iterator[Inverse]:
    """The transposed tiles of the last two dimensions: the rows of the raw tensor are columns of a row of tiles.

    Without the transpose, each raw row is spread over all of the matrix. That is not computed by blocks.
    """
    item = raw.dtype.itemsize
    bits, columns = _BITS.get(item), _TILE_BYTES // item
    if format_of(tensor) != _NZ or bits is None or tensor.nbytes != raw.nbytes or tensor.dim() <= 1:
        return
    if not tensor.is_contiguous() or tensor.storage_offset():
        return
    *lead, inner, outer = tensor.shape
    outer = outer * tensor.dtype.itemsize // item
    if outer % columns or _squeezed([raw.shape[axis] for axis in raw.order]) != _squeezed([*lead, outer, inner]):
        return
    padded = -(-inner // _TILE_ROWS) * _TILE_ROWS
    count = math.prod(lead)
    if count * padded * outer * item > tensor.untyped_storage().nbytes():
        return
    shape = (count, outer // columns, columns, inner)
    stride = (padded * outer, padded * columns, 1, columns)
    viewed = () if tensor.dtype.itemsize == item else (f"view {_name(raw.dtype)}",)
    yield Inverse(bits, bits, shape, stride, tiled=True, steps=("untile", *viewed, "transpose"))


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
