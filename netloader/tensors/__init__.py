"""The interface to torch: makes manifests, block views and digests from tensors."""

from __future__ import annotations

from netloader.errors import TORCH_HINT

try:
    import torch  # noqa: F401 - all of this package needs it; the error says where it comes from
except ModuleNotFoundError as error:
    error.add_note(f"netloader: {TORCH_HINT}")
    raise

from netloader.tensors.computed import ComputedBlock, ComputedMemory, Inverse, Scratch, read
from netloader.tensors.describe import DTYPES, describe
from netloader.tensors.destination import Allocate, Destination, destination
from netloader.tensors.digests import ALGORITHMS, DEFAULT, digest_blocks, digest_of, digest_plan
from netloader.tensors.holding import HASHERS, TensorHolding, hold
from netloader.tensors.memory import MemoryBlock, TensorMemory
from netloader.tensors.touch import LEAST_BYTES, Prefaulter

__all__ = [
    "ALGORITHMS",
    "DEFAULT",
    "DTYPES",
    "HASHERS",
    "LEAST_BYTES",
    "Allocate",
    "ComputedBlock",
    "ComputedMemory",
    "Destination",
    "Inverse",
    "MemoryBlock",
    "Prefaulter",
    "Scratch",
    "TensorHolding",
    "TensorMemory",
    "describe",
    "destination",
    "digest_blocks",
    "digest_of",
    "digest_plan",
    "hold",
    "read",
]
