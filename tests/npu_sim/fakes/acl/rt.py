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
