"""Memory from an allocator of someone else's, whose pages can be taken away and given back: for engines that sleep.

`NPUPluggableAllocator`, `MemPool` and `use_mem_pool` stand for those of ``torch.npu.memory``. `init_module`,
`python_create_and_map` and `python_unmap_and_release` stand for the C extension that vllm-ascend compiles for CANN.
Who touches memory without pages ends the process, as on the device.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import _memory as memory

Handle = tuple[int, int, int, int]
"""The device, the bytes, the address, and what the driver calls the pages (here 0)."""

UNDEFINED = 0x5A
"""The value of each byte of new pages. Nothing may depend on it."""

_libc = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS, _ALL_ACCESS = 0, 3


class Callbacks:
    """What an allocator tells: `allocated` that there is memory, `freed` that there is none any more."""

    def __init__(self, allocated: Callable[[Handle], None], freed: Callable[[int], Handle]) -> None:
        self.allocated, self.freed = allocated, freed


_installed: list[Callbacks] = []
_without_pages: set[int] = set()


def init_module(allocated: Callable[[Handle], None], freed: Callable[[int], Handle]) -> None:
    """Name the functions to call when memory is allocated and freed."""
    _installed[:] = [Callbacks(allocated, freed)]


def python_unmap_and_release(device: int, nbytes: int, address: int, pages: int) -> None:
    """Take the pages of an allocation away. Its address stays reserved."""
    _protect(address, nbytes, _NO_ACCESS)
    _without_pages.add(address)
    memory.accounts.give(device, nbytes)


def python_create_and_map(device: int, nbytes: int, address: int, pages: int) -> None:
    """Give an allocation new pages. Their contents are undefined."""
    memory.accounts.take(device, nbytes)
    _protect(address, nbytes, _ALL_ACCESS)
    _without_pages.discard(address)
    ctypes.memset(address, UNDEFINED, nbytes)


def _protect(address: int, nbytes: int, access: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), access) != 0:
        raise OSError(ctypes.get_errno(), f"mprotect of {nbytes} bytes at {address:#x}")


class NPUPluggableAllocator:
    """The allocator of a library that was given its functions by `init_module`."""

    def __init__(self, path: str | None, allocate: str, free: str) -> None:
        self._allocator = _installed[0]


class MemPool:
    """Memory of one allocator."""

    def __init__(self, allocator: Callbacks) -> None:
        self._callbacks = allocator

    def rounded(self, nbytes: int) -> int:
        """The bytes of whole pages."""
        return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE

    def allocate(self, nbytes: int, index: int) -> torch.Tensor:
        """Bytes with undefined contents: a multiple of the size of a page."""
        buffer = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(UNDEFINED)
        self._callbacks.allocated((index, nbytes, buffer.data_ptr(), 0))
        return buffer

    def free(self, buffer: torch.Tensor) -> bool:
        """Note that it is freed; returns whether it had pages."""
        address = buffer.data_ptr()
        self._callbacks.freed(address)
        had_pages = address not in _without_pages
        _without_pages.discard(address)
        return had_pages


@contextmanager
def use_mem_pool(pool: MemPool, device: object = None) -> Iterator[None]:
    """Take what this thread allocates from `pool`."""
    before = memory.route.pool
    memory.route.pool = pool
    try:
        yield
    finally:
        memory.route.pool = before
