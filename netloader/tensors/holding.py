"""Makes a holding from tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from netloader.core.identity import ModelIdentity, check_sendable
from netloader.core.manifest import MAX_MANIFEST_BYTES, announced_bytes, compute_root, manifest_digest
from netloader.core.plan import block_bytes_for, make_plan
from netloader.core.protocol.events import Announcement
from netloader.errors import ManifestError
from netloader.tensors.describe import describe
from netloader.tensors.digests import DEFAULT, digest_plan
from netloader.tensors.memory import TensorMemory

__all__ = ["HASHERS", "TensorHolding", "hold"]

HASHERS = 2
"""Threads that hash by default. Memory bandwidth is the limit, so more threads would only disturb inference."""


@dataclass(frozen=True, slots=True)
class TensorHolding:
    """One set of tensors that can be served.

    Attributes:
        announcement: The announcement that clients receive, with the digests from the time it was made.
        memory: The memory of its blocks.
    """

    announcement: Announcement
    memory: TensorMemory

    @property
    def device(self) -> str:
        """Device of the tensors, as torch names it."""
        return self.memory.device


def hold(
    tensors: Mapping[str, torch.Tensor],
    identity: ModelIdentity,
    *,
    block_bytes: int | None = None,
    algorithm: str = DEFAULT,
    weak: bool = False,
    threads: int = HASHERS,
    progress: Callable[[int, int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> TensorHolding:
    """Describe tensors, divide them into blocks and compute the digest of every block.

    Reads every byte: call it in a worker thread. Clients compare the blocks with these digests as long as the holding
    is served, so the tensors must not be written to any more. If they are, the pull of the client fails.

    Args:
        tensors: What to serve, by full name; see :func:`~netloader.tensors.describe` for the conditions.
        identity: Identity of the weights.
        block_bytes: Size of a block; chosen by the size of the model when None.
        algorithm: Name of the block digest, one of :data:`~netloader.tensors.ALGORITHMS`.
        weak: Hold only weak references, for tensors that their owner may free.
        threads: Threads that hash, the calling one included.
        metadata: What the weight files say about themselves; None when the tensors come from no files.
        progress: Called with the bytes hashed so far and the total. An exception that it raises stops the hashing.

    Returns:
        The holding.

    Raises:
        ManifestError: Some tensors cannot be sent, their names are too long together, the block size is out of range,
            or the algorithm is unknown.
        ConfigError: The identity cannot be sent.
    """
    check_sendable(identity)
    manifest, memory = describe(tensors, weak=weak)
    announced = announced_bytes(manifest)
    if announced > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{len(manifest.tensors)} tensors take {announced} bytes to announce, allowed are {MAX_MANIFEST_BYTES}",
            hint="use shorter names, or serve fewer tensors under one role",
        )
    plan = make_plan(manifest, block_bytes_for(manifest.nbytes) if block_bytes is None else block_bytes)
    digests = digest_plan(memory, plan, algorithm, threads=threads, progress=progress)
    known = manifest_digest(manifest)
    root = compute_root(manifest, plan.block_bytes, algorithm, digests, known_digest=known)
    announcement = Announcement(identity, manifest, known, plan, algorithm, digests, root, metadata)
    _ = plan.digest  # computed and cached here, in the thread of the caller, before the first client asks
    return TensorHolding(announcement, memory)
