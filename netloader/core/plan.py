"""The plan: a manifest cut into blocks. It is deterministic, so that both sides derive the same blocks."""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat

import msgspec

from netloader.core.manifest import Manifest
from netloader.errors import ManifestError

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
    "in_groups",
    "make_plan",
    "mask_of",
    "ranges_of",
    "to_ranges",
]

MIN_BLOCK_BYTES = 1024
MAX_BLOCK_BYTES = 1 << 30
DEFAULT_BLOCK_BYTES = 4 << 20
"""4 MiB: large enough that the cost per block is negligible, small enough to be still in cache when it is hashed."""

SMALLEST_USUAL = 1 << 20
"""Least block size of a model, in bytes; see :func:`block_bytes_for`."""

_ENOUGH = 256
"""Number of blocks of a model from which on a chain of relays loses little time by passing on whole blocks only."""

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
        number: Number of the block, counted from 0.
        tensors: Indices into the manifest of the tensors whose bytes it holds, in the order of its bytes.
        offset: First byte of a cut, counted from the start of its tensor's memory; 0 where whole tensors are packed.
        sizes: Bytes of each of `tensors`.
        nbytes: Bytes of the whole block.
    """

    number: int
    tensors: tuple[int, ...]
    offset: int
    sizes: tuple[int, ...]
    nbytes: int

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of the block, in the order of its bytes."""
        return tuple(map(Span, self.tensors, repeat(self.offset), self.sizes))


@dataclass(frozen=True)
class Plan:
    """All blocks of a manifest.

    Attributes:
        manifest: The manifest that the blocks were cut from.
        block_bytes: The block size.
        blocks: The blocks, by number.
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
        digest = hashlib.blake2b(digest_size=32, person=b"netloader-plan")
        for block in self.blocks:
            numbers = (len(block.tensors), block.offset, *block.tensors, *block.sizes)
            digest.update(struct.pack(f"<{len(numbers)}Q", *numbers))
        return digest.hexdigest()

    def tensors_of(self, number: int) -> tuple[str, ...]:
        """Names of the tensors that block `number` holds bytes of."""
        return tuple(self.manifest.tensors[index].name for index in self.blocks[number].tensors)


def block_bytes_for(nbytes: int) -> int:
    """The block size for a model of `nbytes` bytes: the default, doubled until the number of blocks is moderate.

    The list of digests has to stay far below a frame's size limit for any model. Models of less than 1 GiB get smaller
    blocks, because a relay passes on whole blocks only: each relay of a chain adds the time of one block.
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
        manifest: A manifest that passed :meth:`~netloader.core.manifest.Manifest.check`.
        block_bytes: Size of a block, from :data:`MIN_BLOCK_BYTES` to :data:`MAX_BLOCK_BYTES`.

    Returns:
        The plan. Every byte of the manifest is in exactly one block.

    Raises:
        ManifestError: `block_bytes` is out of range, or there would be more than :data:`MAX_BLOCKS` blocks.
    """
    if not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES:
        raise ManifestError(f"block size {block_bytes} is outside {MIN_BLOCK_BYTES}..{MAX_BLOCK_BYTES}")
    sizes = manifest.sizes
    blocks: list[Block] = []
    if manifest.nbytes <= MAX_BLOCKS * block_bytes:  # otherwise there are too many blocks in any case
        for number, cut in enumerate(_cuts(sizes, block_bytes)):
            if number == MAX_BLOCKS:
                break
            blocks.append(Block(number, *cut))
        else:
            return Plan(manifest, block_bytes, tuple(blocks))
    raise ManifestError(
        f"{manifest.nbytes} bytes in blocks of {block_bytes} bytes make more than {MAX_BLOCKS} blocks",
        hint="use larger blocks",
    )


_Cut = tuple[tuple[int, ...], int, tuple[int, ...], int]
"""Tensors, offset, sizes and bytes of a block."""


def _cuts(sizes: Sequence[int], block_bytes: int) -> Iterator[_Cut]:
    """All blocks in order. A pack comes before the tensor that no longer fitted into it."""
    large: Sequence[int] = ()
    small: Sequence[int] = range(len(sizes))
    # With tens of thousands of tensors nearly all are small, so avoid a Python loop over them.
    if max(sizes, default=0) >= block_bytes or not all(sizes):
        large = [index for index, size in enumerate(sizes) if size >= block_bytes]
        small = [index for index, size in enumerate(sizes) if 0 < size < block_bytes]
    packs = _packs(sizes, small, block_bytes)
    closed_by, pack = next(packs, (len(sizes), None))
    for index in large:
        while pack is not None and closed_by < index:
            yield pack
            closed_by, pack = next(packs, (len(sizes), None))
        for offset in range(0, sizes[index], block_bytes):
            length = min(block_bytes, sizes[index] - offset)
            yield (index,), offset, (length,), length
    while pack is not None:
        yield pack
        _, pack = next(packs, (len(sizes), None))


def _packs(sizes: Sequence[int], small: Sequence[int], block_bytes: int) -> Iterator[tuple[int, _Cut]]:
    """Packs of the tensors in `small`, in order; each with the index of the first tensor that did not fit into it."""
    # Prefix sums make this fast, which matters because a client plans before it requests the first block.
    small_sizes = sizes if len(small) == len(sizes) else [sizes[index] for index in small]
    ends = list(accumulate(small_sizes))
    first = before = 0
    while first < len(small):
        past = bisect_right(ends, before + block_bytes, first, min(first + MAX_SPANS, len(small)))
        closed_by = small[past] if past < len(small) else len(sizes)
        yield closed_by, (tuple(small[first:past]), 0, tuple(small_sizes[first:past]), ends[past - 1] - before)
        first, before = past, ends[past - 1]


def in_groups(plan: Plan, numbers: Iterable[int], most: int) -> Iterator[list[int]]:
    """Blocks in order, in groups of at most `most` spans; a block with more spans is a group by itself."""
    group: list[int] = []
    spans = 0
    for number in numbers:
        more = len(plan.blocks[number].tensors)
        if group and spans + more > most:
            yield group
            group, spans = [], 0
        group.append(number)
        spans += more
    if group:
        yield group


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


def mask_of(ranges: Ranges) -> int:
    """The blocks in `ranges` as a number in which bit n stands for block n."""
    if len(ranges) == 1:
        ((first, end),) = ranges
        return ((1 << (end - first)) - 1) << first
    # Each operation on a large number costs as much as its length, so ranges are not added one by one.
    held = bytearray(max((end for _, end in ranges), default=0) // 8 + 1)
    for first, end in ranges:
        low, high = first // 8, end // 8
        if low == high:
            held[low] |= ((1 << (end - first)) - 1) << first % 8
            continue
        held[low] |= 0xFF << first % 8 & 0xFF
        held[low + 1 : high] = b"\xff" * (high - low - 1)
        held[high] |= (1 << end % 8) - 1
    return int.from_bytes(held, "little")


def ranges_of(mask: int) -> Ranges:
    """The blocks in a mask as ranges. Takes time in proportion to the length of the mask."""
    digits = bin(mask)[:1:-1]  # the digit at n stands for block n
    ranges = []
    first = digits.find("1")
    while first >= 0:
        end = digits.find("0", first)
        end = len(digits) if end < 0 else end
        ranges.append((first, end))
        first = digits.find("1", end)
    return tuple(ranges)
