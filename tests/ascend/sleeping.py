"""What vllm-ascend's worker needs to sleep, and to take new weights from a trainer.

Its own allocator runs over the memory of the simulator, in place of its C extension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch_npu import _pools


def give_allocator() -> None:
    """Let `CaMemAllocator` find what its C extension would provide. It has no pinned memory."""
    from vllm_ascend.device_allocator import camem

    camem.init_module = _pools.init_module
    camem.python_create_and_map = _pools.python_create_and_map
    camem.python_unmap_and_release = _pools.python_unmap_and_release
    camem.camem_available = True
    camem.torch = _Unpinned()


class _Unpinned:
    """torch, which has no pinned memory for a device that is implemented in Python."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *size: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        return torch.empty(*size, **options)  # type: ignore[call-overload, no-any-return]


@dataclass
class Trainer:
    """In place of the engine that receives weights over HCCL: the tensor `name` becomes zeros."""

    name: str

    def parse_update_info(self, info: dict[str, Any]) -> dict[str, Any]:
        return info

    def receive_weights(
        self, info: dict[str, Any], load_weights: Callable[[Sequence[tuple[str, torch.Tensor]]], None]
    ) -> None:
        load_weights([(self.name, torch.zeros((), device="npu:0"))])
