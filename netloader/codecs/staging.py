"""Host memory on the way between a device and something that reads the host's memory only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from netloader.errors import TransportUnavailable

__all__ = ["joined", "staging"]

_FEW = 4
"""Pieces up to which each is copied by itself; more are joined on the device first: each copy costs a wait."""


def staging(nbytes: int, device: torch.device) -> torch.Tensor:
    """Host memory for copies from and to `device`, pinned where it can use that: plain memory is copied far slower.

    Args:
        nbytes: How much.
        device: Where the other side of the copies is.

    Returns:
        One-dimensional ``uint8``; its content is undefined.

    Raises:
        TransportUnavailable: There is none.
    """
    if device.type == "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        # Pinned memory is a limited good, and not every device has any; copies from plain memory are slower, no more.
        if "memory" not in str(error).lower():
            raise TransportUnavailable(f"no staging memory for {device}: {error}") from error
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def joined(pieces: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The same bytes in fewer pieces, if there are many and all lie on one device.

    Args:
        pieces: One-dimensional ``uint8``; joining takes as much memory again, so they should be few MiB in all.
    """
    alike = len({piece.device for piece in pieces}) == 1
    return [torch.cat(list(pieces))] if len(pieces) > _FEW and alike else pieces
