"""The digest of one tensor, with which a rank compares its own tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["digest_of"]


def digest_of(tensor: torch.Tensor) -> str:
    """Digest of a tensor's dtype, shape and elements (in row-major order), in hex."""
    import torch
    import xxhash

    from netloader.codecs.npu_formats import is_private, to_plain

    found = tensor.detach()
    # A tensor in tiles is hashed in row-major order, the order in which it is transferred.
    plain = (to_plain(found) if is_private(found) else found).cpu().contiguous()
    digest = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
