"""Pieces of this process's memory by address and length: what the kernel's scatter-gather calls take.

A list of numbers costs a tenth of what an object for each piece does, and there may be tens of thousands of pieces.
"""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

__all__ = ["Regions", "left_of", "objects", "regions_of", "regions_over", "total"]

Regions = array
"""Address, bytes, address, bytes, ... as unsigned 64-bit numbers: an array of ``iovec`` as it lies in memory.

Whoever made it keeps the memory alive while it is used."""


def regions_over(addresses: Sequence[int], sizes: Sequence[int]) -> Regions[int]:
    """Regions that begin at these addresses and have these sizes, in bytes."""
    regions = array("Q", bytes(16 * len(addresses)))
    regions[::2] = array("Q", addresses)
    regions[1::2] = array("Q", sizes)
    return regions


def regions_of(buffers: Iterable[memoryview]) -> Regions[int]:
    """Where writable byte views lie, in order, without empty ones: what a block that has nothing cheaper says."""
    byte, address_of = ctypes.c_char, ctypes.addressof
    pieces = [buffer for buffer in buffers if len(buffer)]
    return regions_over([address_of(byte.from_buffer(piece)) for piece in pieces], [len(piece) for piece in pieces])


def total(regions: Regions[int]) -> int:
    """Bytes in all."""
    return sum(regions[1::2])


def left_of(regions: Regions[int], done: int) -> Regions[int]:
    """What is left of `regions` when the first `done` bytes are done."""
    ends = list(accumulate(regions[1::2]))
    if not ends or done >= ends[-1]:
        return array("Q")
    place = bisect_right(ends, done)
    rest = regions[2 * place :]
    inside = done - (ends[place] - rest[1])
    rest[0] += inside
    rest[1] -= inside
    return rest


def objects(regions: Regions[int]) -> Iterator[Any]:
    """Each region as an object with the buffer protocol, without holding on to the memory."""
    sizes = regions[1::2]
    if len(set(sizes)) == 1:
        return map(_maker(sizes[0]), regions[::2])
    return (_maker(nbytes)(address) for address, nbytes in zip(regions[::2], sizes, strict=True))


@lru_cache(maxsize=1024)
def _maker(nbytes: int) -> Callable[[int], Any]:
    """What makes such an object. Kept, since each size takes a class of its own; a model has few sizes."""
    return (ctypes.c_char * nbytes).from_address
