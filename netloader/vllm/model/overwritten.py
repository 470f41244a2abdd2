"""Weights that vLLM's post-processing may overwrite where they are, so that a reference to them loses the raw values.

Only a copy keeps those. Layers give vLLM's `replace_parameter` the new values of a parameter. Up to vLLM 0.32 it
registers a new parameter, and the old tensor stays as it was. Since 0.33 it copies the new values into the old tensor
if shape, strides, dtype and device are equal. Which of the two a release does is determined by a call, not by its
number, because builds of vendors differ.

Of the layers without quantisation, those with experts replace weights by others of equal layout. Dense layers replace
theirs by a tensor of another shape, or leave them. `tests/contract/test_post_processing.py` fails if a newer release
differs in that. If none of this is true at a user's site, the digests show it: the raw layout is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["overwritten_modules"]

LEAVE_WEIGHTS = frozenset({"TRITON", "BATCHED_TRITON"})
"""Backends of experts without quantisation that use the weights as they are loaded. Copies for them would double the
memory of a load, for nothing."""


def overwritten_modules(model: torch.nn.Module) -> frozenset[str]:
    """Names of the modules whose parameters vLLM may overwrite in place. Empty if this vLLM replaces tensors.

    Args:
        model: The model, loaded and not yet post-processed.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    if not _copies_in_place():
        return frozenset()
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        method = getattr(module, "quant_method", None)
        if isinstance(method, FusedMoEMethodBase):
            backend = getattr(method, "unquantized_backend", None)
            if getattr(backend, "name", "") not in LEAVE_WEIGHTS:
                found.add(name)
    return frozenset(found)


def _copies_in_place() -> bool:
    """Whether this vLLM's `replace_parameter` writes to the tensor that it replaces."""
    import torch
    from vllm.model_executor.utils import replace_parameter

    layer = torch.nn.Module()
    before = torch.zeros(1, device="cpu")
    layer.register_parameter("weight", torch.nn.Parameter(before, requires_grad=False))
    replace_parameter(layer, "weight", torch.ones(1, device="cpu"))
    return bool(before.item())
