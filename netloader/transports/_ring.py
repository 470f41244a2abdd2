"""A bounded ring of shared memory without a name: the way between two processes that may not read each other."""

from __future__ import annotations

import fcntl
import os

from netloader.codecs.regions import Regions, first_of
from netloader.errors import TransportError
from netloader.transports._vectored import preadv, pwritev

__all__ = ["PIECE_BYTES", "RING_BYTES", "Ring"]

RING_BYTES = 4 << 20
"""Small enough to stay in the processor's cache between both copies."""

PIECE_BYTES = 1 << 20
"""Bytes written before the reader is told."""


class Ring:
    """Bytes by their position in an endless stream, kept in a file of memory that only two processes can open.

    It is gone when both have closed it, however they ended. It is read and written by system calls and never mapped:
    whatever the other side does to the file, this side gets an error, not a signal.

    Args:
        fd: The file; owned from here on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls) -> Ring:
        """A new ring.

        Raises:
            TransportError: The system has no memory for it, or doesn't know such files.
        """
        try:
            fd = os.memfd_create("netloader", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise TransportError(f"no shared memory can be made: {error}") from error
        try:
            os.ftruncate(fd, RING_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            os.close(fd)
            raise TransportError(f"no shared memory can be made: {error}") from error
        return cls(fd)

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._fd

    def write(self, position: int, regions: Regions[int]) -> int:
        """Write from the start of `regions`; how many bytes were written before the ring's end came.

        Raises:
            TransportError: There is no memory.
        """
        try:
            return pwritev(self._fd, first_of(regions, RING_BYTES - position % RING_BYTES), position % RING_BYTES)
        except OSError as error:
            raise TransportError(f"the shared memory can't be written: {error}") from error

    def read(self, position: int, nbytes: int, regions: Regions[int]) -> int:
        """Read at most `nbytes` bytes into the start of `regions`; how many bytes were read.

        Raises:
            TransportError: It can't be read, or has become shorter.
        """
        place = position % RING_BYTES
        try:
            count = preadv(self._fd, first_of(regions, min(nbytes, RING_BYTES - place)), place)
        except OSError as error:
            raise TransportError(f"the shared memory can't be read: {error}") from error
        if count == 0:
            raise TransportError("the shared memory is shorter than agreed")
        return count

    def close(self) -> None:
        """Close it on this side. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
