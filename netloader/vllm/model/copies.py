"""Real copies of raw tensors: on their device until that is full, then in the host's memory.

A second reference costs nothing and survives that vLLM puts another tensor in the place of the first; only a copy
survives a rewrite in place.
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
    DRAM = "INT8_CACHE=dram"
    HBM = "INT8_CACHE=hbm"


@dataclass
class Copies:
    """Copies of some tensors.

    Attributes:
        made: By name; names of one tensor share one copy.
        moved: Why they are in the host's memory though the device's was asked for; empty when they are not.
        failed: Names of tensors for which the host had no memory either.
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

    When the device has no room for all copies, none stays there: vLLM goes on to need room for its post-processing.

    Args:
        tensors: By name; what two names share is copied once.
        on_device: Whether copies go where the tensor is, or to the host's memory.
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
    """Whether an allocation failed for want of memory, on whatever device: torch has no one type for it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def _copy_all(tensors: Mapping[str, torch.Tensor], into: Copies, *, host: bool) -> None:
    done: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in done:
            done[id(tensor)] = _copy(tensor, host=host)
        into.made[name] = done[id(tensor)]


def _copy(tensor: torch.Tensor, *, host: bool) -> torch.Tensor:
    """A copy with the same order in memory, in plain format."""
    from netloader.codecs.npu_formats import is_private, to_plain

    source = tensor.detach()
    if is_private(source):
        plain = to_plain(source)
        return plain.to("cpu", copy=True) if host else plain
    return source.to("cpu", copy=True) if host else source.clone()
