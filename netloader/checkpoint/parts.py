"""Files that are not complete yet: they have a hidden name, and their process holds a lock on them while it lives.

A process that is killed leaves its parts. The lock ends with the process, so that the next one can tell them from the
parts of a process that is still writing, and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from netloader.checkpoint.file_errors import unwritable
from netloader.checkpoint.files import INDEX_SUFFIX
from netloader.errors import CheckpointError

__all__ = ["Part", "is_part", "put_in_place", "remove_left_parts"]

_NAME = re.compile(r"\..+\.safetensors(?:\.index\.json)?\.[0-9a-f]{8}\.part")
_TRIES = 5
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


def is_part(name: str) -> bool:
    """Whether this is the name of a file that is not complete yet."""
    return _NAME.fullmatch(name) is not None


class Part:
    """A new file beside `place`, open and locked.

    Attributes:
        place: The name that it gets when it is complete.
        path: Its name until then.
        descriptor: Open for reading and writing.

    Raises:
        CheckpointError: It can't be made.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        for _ in range(_TRIES):
            self.path = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
            try:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise unwritable(place, error) from error
            if self._locked():
                return
            self.remove()  # another process took it for one that was left behind, before it was locked
        raise CheckpointError(f"{place} cannot be written: its part is removed by others", hint="choose another folder")

    def _locked(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _NO_LOCKS  # a file system without locks, where nothing is removed either
        return os.fstat(self.descriptor).st_nlink > 0

    def put_in_place(self) -> None:
        """Give it its final name. It stays open."""
        self.path.replace(self.place)

    def remove(self) -> None:
        """Close it, and remove it unless it has its final name."""
        if self.descriptor < 0:
            return
        try:
            self.path.unlink(missing_ok=True)
        finally:
            os.close(self.descriptor)
            self.descriptor = -1


def remove_left_parts(folder: Path) -> list[str]:
    """Remove the parts in `folder` whose process has ended.

    Returns:
        Their names.

    Raises:
        OSError: The folder can't be listed.
    """
    return [file.name for file in sorted(folder.iterdir()) if is_part(file.name) and _removed(file)]


def _removed(file: Path) -> bool:
    with contextlib.suppress(OSError), _opened(file) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()
        return True
    return False


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def put_in_place(parts: Sequence[Part], present: Sequence[Path]) -> list[Path]:
    """Replace old files by new ones. At any time a reader finds files of one set only, never of both.

    Args:
        parts: The new files, complete on disk; the index comes last.
        present: The old files.

    Returns:
        The new files.

    Raises:
        CheckpointError: A file can't be renamed or removed.
    """
    try:
        if list(present) != [part.place for part in parts] or len(parts) > 1:
            # Remove the index first: without it, the names of the shards still show that some are missing.
            for file in sorted(present, key=lambda file: not file.name.endswith(INDEX_SUFFIX)):
                file.unlink(missing_ok=True)
        for part in parts:
            part.put_in_place()
    except OSError as error:
        raise CheckpointError(f"the new files cannot be put in place: {error}", hint="write to a new folder") from error
    return [part.place for part in parts]
