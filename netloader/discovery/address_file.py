"""A file that makes the address of a server known: its one text is ``IP:Port``."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from netloader.errors import NetloaderError

__all__ = ["AddressFile", "AddressFileError"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class AddressFileError(NetloaderError):
    """The address file can't be written."""


class AddressFile:
    """The file with the address of one server.

    Args:
        path: The file. Its folder must exist.
        hint: What to do when it can't be written, in the words of the user who named it.

    Attributes:
        path: As given.
    """

    def __init__(self, path: Path, *, hint: str) -> None:
        self.path = path
        self._hint = hint
        self._written: str | None = None

    def problem(self) -> AddressFileError | None:
        """Why the file can't be written, as far as this is known before; None when nothing speaks against it."""
        folder = self.path.parent
        if not folder.is_dir():
            return self._error(f"{folder} is {'no folder' if folder.exists() else 'not there'}")
        if not os.access(folder, os.W_OK | os.X_OK):
            return self._error(f"the folder {folder} is not writable")
        return None

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
            raise self._error(error.strerror or str(error), full=error.errno in _FULL) from error
        self._written = address

    def _error(self, why: str, *, full: bool = False) -> AddressFileError:
        hint = "free space there; the log has the address too" if full else self._hint
        return AddressFileError(f"cannot write the address file {self.path}: {why}", hint=hint)

    def remove(self) -> None:
        """Remove the file, unless another process has written its own address into it. Raises nothing."""
        if self._written is None:
            return
        with contextlib.suppress(OSError):
            if self.path.read_text(encoding="ascii").strip() == self._written:
                self.path.unlink()
        self._written = None
