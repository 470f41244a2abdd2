"""A simulated torch_npu: an ``npu`` device in the CPU's memory and a ProcessGroupHCCL over sockets, in pure Python.

Models can be built, filled and post-processed on it, also by the platform of vllm-ascend. No operator of theirs
computes anything: there is no forward pass.

Put the parent folder on PYTHONPATH, never together with the real package. It follows torch_npu's sources and released
wheels; tests on it show that the API is used correctly, and nothing about hardware.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from . import _absent, _collectives, _device, _pools, npu
from ._formats import Format, cast, format_of
from ._int4 import npu_convert_weight_to_int4pack, npu_quantize

__all__ = ["npu_convert_weight_to_int4pack", "npu_quantize"]

__version__ = "0.0.sim"
_device.install(npu)

from ._hccl import ProcessGroupHCCL  # noqa: E402 - needs the device

_C: Any = types.ModuleType("torch_npu._C")
_C._distributed_c10d = types.ModuleType("torch_npu._C._distributed_c10d")
_C._distributed_c10d.ProcessGroupHCCL = ProcessGroupHCCL
_C._NPUTaskGroupHandle = type("_NPUTaskGroupHandle", (_absent.NotSimulated,), {})
_C._weak_ref_tensor = _absent.missing("torch_npu._C._weak_ref_tensor")
sys.modules["torch_npu._C"] = _C
sys.modules["torch_npu._C._distributed_c10d"] = _C._distributed_c10d

torch.distributed.is_hccl_available = lambda: True  # type: ignore[attr-defined]
_collectives.install()
_absent.install()
_absent.module(
    "torch_npu.npu.memory",
    NPUPluggableAllocator=_pools.NPUPluggableAllocator,
    MemPool=_pools.MemPool,
    use_mem_pool=_pools.use_mem_pool,
)

# Names of dtypes, which tables of quantisation methods hold. torch has them itself.
float8_e8m0fnu, float4_e2m1fn_x2 = torch.float8_e8m0fnu, torch.float4_e2m1fn_x2


def npu_format_cast(tensor: torch.Tensor, acl_format: int, customize_dtype: object = None) -> torch.Tensor:
    """A tensor of the same values in another memory format; the same tensor if the format is the same."""
    return cast(tensor, acl_format)


def get_npu_format(tensor: torch.Tensor) -> Format:
    """The memory format of a tensor."""
    return Format(format_of(tensor))


def __getattr__(name: str) -> Any:
    """Other npu_* operators can be imported, and raise when they are called."""
    if name.startswith(("npu_", "_npu_")):
        return _absent.missing(f"torch_npu.{name}")
    raise AttributeError(name)
