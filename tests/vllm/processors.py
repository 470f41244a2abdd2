"""Plain linear layers as vLLM keeps them on different processors, on whichever processor the tests run.

vLLM asks the processor which kernels it can use, and packs weights for them. So the outcome of a test may depend on the
machine. A test marked with `on_each_processor` runs once for each answer: what asks is replaced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm.releases import PACKS_EXPERTS

__all__ = ["WITHOUT", "choose", "on_each_processor", "on_processor"]

WITHOUT = "no AVX-512"
"""Nothing is packed: oneDNN has no kernel for bfloat16, and torch's linear layer is used."""

AVX512 = "AVX-512"
"""oneDNN packs each weight, and the parameter is emptied."""

AMX = "AMX"
"""The kernels for AMX pack small weights, in older releases all that suit them, if told to. oneDNN packs the rest."""


def on_processor(*kinds: str) -> pytest.MarkDecorator:
    """Run the test on these kinds of processors; its fixture `processor` is the kind."""
    return pytest.mark.parametrize("processor", kinds, indirect=True)


on_each_processor = on_processor(WITHOUT, AVX512, AMX)


def choose(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Make vLLM choose what it chooses on this kind of processor. Skips the test where AMX is needed and missing."""
    from vllm import _custom_ops as ops

    if kind == AMX:
        if not torch.cpu._is_amx_tile_supported():
            pytest.skip("NOT CHECKED: this processor lacks the instructions of AMX (amx_tile)")
        patch.setenv("VLLM_CPU_SGL_KERNEL", "1")
        return
    patch.setenv("VLLM_CPU_SGL_KERNEL", "0")
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    if kind == WITHOUT:
        patch.setattr(ops, "create_onednn_mm", _no_kernel)
        if not PACKS_EXPERTS:  # the library for such processors lacks the operator, and this asks for it
            from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

            patch.setattr(CPUFusedMOE, "check_grouped_gemm", lambda *_: (False, "none"))
    elif not _packs(ops):  # the kernel is missing here; what is done with the weights is the same
        patch.setattr(ops, "create_onednn_mm", _packed)
        patch.setattr(ops, "onednn_mm", _product)


def _no_kernel(*_: Any) -> Any:
    raise RuntimeError("could not create a primitive descriptor: this processor has no AVX-512")


def _packs(ops: Any) -> bool:
    try:
        ops.create_onednn_mm(torch.zeros(32, 32, dtype=torch.bfloat16).t(), 1)
    except (AttributeError, RuntimeError):
        return False
    return True


def _packed(weight: torch.Tensor, _cached: int) -> Any:
    return SimpleNamespace(weight=weight.t().clone())


def _product(handle: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x, handle.weight, bias)
