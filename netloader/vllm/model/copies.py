"""Copies of raw tensors: on their device, or in host memory if the device is full.

A second reference to a tensor takes no memory, and keeps the original if vLLM replaces the tensor. If vLLM rewrites the
tensor in place, only a copy keeps the original values.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Copies", "Keep", "is_full", "make_copies"]


class Keep(enum.Enum):
    """What is kept of a tensor that vLLM may replace; the value is the setting that asks for it."""

    NO = ""
    SMALL = "a few bytes each"
    REFERENCE = "KEEP_RAW"
    COPY = "KEEP_RAW, as copies"
    DRAM = "INT8_CACHE=dram"
    HBM = "INT8_CACHE=hbm"


@dataclass
class Copies:
    """Copies of some tensors.

    Attributes:
        made: The copies, by name. Several names of one tensor share one copy.
        moved: Why copies for the device are in host memory; empty when they are on the device.
        failed: Names of tensors for which host memory was not sufficient either.
    """

    made: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: str = ""
    failed: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies, each counted once."""
        return sum({id(tensor): tensor.nbytes for tensor in self.made.values()}.values())


def make_copies(tensors: Mapping[str, torch.Tensor], *, on_device: bool) -> Copies:
    """Copy tensors.

    If the device has no room for all copies, all of them go to host memory, because post-processing needs room too.

    Args:
        tensors: The tensors, by name. A tensor with two names is copied once.
        on_device: Whether to copy to the device of the tensor, or to host memory.
    """
    moved = ""
    if on_device:
        copies = Copies()
        try:
            _copy_all(tensors, copies, host=False)
        except RuntimeError as error:
            if not is_full(error):
                raise
            moved = str(error).strip().splitlines()[0]
        if not moved:
            return copies
        copies.made.clear()
    copies = Copies(moved=moved)
    try:
        _copy_all(tensors, copies, host=True)
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        copies.failed = tuple(name for name in tensors if name not in copies.made)
    return copies


def is_full(error: BaseException) -> bool:
    """Whether an allocation failed because memory was not sufficient. torch has several error types for that."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def _copy_all(tensors: Mapping[str, torch.Tensor], into: Copies, *, host: bool) -> None:
    done: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in done:
            done[id(tensor)] = _copy(tensor, host=host)
        into.made[name] = done[id(tensor)]


def _copy(tensor: torch.Tensor, *, host: bool) -> torch.Tensor:
    """A copy with the same strides, in plain format."""
    from netloader.codecs.npu_formats import is_private, to_plain

    source = tensor.detach()
    if is_private(source):
        plain = to_plain(source)
        return plain.to("cpu", copy=True) if host else plain
    return source.to("cpu", copy=True) if host else source.clone()
