"""Packs a block of many small spans into one staging tensor, for transports with a high cost per operation.

A copy on each side saves up to :data:`~netloader.core.plan.MAX_SPANS` - 1 operations. A block with a single span gains
nothing, and is sent as in :mod:`~netloader.codecs.raw`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from netloader.errors import ManifestError, TransportUnavailable

if TYPE_CHECKING:
    from netloader.codecs.block_view import BlockView

__all__ = ["pack", "staging_bytes", "staging_for", "unpack", "worth_packing"]


def worth_packing(view: BlockView) -> bool:
    """Whether `view` has more than one span, so that packing saves operations."""
    try:
        return len(view.buffers()) > 1  # much cheaper than tensors, and needed later anyway
    except TransportUnavailable:
        return len(view.tensors()) > 1


def staging_bytes(views: Iterable[BlockView]) -> int:
    """Size of a staging tensor that can hold any one of `views` that is worth packing; 0 when none is."""
    return max((view.nbytes for view in views if worth_packing(view)), default=0)


def staging_for(nbytes: int, device: torch.device | str) -> torch.Tensor:
    """Uninitialised staging memory.

    Args:
        nbytes: Size; see :func:`staging_bytes`.
        device: Device of the blocks.

    Returns:
        A one-dimensional ``uint8`` tensor of `nbytes`.
    """
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def pack(view: BlockView, staging: torch.Tensor) -> torch.Tensor:
    """Copy the spans of a block, in order and without gaps, to the start of `staging`.

    Args:
        view: The block to send.
        staging: One-dimensional contiguous ``uint8`` on the block's device, at least as long as the block. Its memory
            may be reused once the returned tensor has been sent.

    Returns:
        The part of `staging` that holds the block: ``uint8``, ``view.nbytes`` long.

    Raises:
        ManifestError: `staging` is too small or of another kind.
    """
    packed = _part(view, staging)
    if packed.is_cpu:
        # Byte views cost a tenth of tensors over the same memory.
        target, start = packed.numpy().data, 0
        for buffer in view.buffers():
            target[start : start + len(buffer)] = buffer
            start += len(buffer)
    elif view.nbytes:
        # In inference mode, because tensors created in that mode can't be written outside of it.
        with torch.inference_mode():
            torch.cat(list(view.tensors()), out=packed)
    return packed


def unpack(staging: torch.Tensor, view: BlockView) -> None:
    """Copy what :func:`pack` made on the other side into the spans of a block.

    Args:
        staging: Holds the block at its start; as for :func:`pack`.
        view: The block to fill.

    Raises:
        ManifestError: `staging` is too small or of another kind.
    """
    packed = _part(view, staging)
    if packed.is_cpu:
        source, start = packed.numpy().data, 0
        for buffer in view.buffers():
            buffer[:] = source[start : start + len(buffer)]
            start += len(buffer)
    elif view.nbytes:
        spans = list(view.tensors())
        with torch.inference_mode():
            torch.split_with_sizes_copy(packed, [span.numel() for span in spans], out=spans)


def _part(view: BlockView, staging: torch.Tensor) -> torch.Tensor:
    if staging.dtype != torch.uint8 or staging.dim() != 1 or not staging.is_contiguous():
        raise ManifestError(
            f"staging memory is {staging.dtype} of shape {tuple(staging.shape)}, required: one contiguous row of uint8"
        )
    if staging.numel() < view.nbytes:
        raise ManifestError(f"block {view.number} has {view.nbytes} bytes, the staging tensor only {staging.numel()}")
    return staging[: view.nbytes]
