"""How a worker announces the address of its server: a log line, and a file whose path begins with OUTPUT_PREFIX."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from netloader.errors import NetloaderError

__all__ = ["SERVING_PATTERN", "AddressFile", "AddressFileError", "serving_line"]

SERVING_PATTERN = r"netloader: rank (?P<rank>\d+) serves (?P<role>\w+) at (?P<address>\S+)"
"""Pattern of the log line with the address: groups ``rank``, ``role`` and ``address``."""


class AddressFileError(NetloaderError):
    """The address file could not be written."""


def serving_line(rank: int, role: str, address: str, detail: str) -> str:
    """The log line that SERVING_PATTERN matches."""
    return f"netloader: rank {rank} serves {role} at {address} ({detail})"


class AddressFile:
    """The file ``{prefix}{rank}.txt`` with the one text ``IP:Port``.

    Args:
        prefix: OUTPUT_PREFIX, the beginning of the path. The folder must exist.
        rank: The rank.
    """

    def __init__(self, prefix: str, rank: int) -> None:
        self.path = Path(f"{prefix}{rank}.txt")
        self._written: str | None = None

    def write(self, address: str) -> None:
        """Write `address` atomically: a reader finds the whole address or no file.

        Raises:
            AddressFileError: The folder does not exist, is not writable, or is full. No temporary file stays.
        """
        temporary: str | None = None
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(address)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            Path(temporary).replace(self.path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise AddressFileError(
                f"cannot write the address file {self.path}: {error.strerror or error}",
                hint="OUTPUT_PREFIX must name a folder that exists and can be written; the log has the address too",
            ) from error
        self._written = address

    def remove(self) -> None:
        """Remove the file, unless another process has written its own address into it. Raises nothing."""
        if self._written is None:
            return
        with contextlib.suppress(OSError):
            if self.path.read_text(encoding="ascii").strip() == self._written:
                self.path.unlink()
        self._written = None
