"""Four-bit integers, eight to an int32. That the first one is the lowest is this simulator's choice."""

from __future__ import annotations

from typing import Any

import torch

from ._formats import from_cpu, to_cpu

_EACH = 8


def npu_convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    """Pack int32 values from -8 to 7: ``[.., n]`` becomes ``[.., n / 8]``, of the same dtype.

    Raises:
        RuntimeError: The dtype or the last dimension can't be packed.
    """
    if weight.dtype != torch.int32 or not weight.dim() or weight.shape[-1] % _EACH:
        raise RuntimeError(f"int4pack takes int32 and {_EACH} in a row, got {weight.dtype} {tuple(weight.shape)}")
    return from_cpu(_packed(to_cpu(weight)), weight.device.index)


def npu_quantize(
    tensor: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    dtype: torch.dtype,
    axis: int = -1,
    div_mode: bool = True,
) -> torch.Tensor:
    """Scale, round and pack to four bits; other dtypes are not simulated.

    Raises:
        NotImplementedError: Anything but ``quint4x2`` without zero points.
    """
    if dtype != torch.quint4x2 or zero_points is not None:
        raise NotImplementedError(f"torch_npu.npu_quantize to {dtype} is not simulated")
    factors = to_cpu(scales).float()
    scaled = to_cpu(tensor).float() * (1 / factors if div_mode else factors)
    return from_cpu(_packed(scaled.round().clamp(-8, 7)), tensor.device.index)


def _packed(values: Any) -> torch.Tensor:
    low = values.to(torch.int64) & 0xF
    shifts = torch.arange(_EACH) * 4
    words = (low.reshape(*low.shape[:-1], -1, _EACH) << shifts).sum(-1)
    packed: torch.Tensor = (words & 0xFFFFFFFF).contiguous().to(torch.uint32).view(torch.int32)
    return packed
