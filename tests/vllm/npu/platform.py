"""A platform plugin as vendors write them, for vLLM on the simulated ``npu``: enough of one to load models.

vLLM finds it by an entry point, which :mod:`tests.vllm.test_npu` provides. Models are built, filled and post-processed
on the device; nothing computes there: no attention, no engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from vllm.platforms.interface import Platform, PlatformEnum

FRACTAL_NZ = 29


class Worker:
    """The one method of a worker that netloader wraps here: it measures the memory after the models are loaded."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def determine_available_memory(self) -> int:
        """The memory that is left on the device."""
        npu: Any = torch.get_device_module("npu")
        free: int = npu.mem_get_info(self.device)[0]
        return free


class NpuPlatform(Platform):
    """The simulated device."""

    _enum = PlatformEnum.OOT
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    dist_backend = "gloo"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """As the simulator has it."""
        return "Ascend910B3"

    @classmethod
    def import_kernels(cls) -> None:
        """Those of vLLM's build for CPUs.

        The way that platforms inherit imports the library for AVX-512 whatever the processor has, and the process ends
        there with "illegal instruction"; the platform for CPUs chooses.
        """
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.import_kernels()

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Name the worker, as each platform has to."""
        vllm_config.parallel_config.worker_cls = f"{__name__}.Worker"

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """No."""
        return False

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
        """Some backend, because the name must exist. Nothing computes here."""
        return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """The plain one."""
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


def register_int8_kernel() -> None:
    """Register post-processing of int8 weights as vendors have it: transposed, in tiles."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearKernel

    class Tiles(Int8ScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            weight, scale, *_ = self.layer_param_names
            turned = getattr(layer, weight).data.t().contiguous()
            tiles = torch_npu.npu_format_cast(turned, FRACTAL_NZ)
            setattr(layer, weight, torch.nn.Parameter(tiles, requires_grad=False))
            scales = getattr(layer, scale).data.flatten()
            setattr(layer, scale, torch.nn.Parameter(scales, requires_grad=False))

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            raise NotImplementedError("nothing computes on this platform")

    register_linear_kernel(Tiles, PlatformEnum.OOT, "int8")
