"""Memory formats: plain (ND), and the tiles of FRACTAL_NZ."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from . import _memory as memory
from ._streams import streams

_ROWS, _TILE_BYTES = 16, 32


class Format(IntEnum):
    """Numbers of formats, as torch_npu has them."""

    ND = 2
    FRACTAL_NZ = 29


def format_of(tensor: torch.Tensor) -> int:
    """The format of the storage behind a tensor."""
    return memory.formats.get(tensor.untyped_storage().data_ptr(), Format.ND)


def _tile(x: torch.Tensor) -> torch.Tensor:
    """Plain CPU tensor [.., m, n] -> bytes [.., n/C, m/16, 16, C], padded with zeros."""
    columns = _TILE_BYTES // x.element_size()
    m, n = x.shape[-2:]
    more_m, more_n = -m % _ROWS, -n % columns
    x = x.view(torch.uint8).reshape(*x.shape, -1).movedim(-1, 0)
    x = torch.nn.functional.pad(x, (0, more_n, 0, more_m)).movedim(0, -1)
    x = x.reshape(*x.shape[:-3], (m + more_m) // _ROWS, _ROWS, (n + more_n) // columns, columns, x.shape[-1])
    return x.movedim(-3, -5).contiguous().flatten()


def _untile(raw: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    columns = _TILE_BYTES // dtype.itemsize
    *lead, m, n = size
    rows_of_tiles, columns_of_tiles = -(-m // _ROWS), -(-n // columns)
    count = memory.numel(lead) * rows_of_tiles * columns_of_tiles * _ROWS * _TILE_BYTES
    x = raw[:count].reshape(*lead, columns_of_tiles, rows_of_tiles, _ROWS, columns, dtype.itemsize).movedim(-5, -3)
    x = x.reshape(*lead, rows_of_tiles * _ROWS, columns_of_tiles * columns, dtype.itemsize)
    return x[..., :m, :n, :].contiguous().flatten(-2).view(dtype).reshape(tuple(size))


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the same memory; for tiles, a plain copy."""
    if format_of(tensor) == Format.FRACTAL_NZ:
        return _untile(memory.storage_bytes(tensor), tuple(tensor.shape), tensor.dtype)
    return memory.alias(tensor)


def write_back(tensor: torch.Tensor, cpu: torch.Tensor) -> None:
    """After a change of the tensor from :func:`to_cpu`: copy it into the tiles, if there are any."""
    if format_of(tensor) == Format.FRACTAL_NZ:
        tiled = _tile(cpu.contiguous())
        memory.storage_bytes(tensor)[: tiled.numel()].copy_(tiled)


def from_cpu(x: torch.Tensor, index: int) -> torch.Tensor:
    """A device tensor of plain format with the values of a CPU tensor."""
    stride = x.stride() if memory.is_dense(x) else memory.row_major(x.shape)
    out = memory.allocate(x.shape, stride, x.dtype, index)
    memory.alias(out).copy_(x)
    return out


def cast(tensor: torch.Tensor, wanted: int) -> torch.Tensor:
    """See ``torch_npu.npu_format_cast``."""
    streams.current().drain()
    if wanted not in set(Format):
        raise RuntimeError(f"format {wanted} is not simulated")
    if wanted == format_of(tensor):
        return tensor
    if tensor.dtype == torch.int32:
        raise RuntimeError(
            "npu_format_cast: int32 has no FRACTAL_NZ form"
        )  # packed weights are int8 tiles with another dtype
    flat = to_cpu(tensor).contiguous()
    if wanted == Format.ND:
        return from_cpu(flat, tensor.device.index)
    if tensor.dim() < 2:
        return tensor
    tiled = _tile(flat)
    stride = memory.row_major(tensor.shape)
    out = memory.allocate(tensor.shape, stride, tensor.dtype, tensor.device.index, nbytes=tiled.numel())
    memory.storage_bytes(out)[: tiled.numel()].copy_(tiled)
    memory.formats[out.untyped_storage().data_ptr()] = Format.FRACTAL_NZ
    return out
