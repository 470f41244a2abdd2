"""Scatter-gather system calls on memory regions given by address.

Python's own functions need one object for each region, which costs more than moving a small region. The GIL is released
during each call.
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
"""Most regions of one system call (IOV_MAX)."""

_SPLICE_F_NONBLOCK = 2

# Linux uses size_t here. POSIX, which other systems follow, uses int.
_Count = ctypes.c_size_t if sys.platform == "linux" else ctypes.c_int
_Length = ctypes.c_size_t if sys.platform == "linux" else ctypes.c_uint32


class _Header(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = [  # type: ignore[mutable-override]  # ctypes reads it once, when the class is created
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
    """What one call sends or fills: at most :data:`MOST_REGIONS` regions, prepared in advance.

    Work between two large calls is slow, because the moved bytes have evicted everything else from the caches.

    Args:
        regions: The regions. The caller keeps their memory alive.

    Attributes:
        address: Address of the ``struct msghdr``.
        nbytes: Bytes of all regions.
    """

    __slots__ = ("_header", "_regions", "address", "nbytes")

    def __init__(self, regions: Regions[int]) -> None:
        self._regions = regions
        self._header = _Header(None, 0, regions.buffer_info()[0], len(regions) // 2)
        self.address = ctypes.addressof(self._header)
        self.nbytes = total(regions)

    def after(self, done: int) -> Message:
        """What remains after the first `done` bytes."""
        return Message(left_of(self._regions, done))


def sendmsg(fd: int, message: Message, flags: int = 0) -> int:
    """Send the bytes of a message over a socket. Returns how many were accepted.

    Raises:
        OSError: The call failed. :class:`BlockingIOError` after the socket's own timeout.
    """
    return _tried(_libc().sendmsg, fd, message.address, flags)


def recvmsg(fd: int, message: Message, flags: int = 0) -> int:
    """Fill a message from a socket. Returns the number of bytes, 0 at the end of the stream.

    Raises:
        OSError: As for :func:`sendmsg`.
    """
    return _tried(_libc().recvmsg, fd, message.address, flags)


def vmsplice(fd: int, regions: Regions[int]) -> int:
    """Put the pages of at most :data:`MOST_REGIONS` regions into a pipe without copying. Returns the number of bytes.

    The memory must not change until the bytes were read. Does not block.

    Raises:
        OSError: The call failed. :class:`BlockingIOError` when the pipe is full.
    """
    return _tried(_libc().vmsplice, fd, regions.buffer_info()[0], len(regions) // 2, _SPLICE_F_NONBLOCK)


def readv(fd: int, regions: Regions[int]) -> int:
    """Read into at most :data:`MOST_REGIONS` regions. Returns the number of bytes, 0 at the end of the stream.

    Raises:
        OSError: The call failed.
    """
    return _tried(_libc().readv, fd, regions.buffer_info()[0], len(regions) // 2)


def _tried(call: Any, *args: int) -> int:
    """Make a system call, and repeat it when a signal interrupts it (PEP 475)."""
    while True:
        count: int = call(*args)
        if count >= 0:
            return count
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
