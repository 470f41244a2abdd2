"""Weights on a device, of every dtype that can be transferred; equal seeds give equal bytes."""

from __future__ import annotations

import torch

DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e8m0fnu"),
)
"""HCCL has no complex64, float8_e4m3fnuz and float8_e8m0fnu."""

LARGE = 4


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    count = dtype.itemsize
    for size in shape:
        count *= size
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (count // 8 + 1,), dtype=torch.int64, generator=generator)
    data = words.view(torch.uint8)[:count]  # eight bytes a draw: this is most of the run time of such a process
    return (data & 1 if dtype == torch.bool else data).view(dtype).view(shape)


def on_cpu(seed: int, large_mib: int) -> dict[str, torch.Tensor]:
    """All weights, by name; four large ones make up most of the bytes."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: _random((33, 70), getattr(torch, name), generator) for name in DTYPES if hasattr(torch, name)}
    found["scalar"] = _random((), torch.float32, generator)
    found["nothing"] = torch.empty(0, 7)
    found["transposed"] = _random((48, 20), torch.float16, generator).t()
    rows = large_mib * 1024 // LARGE
    for number in range(LARGE):
        found[f"large.{number}"] = _random((rows, 256), torch.float32, generator)
    return found


def on_device(weights: dict[str, torch.Tensor], device: str, *, empty: bool) -> dict[str, torch.Tensor]:
    """The weights of `on_cpu` on `device`; without their values if `empty`. Uses allocation and plain copies only."""
    moved = {}
    for name, weight in weights.items():
        plain = weight if weight.is_contiguous() else weight.t()
        there = torch.empty(plain.shape, dtype=plain.dtype, device=device)
        there.copy_(torch.zeros(plain.shape, dtype=torch.uint8).to(plain.dtype) if empty else plain)
        moved[name] = there if weight.is_contiguous() else there.t()
    return moved


def in_formats(seed: int, device: str, *, empty: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights in FRACTAL_NZ, including int8 tiles with dtype int32: on `device`, and their plain values."""
    import torch_npu

    generator = torch.Generator().manual_seed(seed)
    plain = {
        "nz.bfloat16": _random((1040, 2064), torch.int16, generator).to(torch.bfloat16),
        "nz.int8": _random((3, 272, 96), torch.int8, generator),
        "nz.packed": _random((256, 512), torch.int8, generator),
    }
    moved = {}
    for name, value in plain.items():
        rows = torch.empty(value.shape, dtype=value.dtype, device=device)
        rows.copy_(torch.zeros_like(value) if empty else value)
        tiles = torch_npu.npu_format_cast(rows, 29)
        moved[name] = tiles.view(torch.int32) if name.endswith("packed") else tiles
    return moved, plain


def overwrite(tensors: dict[str, torch.Tensor]) -> None:
    """Write other bytes into every plain tensor on a device, as when its memory was reused."""
    for tensor in tensors.values():
        rows = tensor if tensor.is_contiguous() else tensor.t()
        rows.copy_(torch.ones(rows.shape, dtype=torch.uint8).to(rows.dtype))


def put_back(tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Write the values of `on_cpu` into the tensors that `on_device` made."""
    for name, value in values.items():
        rows, plain = tensors[name], value
        if not value.is_contiguous():
            rows, plain = rows.t(), value.t()
        rows.copy_(plain)


def wrong(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors on a device whose bytes are not the expected ones."""

    def same(here: torch.Tensor, there: torch.Tensor) -> bool:
        if here.dtype == torch.int32 and there.dtype == torch.int8:
            here = here.view(torch.int8)
        rows = here if here.is_contiguous() else here.t()
        wanted = there if there.is_contiguous() else there.t()
        return torch.equal(rows.cpu().reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))

    return [name for name in expected if not same(ours[name], expected[name])]
