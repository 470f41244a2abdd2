"""The tensor sets that benchmarks move."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["WORKLOADS", "make"]

GIB = 1 << 30


def _one(scale: float) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"weight": ((int(GIB * scale) // 2,), torch.bfloat16)}


def _llama(scale: float) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """1.24 GB in bfloat16 at scale 1: 16 layers, 226 tensors, half of them norms and biases of a few KB."""
    hidden, inner, kv, vocab = 1536, 6144, 384, 48_000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(max(1, round(16 * scale))):
        name = f"model.layers.{layer}"
        linear = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for part, shape in linear.items():
            shapes[f"{name}.{part}.weight"] = shape
            if part not in ("mlp.gate_proj", "mlp.up_proj"):
                shapes[f"{name}.{part}.bias"] = shape[:1]
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def _small(scale: float) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {f"layer.{i}.weight": ((2048,), torch.bfloat16) for i in range(int(20_000 * scale))}


def _tiny(scale: float) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {f"layer.{i}.weight": ((2048,), torch.bfloat16) for i in range(max(2, round(2 * scale)))}


WORKLOADS = {"one": _one, "llama": _llama, "small": _small, "tiny": _tiny}
"""Name -> function from a scale to the shapes: 1 GiB in one tensor; a Llama; 20,000 tensors of 4 KiB; two of them."""


def make(name: str, scale: float = 1.0, *, fill: bool, device: str = "cpu") -> Mapping[str, torch.Tensor]:
    """Tensors of a workload, every page touched.

    Args:
        name: Key of :data:`WORKLOADS`.
        scale: Fraction of the full size.
        fill: Fill with bytes that depend on name and position, instead of zeros.
        device: Their device.
    """
    tensors = {}
    generator = torch.Generator().manual_seed(20_000)
    for key, (shape, dtype) in WORKLOADS[name](scale).items():
        tensor = torch.zeros(shape, dtype=dtype)
        if fill:
            tensor.view(torch.uint8).random_(generator=generator)
        tensors[key] = tensor.to(device)
    return tensors
