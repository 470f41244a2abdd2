"""Taking the page faults of fresh memory early: while a client connects, instead of when bytes arrive.

The first write to a page costs more than the bytes that are written to it (measured: 0.5 s for 1 GiB, against 0.2 s for
its transfer). The kernel can be asked for pages ahead; what they hold stays as it is.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["LEAST_BYTES", "Toucher"]

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_STEP = 32 << 20
"""Bytes asked for at a time: between two calls it is seen whether to go on."""

LEAST_BYTES = 1 << 20
"""Smaller tensors come out of memory that was used before, most of the time: they are left alone."""


_END = 30.0
"""Seconds that the call which runs may take: more than a host does that has to make room for its pages first."""

_log = logging.getLogger("netloader")


class Toucher:
    """A thread that asks for the pages of tensors.

    Does nothing where the system can't, or for tensors that are not in the CPU's memory. Tensors are not read or
    written, so it may run beside whatever fills them.

    Args:
        tensors: To be written to soon.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._over = threading.Event()
        # Kept alive until the thread has ended.
        self._tensors = [tensor for tensor in tensors if tensor.nbytes >= LEAST_BYTES]
        self._ranges = [found for tensor in self._tensors if (found := _pages(tensor)) is not None]
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, where there is something to do."""
        if self._ranges and sys.platform == "linux":
            self._thread = threading.Thread(target=self._run, name="netloader-touch", daemon=True)
            self._thread.start()

    @property
    def running(self) -> bool:
        """Whether :meth:`stop` would have to wait for the thread."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End it, after the call that runs: that takes some milliseconds. Blocks for as long, bounded; idempotent."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_END)
            if self._thread.is_alive():  # it keeps the tensors; what they hold it does not change
                _log.error("thread %s did not end within %g s", self._thread.name, _END)
                return
            self._thread = None
        self._tensors.clear()

    def _run(self) -> None:
        libc: Any = ctypes.CDLL(None)
        madvise, mincore = libc.madvise, libc.mincore
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        there = ctypes.create_string_buffer(1)
        for start, end in self._ranges:
            # Memory that was written to is left alone: to look at all of its pages would cost time for nothing.
            middle = start + (end - start) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
            if mincore(middle, 1, there) == 0 and there.raw[0] & 1:
                continue
            for at in range(start, end, _STEP):
                if self._over.is_set():
                    return
                if madvise(at, min(_STEP, end - at), _POPULATE_WRITE):
                    return  # an older kernel, or no memory left: the faults come later, as without us


def _pages(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Start and end of the whole pages that a tensor lies in and shares with nobody; None when there are none."""
    if tensor.device.type != "cpu" or tensor.is_meta or not tensor.is_contiguous():
        return None
    page = mmap.PAGESIZE
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, end = -(-start // page) * page, end // page * page
    return (start, end) if start < end else None
