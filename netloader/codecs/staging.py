"""Staging memory on the host, for copies between a device and code that can access host memory only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from netloader.errors import TransportUnavailable

__all__ = ["joined", "staging"]

_FEW = 4
"""Most tensors that are copied one by one. More are joined on the device first, because each copy costs a wait."""


def staging(nbytes: int, device: torch.device) -> torch.Tensor:
    """Host memory for copies from and to `device`. It is pinned if possible, because that makes copies far faster.

    Args:
        nbytes: Size in bytes.
        device: The device.

    Returns:
        One-dimensional ``uint8``; its content is undefined.

    Raises:
        TransportUnavailable: The memory can't be allocated.
    """
    if device.type == "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        # Pinned memory is scarce, and not every device supports it. Copies from plain memory work too, but are slower.
        if "memory" not in str(error).lower():
            raise TransportUnavailable(f"no staging memory for {device}: {error}") from error
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def joined(pieces: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The same bytes in fewer tensors, if there are many and all are on one device.

    Args:
        pieces: One-dimensional ``uint8``, a few MiB in total, because joining needs the same amount of memory again.
    """
    alike = len({piece.device for piece in pieces}) == 1
    return [torch.cat(list(pieces))] if len(pieces) > _FEW and alike else pieces
