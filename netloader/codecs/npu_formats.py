"""Memory formats of Ascend devices: which one a tensor has, and the plain bytes that travel for it.

A private format (FRACTAL_NZ) lies in tiles: its bytes mean nothing to a reader that expects rows, and only torch_npu
knows them. So what travels is always the plain form, of which a copy is made on both sides; the destination keeps its
storage, and with it its address, its aliases and the graphs that captured it.

Nothing here imports torch_npu: where there is no tensor on an ``npu``, it is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from netloader.errors import ManifestError, TransportError

__all__ = ["PLAIN", "format_of", "from_plain", "gather", "is_private", "scatter", "to_plain"]

PLAIN = "nd"
_ND = 2
_BASE = frozenset({-1, 0, 1, 2, 16, 27, 30, 35, 47})
"""Formats whose memory is plain rows, under whatever name of dimensions."""

_NAMES = {29: "fractal-nz", 50: "nz-c0-16", 51: "nz-c0-32", 52: "nz-c0-2", 53: "nz-c0-4", 54: "nz-c0-8"}


def format_of(tensor: torch.Tensor) -> str:
    """The memory format of a tensor, as a manifest says it: ``nd`` for plain memory, on every device."""
    if tensor.device.type != "npu":
        return PLAIN
    import torch_npu

    number = int(torch_npu.get_npu_format(tensor))  # an enum in some releases
    return PLAIN if number in _BASE else _NAMES.get(number, f"npu-{number}")


def is_private(tensor: torch.Tensor) -> bool:
    """Whether its memory is not what its shape says."""
    return format_of(tensor) != PLAIN


def _castable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as torch_npu can cast it: four-bit weights are int8 tiles that call themselves int32."""
    return tensor.view(torch.int8) if tensor.dtype == torch.int32 else tensor


def to_plain(tensor: torch.Tensor) -> torch.Tensor:
    """A plain contiguous copy of a tensor in a private format, of the same dtype and shape.

    Raises:
        ManifestError: torch_npu cannot make one.
    """
    import torch_npu

    try:
        plain: Any = torch_npu.npu_format_cast(_castable(tensor.detach()), _ND)
        made: torch.Tensor = plain.contiguous().view(tensor.dtype).view(tensor.shape)
        return made
    except RuntimeError as error:
        raise ManifestError(
            f"a tensor of {tensor.dtype} in format {format_of(tensor)} has no plain form: {error}"
        ) from error


def from_plain(plain: torch.Tensor, tensor: torch.Tensor) -> None:
    """Write the values of a plain tensor into one in a private format; its storage stays.

    Raises:
        TransportError: torch_npu cannot do it.
    """
    try:
        with torch.no_grad():
            _castable(tensor.detach()).copy_(_castable(plain))
    except RuntimeError as error:
        raise TransportError(f"{tensor.dtype} cannot be brought into format {format_of(tensor)}: {error}") from error


def gather(spans: Sequence[torch.Tensor], staging: torch.Tensor) -> torch.Tensor:
    """Copy spans, without gaps, to the start of `staging`.

    Args:
        spans: One-dimensional ``uint8``, on the device of `staging` or in the host's memory.
        staging: At least as long as all of them.

    Returns:
        The part of `staging` that holds them.
    """
    start = 0
    with torch.no_grad():
        for span in spans:
            staging[start : start + span.numel()].copy_(span)
            start += span.numel()
        return staging[:start]


def scatter(staging: torch.Tensor, spans: Sequence[torch.Tensor]) -> None:
    """The reverse of :func:`gather`. Queued on the current stream: not done when this returns."""
    start = 0
    with torch.no_grad():
        for span in spans:
            span.copy_(staging[start : start + span.numel()])
            start += span.numel()
