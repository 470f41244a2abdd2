"""Scatter-gather system calls on pieces of memory by address.

Python's own take an object for each piece, which costs more than moving a small piece does. The interpreter is free
while one of these runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from netloader.codecs.regions import Regions

__all__ = ["MOST_REGIONS", "preadv", "pwritev", "recvmsg", "sendmsg"]

MOST_REGIONS = 1024
"""Pieces of memory that one system call takes (IOV_MAX)."""

# Linux counts in words, against POSIX, which others follow.
_Count = ctypes.c_size_t if sys.platform == "linux" else ctypes.c_int
_Length = ctypes.c_size_t if sys.platform == "linux" else ctypes.c_uint32


class _Message(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = [  # type: ignore[mutable-override]  # ctypes reads it once, when the class is made
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("regions", ctypes.c_void_p),
        ("count", _Count),
        ("control", ctypes.c_void_p),
        ("control_length", _Length),
        ("flags", ctypes.c_int),
    ]


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("sendmsg", "recvmsg"):
        call = getattr(libc, name)
        call.restype = ctypes.c_ssize_t
        call.argtypes = (ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int)
    for name in ("preadv", "pwritev"):
        call = getattr(libc, name)
        call.restype = ctypes.c_ssize_t
        call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    return libc


def sendmsg(fd: int, regions: Regions[int], flags: int = 0) -> int:
    """Send the bytes of at most :data:`MOST_REGIONS` regions over a socket; how many were taken.

    Raises:
        OSError: The system says no. :class:`BlockingIOError` after the socket's own timeout.
    """
    message = _Message(regions=regions.buffer_info()[0], count=len(regions) // 2)
    return _tried(lambda: _libc().sendmsg(fd, message, flags))


def recvmsg(fd: int, regions: Regions[int], flags: int = 0) -> int:
    """Receive into at most :data:`MOST_REGIONS` regions from a socket; how many bytes came, 0 at its end.

    Raises:
        OSError: As for :func:`sendmsg`.
    """
    message = _Message(regions=regions.buffer_info()[0], count=len(regions) // 2)
    return _tried(lambda: _libc().recvmsg(fd, message, flags))


def pwritev(fd: int, regions: Regions[int], offset: int) -> int:
    """Write the bytes of at most :data:`MOST_REGIONS` regions into a file; how many were written.

    Raises:
        OSError: The system says no.
    """
    return _tried(lambda: _libc().pwritev(fd, regions.buffer_info()[0], len(regions) // 2, offset))


def preadv(fd: int, regions: Regions[int], offset: int) -> int:
    """Read a file into at most :data:`MOST_REGIONS` regions; how many bytes were read.

    Raises:
        OSError: The system says no.
    """
    return _tried(lambda: _libc().preadv(fd, regions.buffer_info()[0], len(regions) // 2, offset))


def _tried(call: Callable[[], int]) -> int:
    """Make a system call, again when a signal came between (PEP 475)."""
    while True:
        count = call()
        if count >= 0:
            return count
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
