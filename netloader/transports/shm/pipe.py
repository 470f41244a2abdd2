"""A pipe of the sender's own pages: the way between two processes that may not read each other.

``vmsplice`` puts pages into a pipe without copying them, and whoever reads the pipe copies them to where they belong.
No permission is needed beyond the pipe itself. What it costs was measured: ``docs/decisions/0039-pipes-of-pages.md``.
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
"""What a pipe is asked to hold, and what a process without privileges may ask for, by default. Each page that a region
lies in counts as a whole one."""


class PipeEnd:
    """One end of a pipe. Never waits.

    What is written has to stay as it is until the other end has read it: the pipe holds the pages, not their bytes.
    It is gone when both ends are closed, however their processes ended.

    Args:
        fd: The end; owned from here on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def pair(cls) -> tuple[PipeEnd, PipeEnd]:
        """Both ends of a new pipe: the one to read from, and the one to write to.

        Raises:
            TransportError: The system has no more of them.
        """
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransportError(f"no pipe can be made: {error}", hint="raise the limit of open files") from error
        with suppress(OSError):  # this user has many pipes already: a small one does the same, in more steps
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return cls(reading), cls(writing)

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fd

    def write(self, regions: Regions[int]) -> int | None:
        """Put pages in from the start of at most 1024 regions; how many bytes, or None when the pipe is full.

        Raises:
            TransportError: The memory is not there, or the other end is closed.
        """
        return self._tried(vmsplice, regions, "written")

    def read(self, regions: Regions[int]) -> int | None:
        """Fill at most 1024 regions from the start; how many bytes, 0 at the end, or None when the pipe is empty.

        Raises:
            TransportError: The memory is not there.
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
