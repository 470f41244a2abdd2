"""Scatter-gather system calls on pieces of memory by address.

Python's own take an object for each piece, which costs more than moving a small piece does. The interpreter is free
while one of these runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import lru_cache
from typing import Any

from netloader.codecs.regions import Regions, left_of, total

__all__ = ["MOST_REGIONS", "Message", "readv", "recvmsg", "sendmsg", "vmsplice"]

MOST_REGIONS = 1024
"""Pieces of memory that one system call takes (IOV_MAX)."""

_SPLICE_F_NONBLOCK = 2

# Linux counts in words, against POSIX, which others follow.
_Count = ctypes.c_size_t if sys.platform == "linux" else ctypes.c_int
_Length = ctypes.c_size_t if sys.platform == "linux" else ctypes.c_uint32


class _Header(ctypes.Structure):
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
        call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    libc.readv.restype = ctypes.c_ssize_t
    libc.readv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    if hasattr(libc, "vmsplice"):  # Linux
        libc.vmsplice.restype = ctypes.c_ssize_t
        libc.vmsplice.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint)
    return libc


class Message:
    """What one call sends or fills: at most :data:`MOST_REGIONS` regions, made ready beforehand.

    What is done between two large calls costs most: the bytes have most likely pushed everything else out of the
    processor's memory.

    Args:
        regions: The pieces; whoever made them keeps their memory alive.

    Attributes:
        address: Where the system finds this.
        nbytes: Bytes of all regions.
    """

    __slots__ = ("_header", "_regions", "address", "nbytes")

    def __init__(self, regions: Regions[int]) -> None:
        self._regions = regions
        self._header = _Header(None, 0, regions.buffer_info()[0], len(regions) // 2)
        self.address = ctypes.addressof(self._header)
        self.nbytes = total(regions)

    def after(self, done: int) -> Message:
        """What is left once the first `done` bytes are through."""
        return Message(left_of(self._regions, done))


def sendmsg(fd: int, message: Message, flags: int = 0) -> int:
    """Send the bytes of a message over a socket; how many were taken.

    Raises:
        OSError: The system says no. :class:`BlockingIOError` after the socket's own timeout.
    """
    return _tried(_libc().sendmsg, fd, message.address, flags)


def recvmsg(fd: int, message: Message, flags: int = 0) -> int:
    """Fill a message from a socket; how many bytes came, 0 at its end.

    Raises:
        OSError: As for :func:`sendmsg`.
    """
    return _tried(_libc().recvmsg, fd, message.address, flags)


def vmsplice(fd: int, regions: Regions[int]) -> int:
    """Put the pages of at most :data:`MOST_REGIONS` regions into a pipe, uncopied; how many bytes it took.

    They have to stay as they are until they were read. Never waits.

    Raises:
        OSError: The system says no. :class:`BlockingIOError` when the pipe is full.
    """
    return _tried(_libc().vmsplice, fd, regions.buffer_info()[0], len(regions) // 2, _SPLICE_F_NONBLOCK)


def readv(fd: int, regions: Regions[int]) -> int:
    """Read into at most :data:`MOST_REGIONS` regions; how many bytes came, 0 at the end.

    Raises:
        OSError: The system says no.
    """
    return _tried(_libc().readv, fd, regions.buffer_info()[0], len(regions) // 2)


def _tried(call: Any, *args: int) -> int:
    """Make a system call, again when a signal came between (PEP 475)."""
    while True:
        count: int = call(*args)
        if count >= 0:
            return count
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
