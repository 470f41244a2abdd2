"""Memory formats of Ascend devices: which format a tensor has, and the plain bytes that are sent for it.

A private format (FRACTAL_NZ) is stored in tiles, whose layout only torch_npu knows. So the plain form is sent, for
which both sides make a copy. The destination tensor keeps its storage, and so its address, its aliases and the graphs
that captured it.

This module does not import torch_npu or acl at module level, because they are only needed for tensors on an ``npu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from netloader.errors import ManifestError, TransportError

__all__ = ["PLAIN", "copy_tiles", "format_of", "from_plain", "gather", "is_private", "scatter", "to_plain"]

PLAIN = "nd"
_ND = 2
_DEVICE_TO_DEVICE = 3  # ACL_MEMCPY_DEVICE_TO_DEVICE
_BASE = frozenset({-1, 0, 1, 2, 16, 27, 30, 35, 47})
"""Formats whose memory is row-major; they differ only in the names of the dimensions."""

_NAMES = {29: "fractal-nz", 50: "nz-c0-16", 51: "nz-c0-32", 52: "nz-c0-2", 53: "nz-c0-4", 54: "nz-c0-8"}


def format_of(tensor: torch.Tensor) -> str:
    """The memory format of a tensor, as written in a manifest: ``nd`` for plain memory, on every device."""
    if tensor.device.type != "npu":
        return PLAIN
    import torch_npu

    number = int(torch_npu.get_npu_format(tensor))  # an enum in some releases
    return PLAIN if number in _BASE else _NAMES.get(number, f"npu-{number}")


def is_private(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a private format, so that its memory does not follow its shape and strides."""
    return format_of(tensor) != PLAIN


def _castable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that torch_npu can cast: four-bit weights are int8 tiles, but have dtype int32."""
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
    """Write the values of a plain tensor into a tensor in a private format, which keeps its storage.

    Raises:
        TransportError: torch_npu cannot convert it.
    """
    try:
        with torch.no_grad():
            _castable(tensor.detach()).copy_(_castable(plain))
    except RuntimeError as error:
        raise TransportError(f"{tensor.dtype} cannot be converted to format {format_of(tensor)}: {error}") from error


def copy_tiles(source: int, nbytes: int, into: torch.Tensor, stream: Any) -> None:
    """Copy memory of a device as it is, whatever its format. Operators would take tiles for rows, or convert them.

    Args:
        source: Address of the first byte, a multiple of 64.
        nbytes: Bytes.
        into: Plain memory on the same device.
        stream: A stream of that device, which is waited for: torch_npu queues operators in a thread of its own, so that
            they could overtake the copy.

    Raises:
        ManifestError: The runtime can't copy it.
    """
    import acl

    code = acl.rt.memcpy_async(into.data_ptr(), into.nbytes, source, nbytes, _DEVICE_TO_DEVICE, stream.npu_stream)
    if code:
        raise ManifestError(f"{nbytes} bytes can't be copied on {into.device}: acl.rt.memcpy_async returned {code}")
    stream.synchronize()


def gather(spans: Sequence[torch.Tensor], staging: torch.Tensor) -> torch.Tensor:
    """Copy spans, without gaps, to the start of `staging`.

    Args:
        spans: One-dimensional ``uint8`` tensors, on the device of `staging` or in the host's memory.
        staging: At least as long as all spans together.

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
    """The reverse of :func:`gather`. It is queued on the current stream, and may not be complete when this returns."""
    start = 0
    with torch.no_grad():
        for span in spans:
            span.copy_(staging[start : start + span.numel()])
            start += span.numel()
