"""What a server serves under one role, made from tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from netloader.core.identity import ModelIdentity
from netloader.core.manifest import compute_root, manifest_digest
from netloader.core.plan import block_bytes_for, make_plan
from netloader.core.protocol.events import Announcement
from netloader.tensors.describe import describe
from netloader.tensors.digests import DEFAULT, digest_plan
from netloader.tensors.memory import Memory

__all__ = ["HASHERS", "Holding", "hold"]

HASHERS = 2
"""One core reads memory at about the pace of two; beside inference more would only disturb."""


@dataclass(frozen=True, slots=True)
class Holding:
    """One set of tensors that can be served.

    Attributes:
        announcement: What is said about it to clients, with the digests of the moment it was made.
        memory: Its blocks.
    """

    announcement: Announcement
    memory: Memory

    @property
    def device(self) -> str:
        """Where it lives, as torch names it."""
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
) -> Holding:
    """Describe tensors, cut them into blocks and digest every block, once.

    Reads every byte: call it in a worker thread. Clients are checked against these digests for as long as the holding
    is served, so the tensors must not be written to any more; what is written nevertheless fails at the client.

    Args:
        tensors: What to serve, by full name; see :func:`~netloader.tensors.describe` for what may travel.
        identity: Whose weights they are.
        block_bytes: Size of a block; chosen by the size of the model when None.
        algorithm: Name of the block digest, one of :data:`~netloader.tensors.ALGORITHMS`.
        weak: Hold the tensors weakly, for memory that its owner may drop.
        threads: Threads that hash, the calling one included.
        progress: Called with the bytes hashed so far and all bytes; what it raises ends the work.

    Returns:
        The holding.

    Raises:
        ManifestError: Some tensors can't travel, the block size is out of range, or the algorithm is unknown.
    """
    manifest, memory = describe(tensors, weak=weak)
    plan = make_plan(manifest, block_bytes_for(manifest.nbytes) if block_bytes is None else block_bytes)
    digests = digest_plan(memory, plan, algorithm, threads=threads, progress=progress)
    known = manifest_digest(manifest)
    root = compute_root(manifest, plan.block_bytes, algorithm, digests, known_digest=known)
    announcement = Announcement(identity, manifest, known, plan, algorithm, digests, root)
    _ = plan.digest  # worked out here, in the caller's thread, and not when the first client asks
    return Holding(announcement, memory)
