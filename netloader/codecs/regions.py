"""Regions of this process's memory, given by address and length, for the kernel's scatter-gather calls.

An array of numbers costs a tenth of one object for each region, and there may be tens of thousands of regions.
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
"""Address, bytes, address, bytes, ... as unsigned 64-bit numbers, which is the memory layout of an array of ``iovec``.

The creator of the array keeps the memory alive while it is used."""


def regions_over(addresses: Sequence[int], sizes: Sequence[int]) -> Regions[int]:
    """Regions with these addresses and sizes, in bytes."""
    regions = array("Q", bytes(16 * len(addresses)))
    regions[::2] = array("Q", addresses)
    regions[1::2] = array("Q", sizes)
    return regions


def regions_of(buffers: Iterable[memoryview]) -> Regions[int]:
    """The regions of writable byte views, in order, without empty ones."""
    byte, address_of = ctypes.c_char, ctypes.addressof
    pieces = [buffer for buffer in buffers if len(buffer)]
    return regions_over([address_of(byte.from_buffer(piece)) for piece in pieces], [len(piece) for piece in pieces])


def total(regions: Regions[int]) -> int:
    """Total bytes of all regions."""
    return sum(regions[1::2])


def left_of(regions: Regions[int], done: int) -> Regions[int]:
    """The rest of `regions` after the first `done` bytes."""
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
    """Each region as an object with the buffer protocol, which does not keep the memory alive."""
    sizes = regions[1::2]
    if len(set(sizes)) == 1:
        return map(_maker(sizes[0]), regions[::2])
    return (_maker(nbytes)(address) for address, nbytes in zip(regions[::2], sizes, strict=True))


@lru_cache(maxsize=1024)
def _maker(nbytes: int) -> Callable[[int], Any]:
    """A function that makes such an object. Cached, because each size needs its own class; a model has few sizes."""
    return (ctypes.c_char * nbytes).from_address
