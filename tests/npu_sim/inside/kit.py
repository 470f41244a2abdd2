"""A server and a pull within one process, each on its own simulated device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch_npu

import netloader
from netloader.core.report import PullReport

FRACTAL_NZ = 29


def tiled(values: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on `device`, in FRACTAL_NZ."""
    made: torch.Tensor = torch_npu.npu_format_cast(values.to(device), FRACTAL_NZ)
    return made


def packed(values: torch.Tensor, device: str) -> torch.Tensor:
    """Four-bit weights as engines hold them: int8 tiles with dtype int32."""
    return tiled(values, device).view(torch.int32)


async def pulled(served: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor], **options: Any) -> PullReport:
    """Pull `into` from a server of `served`."""
    async with netloader.Server(served, host="127.0.0.1", transport="hccl", fan_out=0) as server:
        return await netloader.pull(into, sources=[f"127.0.0.1:{server.port}"], transport="hccl", **options)
