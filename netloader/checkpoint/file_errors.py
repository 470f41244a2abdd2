"""What went wrong with a file, as an error that says what can be done about it."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from netloader.errors import CheckpointError

__all__ = ["diagnosed", "unreadable", "unwritable"]

_HINTS = {
    errno.EACCES: "run as a user that may read it, or change its mode",
    errno.EPERM: "run as a user that may read it, or change its mode",
    errno.ENODEV: "its file system cannot map files into memory: copy the checkpoint to another one",
    errno.EOPNOTSUPP: "its file system cannot map files into memory: copy the checkpoint to another one",
    errno.ENOMEM: "there is too little memory or address space for a mapping of it: see `ulimit -v` and free memory",
    errno.EAGAIN: "it is locked, or too much memory is: see `ulimit -l`",
    errno.EMFILE: "raise the limit of open files: see `ulimit -n`",
    errno.ENFILE: "raise the limit of open files of this host",
    errno.EIO: "the disk or the file server reports an error: see the log of the kernel",
    errno.ESTALE: "the file server has replaced it: mount the file system again",
    errno.ELOOP: "its symbolic links lead in a circle: fetch the checkpoint again",
    errno.ENOENT: "it was removed, or its symbolic link leads nowhere: fetch the checkpoint again",
}

_WRITE_HINTS = {
    errno.ENOSPC: "free space, or choose another folder",
    errno.EDQUOT: "your quota is used up: free space, or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "run as a user that may write there, or choose another folder",
    errno.EPERM: "run as a user that may write there, or choose another folder",
    errno.EIO: "the disk or the file server reports an error: see the log of the kernel",
}


def unreadable(file: Path, error: OSError) -> CheckpointError:
    """An error for a file or folder that can't be read, with a hint that fits its cause."""
    hint = _HINTS.get(error.errno or 0, "check the file, its file system and its permissions")
    return CheckpointError(f"{file} cannot be read: {error.strerror or error}", hint=hint)


def unwritable(file: Path, error: OSError) -> CheckpointError:
    """An error for a file or folder that can't be written, with a hint that fits its cause."""
    hint = _WRITE_HINTS.get(error.errno or 0, "choose another folder")
    return CheckpointError(f"{file} cannot be written: {error.strerror or error}", hint=hint)


def diagnosed(file: Path) -> OSError | None:
    """Why the system can't give the contents of `file`; None when it can, so that the contents must be wrong.

    Libraries that map a file hide the error of the system in a text. So this does what they do, once more.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            os.pread(descriptor, 1, 0)
            if size:
                mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY).close()
        finally:
            os.close(descriptor)
    except OSError as error:
        return error
    return None
