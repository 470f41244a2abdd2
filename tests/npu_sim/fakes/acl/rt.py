"""The runtime. Addresses of the simulated device are addresses of this process."""

from __future__ import annotations

import ctypes


def memcpy(destination: int, capacity: int, source: int, nbytes: int, kind: int) -> int:
    """Copy bytes; returns 0.

    Raises:
        RuntimeError: The destination has less room than that.
    """
    if nbytes > capacity:
        raise RuntimeError(f"acl.rt.memcpy: {nbytes} bytes into {capacity}")
    ctypes.memmove(destination, source, nbytes)
    return 0


def memcpy_async(destination: int, capacity: int, source: int, nbytes: int, kind: int, stream: int) -> int:
    """The same on a stream, where nothing is pending. Both addresses have to be multiples of 64, as for the real one.

    Raises:
        RuntimeError: One is not, or the destination has less room than that.
    """
    if destination % 64 or source % 64:
        raise RuntimeError(f"acl.rt.memcpy_async: {source:#x} to {destination:#x} is not aligned")
    return memcpy(destination, capacity, source, nbytes, kind)
