"""A pipe that carries the sender's memory pages, for two processes that may not read each other's memory.

``vmsplice`` puts pages into a pipe without copying them, and the reader of the pipe copies them to their destination.
No permission is needed except the pipe itself. Measurements: ``docs/decisions/0039-pipes-of-pages.md``.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress

from netloader.codecs.regions import Regions
from netloader.errors import TransportError
from netloader.transports.io.syscalls import readv, vmsplice

__all__ = ["PIPE_BYTES", "PipeEnd"]

PIPE_BYTES = 1 << 20
"""Requested capacity of a pipe: by default the most that an unprivileged process may request. Each page that a region
touches counts as a whole page."""


class PipeEnd:
    """One end of a pipe. Its calls do not block.

    Written memory must not change until the other end has read it, because the pipe refers to the pages and does not
    copy them. The kernel frees the pipe when both ends are closed, however their processes end.

    Args:
        fd: Descriptor of the end. This object owns it from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def pair(cls) -> tuple[PipeEnd, PipeEnd]:
        """Both ends of a new pipe: the reading end and the writing end.

        Raises:
            TransportError: The system can't make another pipe.
        """
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransportError(f"no pipe can be made: {error}", hint="raise the limit of open files") from error
        with suppress(OSError):  # the user's limit is reached: a smaller pipe works too, with more calls
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return cls(reading), cls(writing)

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fd

    def write(self, regions: Regions[int]) -> int | None:
        """Put in pages of at most 1024 regions, from their start. Returns the bytes, or None when the pipe is full.

        Raises:
            TransportError: The memory is not mapped, or the other end is closed.
        """
        return self._tried(vmsplice, regions, "written")

    def read(self, regions: Regions[int]) -> int | None:
        """Fill at most 1024 regions, from their start. Returns the bytes, 0 at the end, or None when the pipe is empty.

        Raises:
            TransportError: The memory is not mapped.
        """
        return self._tried(readv, regions, "read")

    def close(self) -> None:
        """Free it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _tried(self, move: Callable[[int, Regions[int]], int], regions: Regions[int], what: str) -> int | None:
        try:
            return move(self._fd, regions)
        except BlockingIOError:
            return None
        except OSError as error:
            raise TransportError(f"the pipe to the peer can't be {what}: {error}") from error
