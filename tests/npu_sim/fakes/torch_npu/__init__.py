"""A simulated torch_npu: an ``npu`` device in the CPU's memory and a ProcessGroupHCCL over sockets, in pure Python.

Put the parent folder on PYTHONPATH, never together with the real package. It follows torch_npu's sources and released
wheels; tests on it show that the API is used correctly, and nothing about hardware.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from . import _device, npu
from ._formats import Format, cast, format_of

__version__ = "0.0.sim"
_device.install(npu)

from ._hccl import ProcessGroupHCCL  # noqa: E402 - needs the device

_C: Any = types.ModuleType("torch_npu._C")
_C._distributed_c10d = types.ModuleType("torch_npu._C._distributed_c10d")
_C._distributed_c10d.ProcessGroupHCCL = ProcessGroupHCCL
sys.modules["torch_npu._C"] = _C
sys.modules["torch_npu._C._distributed_c10d"] = _C._distributed_c10d

torch.distributed.is_hccl_available = lambda: True  # type: ignore[attr-defined]


def npu_format_cast(tensor: torch.Tensor, acl_format: int, customize_dtype: object = None) -> torch.Tensor:
    """A tensor of the same values in another memory format; the same tensor if the format is the same."""
    return cast(tensor, acl_format)


def get_npu_format(tensor: torch.Tensor) -> Format:
    """The memory format of a tensor."""
    return Format(format_of(tensor))


def __getattr__(name: str) -> Any:
    """Other npu_* operators can be imported, and raise when they are called."""
    if name.startswith("npu_"):

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"torch_npu.{name} is not simulated")

        return missing
    raise AttributeError(name)
