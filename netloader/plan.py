"""From a manifest to blocks: pure and deterministic, so that both sides derive the same blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import msgspec

from netloader.errors import ManifestError
from netloader.manifest import ITEM_BYTES, Manifest

__all__ = [
    "DEFAULT_BLOCK_BYTES",
    "MAX_BLOCKS",
    "MAX_BLOCK_BYTES",
    "MAX_SPANS",
    "MIN_BLOCK_BYTES",
    "SMALLEST_USUAL",
    "Block",
    "Plan",
    "Ranges",
    "Span",
    "block_bytes_for",
    "expand",
    "make_plan",
    "to_ranges",
]

MIN_BLOCK_BYTES = 1024
MAX_BLOCK_BYTES = 1 << 30
DEFAULT_BLOCK_BYTES = 4 << 20
"""4 MiB: large enough that cost per block vanishes, small enough to stay in cache between receiving and hashing."""

SMALLEST_USUAL = 1 << 20
"""Bytes of a block of a small model; see :func:`block_bytes_for`."""

_ENOUGH = 256
"""Blocks of a model from which a chain of relays is hardly slower for waiting until each is whole."""

MAX_SPANS = 1024
"""Spans in one block: what one scatter-gather system call takes (IOV_MAX on Linux)."""

MAX_BLOCKS = 1 << 20

Ranges = tuple[tuple[int, int], ...]
"""Block numbers as half-open ranges ``(first, past_last)``, ascending and disjoint."""


class Span(msgspec.Struct, frozen=True, gc=False):
    """Consecutive bytes of one tensor.

    Attributes:
        tensor: Index into the manifest.
        offset: First byte, counted from the start of the tensor's memory.
        nbytes: Bytes.
    """

    tensor: int
    offset: int
    nbytes: int


class Block(msgspec.Struct, frozen=True, gc=False):
    """The unit of transfer: one cut of a large tensor, or several small tensors packed together.

    Attributes:
        number: Its address; blocks count from 0.
        spans: What it is made of, in the order of its bytes.
        nbytes: Bytes in all.
    """

    number: int
    spans: tuple[Span, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """All blocks of a manifest.

    Attributes:
        manifest: What they were cut from.
        block_bytes: Size they were cut with.
        blocks: In order of number.
    """

    manifest: Manifest
    block_bytes: int
    blocks: tuple[Block, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes in all blocks."""
        return sum(b.nbytes for b in self.blocks)

    @cached_property
    def digest(self) -> str:
        """Digest over every span, in hex: equal on both sides only if both derived the same blocks."""
        text = hashlib.blake2b(digest_size=32, person=b"netloader-plan")
        for block in self.blocks:
            text.update(("|" + ",".join([f"{s.tensor}.{s.offset}.{s.nbytes}" for s in block.spans])).encode())
        return text.hexdigest()

    def tensors_of(self, number: int) -> tuple[str, ...]:
        """Names of the tensors that block `number` holds bytes of."""
        return tuple(self.manifest.tensors[s.tensor].name for s in self.blocks[number].spans)


def block_bytes_for(nbytes: int) -> int:
    """The block size to use for `nbytes` in all: the default, doubled until the number of blocks stays moderate.

    A list of digests should stay far below a frame's size limit, whatever the model. Models of less than 1 GiB get
    smaller blocks: a relay can pass on a block only once all of it is there, so a chain is slower by one block for each
    of its links.
    """
    size = DEFAULT_BLOCK_BYTES
    while size > SMALLEST_USUAL and nbytes < _ENOUGH * size:
        size //= 2
    while nbytes // size > MAX_BLOCKS // 16 and size < MAX_BLOCK_BYTES:
        size *= 2
    return size


def make_plan(manifest: Manifest, block_bytes: int) -> Plan:
    """Cut a manifest into blocks.

    Tensors of at least `block_bytes` are cut; smaller ones are packed, in order, until a block is full or has
    :data:`MAX_SPANS` spans. Aliases and empty tensors have no bytes and appear in no block.

    Args:
        manifest: A manifest that passed :meth:`~netloader.manifest.Manifest.check`.
        block_bytes: Size of a block, from :data:`MIN_BLOCK_BYTES` to :data:`MAX_BLOCK_BYTES`.

    Returns:
        The plan; every byte of the manifest is in exactly one block.

    Raises:
        ManifestError: `block_bytes` is out of range, or there would be more than :data:`MAX_BLOCKS` blocks.
    """
    if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES:
        raise ManifestError(f"block size {block_bytes} is outside {MIN_BLOCK_BYTES}..{MAX_BLOCK_BYTES}")
    # As TensorSpec.wire_bytes says it, for all: a client waits for this before it asks for anything.
    sizes = [0 if spec.alias_of else prod(spec.shape) * ITEM_BYTES[spec.dtype] for spec in manifest.tensors]
    blocks: list[Block] = []
    if sum(sizes) <= MAX_BLOCKS * block_bytes:  # else it is hopeless: spare the work
        for number, (spans, nbytes) in enumerate(_cuts(sizes, block_bytes)):
            if number == MAX_BLOCKS:
                break
            blocks.append(Block(number, spans, nbytes))
        else:
            return Plan(manifest, block_bytes, tuple(blocks))
    raise ManifestError(
        f"{sum(sizes)} bytes in blocks of {block_bytes} make more than {MAX_BLOCKS} blocks", hint="use larger blocks"
    )


def _cuts(sizes: Sequence[int], block_bytes: int) -> Iterator[tuple[tuple[Span, ...], int]]:
    pack: list[Span] = []
    packed = 0
    for index, size in enumerate(sizes):
        if size >= block_bytes:
            for offset in range(0, size, block_bytes):
                length = min(block_bytes, size - offset)
                yield (Span(index, offset, length),), length
            continue
        if size == 0:
            continue
        if packed + size > block_bytes or len(pack) == MAX_SPANS:
            yield tuple(pack), packed
            pack, packed = [], 0
        pack.append(Span(index, 0, size))
        packed += size
    if pack:
        yield tuple(pack), packed


def to_ranges(numbers: Iterable[int]) -> Ranges:
    """Ascending, disjoint ranges that hold exactly `numbers`."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)


def expand(ranges: Ranges) -> tuple[int, ...]:
    """Every number in `ranges`, in order."""
    return tuple(n for first, end in ranges for n in range(first, end))
