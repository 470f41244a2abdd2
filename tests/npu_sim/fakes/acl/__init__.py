"""A simulated ``acl``, CANN's own Python module: only what is called before anything computes."""

from __future__ import annotations

from . import rt

__all__ = ["get_soc_name", "rt"]


def get_soc_name() -> str:
    """The name of the chip, as ``torch.npu.get_device_name`` has it."""
    return "Ascend910B3"
