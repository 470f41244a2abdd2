"""Block digests: the algorithms, the digest of one block, and the digests of all blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import xxhash

from netloader.codecs.regions import objects
from netloader.codecs.staging import joined, staging
from netloader.core.manifest import DIGEST_BYTES
from netloader.core.plan import Plan
from netloader.errors import ManifestError, TransportUnavailable, shown

if TYPE_CHECKING:
    from netloader.codecs.block_view import BlockView

__all__ = ["ALGORITHMS", "DEFAULT", "digest_blocks", "digest_of", "digest_plan"]

_STAGING_BYTES = 4 << 20
"""Bytes of a device span that are copied at a time."""

_BATCH_BLOCKS = 8
"""Blocks that a thread takes at a time."""

_STALL_SECONDS = 600.0
"""Seconds without progress after which hashing fails. The limit is long because the memory may be a mapped file on slow
storage, which is read only now."""


class _Memory(Protocol):
    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]: ...


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...  # any object with the buffer protocol

    def digest(self) -> bytes: ...


_REGISTRY: Mapping[str, Callable[[], _Hash]] = MappingProxyType({"xxh3-128": xxhash.xxh3_128})

ALGORITHMS: tuple[str, ...] = tuple(_REGISTRY)
"""Names of the digest algorithms, the preferred one first."""

DEFAULT = ALGORITHMS[0]


def digest_of(view: BlockView, algorithm: str) -> bytes:
    """Compute the digest of the present contents of a block.

    CPU memory is hashed in place; large spans without holding the GIL. Device memory is copied to pinned memory and
    hashed there, in pieces of limited size.

    Args:
        view: The block.
        algorithm: One of :data:`ALGORITHMS`.

    Returns:
        :data:`~netloader.core.manifest.DIGEST_BYTES` bytes, over the block's bytes in the order of its spans.

    Raises:
        ManifestError: The algorithm is unknown.
    """
    state = _new_hash(algorithm)
    try:
        regions = view.regions()
    except TransportUnavailable:
        with torch.inference_mode():
            for span in joined(view.tensors()):
                _hash_device_span(state, span)
    else:
        for piece in objects(regions):
            state.update(piece)
    return state.digest()


def digest_plan(
    memory: _Memory,
    plan: Plan,
    algorithm: str,
    *,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """Compute the digests of all blocks, joined in order.

    Args:
        memory: The memory of the blocks.
        plan: The plan of the blocks.
        algorithm: One of :data:`ALGORITHMS`.
        threads: Threads that hash, the calling one included.
        progress: Called in the calling thread with the bytes hashed so far and the total. An exception that it raises
            stops the hashing and is raised here.

    Raises:
        ManifestError: The algorithm is unknown, or some of the memory is gone.
    """
    return digest_blocks(memory, plan, range(len(plan.blocks)), algorithm, threads=threads, progress=progress)


def digest_blocks(
    memory: _Memory,
    plan: Plan,
    numbers: Sequence[int],
    algorithm: str,
    *,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """The same for some of the blocks, joined in the order of `numbers`."""
    _new_hash(algorithm)
    return _DigestJob(memory, plan, numbers, algorithm).run(max(1, threads), progress)


class _DigestJob:
    """Blocks of a plan, hashed by several threads that each take the next few."""

    def __init__(self, memory: _Memory, plan: Plan, numbers: Sequence[int], algorithm: str) -> None:
        self._memory = memory
        self._plan = plan
        self._algorithm = algorithm
        self._numbers = numbers
        self._nbytes = sum(plan.blocks[number].nbytes for number in numbers)
        self._digests = bytearray(len(numbers) * DIGEST_BYTES)
        self._lock = threading.Lock()
        self._next = 0  # guarded by the lock, as the two below
        self._hashed = 0
        self._error: BaseException | None = None

    def run(self, threads: int, progress: Callable[[int, int], None] | None) -> bytes:
        count = min(threads, -(-len(self._numbers) // _BATCH_BLOCKS))
        helpers = [
            threading.Thread(target=self._work, name=f"netloader-digest-{n}", daemon=True) for n in range(1, count)
        ]
        for helper in helpers:
            helper.start()
        self._work(progress)
        for helper in helpers:
            self._join(helper)
        if self._error is not None:
            raise self._error
        if progress is not None:
            progress(self._nbytes, self._nbytes)
        return bytes(self._digests)

    def _join(self, helper: threading.Thread) -> None:
        """Wait for a helper thread while any thread makes progress."""
        hashed = -1
        while helper.is_alive() and hashed != self._hashed:
            hashed = self._hashed
            helper.join(_STALL_SECONDS)
        if helper.is_alive():
            with self._lock:
                self._error = self._error or ManifestError(
                    f"thread {helper.name} has hashed nothing for {_STALL_SECONDS:g} s",
                    hint="check the storage that these tensors are mapped from",
                )

    def _work(self, progress: Callable[[int, int], None] | None = None) -> None:
        try:
            while places := self._take():
                views = self._memory.views(self._plan, self._numbers[places.start : places.stop])
                digests = b"".join([digest_of(view, self._algorithm) for view in views])
                first = places.start * DIGEST_BYTES
                with self._lock:
                    self._digests[first : first + len(digests)] = digests
                    self._hashed += sum(view.nbytes for view in views)
                    hashed = self._hashed
                if progress is not None and hashed < self._nbytes:
                    progress(hashed, self._nbytes)
        except BaseException as error:  # noqa: BLE001 - `run` raises it when all threads have ended
            with self._lock:
                self._error = self._error or error

    def _take(self) -> range:
        """Places of the next blocks to hash; empty when all are taken or a thread has failed."""
        with self._lock:
            first = len(self._numbers) if self._error is not None else self._next
            self._next = first + _BATCH_BLOCKS
        return range(first, min(first + _BATCH_BLOCKS, len(self._numbers)))


def _new_hash(algorithm: str) -> _Hash:
    maker = _REGISTRY.get(algorithm)
    if maker is None:
        raise ManifestError(
            f"block digest {shown(algorithm, 80)} is unknown here, known are: {', '.join(ALGORITHMS)}",
            hint="use releases of netloader on both sides that share one",
        )
    return maker()


def _hash_device_span(state: _Hash, span: torch.Tensor) -> None:
    stage = staging(min(span.numel(), _STAGING_BYTES), span.device)
    for start in range(0, span.numel(), _STAGING_BYTES):
        part = span[start : start + _STAGING_BYTES]
        copy = stage[: part.numel()]
        copy.copy_(part)
        state.update(copy.numpy().data)
