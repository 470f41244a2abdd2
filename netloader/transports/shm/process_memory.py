"""Reads another process's memory (``process_vm_readv``), without an extra copy or help from that process."""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from netloader.codecs.regions import Regions, total
from netloader.errors import PeerLost, TransportError, TransportUnavailable
from netloader.transports.io.syscalls import MOST_REGIONS

__all__ = ["read"]


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_readv
    call.restype = ctypes.c_ssize_t
    call.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    return libc


def read(pid: int, remote: Regions[int], local: Regions[int]) -> None:
    """Read `remote` regions of process `pid` into `local` regions of this process; both have the same total size.

    Returns when all bytes were read. The GIL is released meanwhile.

    Raises:
        TransportUnavailable: This process may not read that process's memory.
        PeerLost: There is no such process.
        TransportError: Some of the memory is not mapped, or no longer.
    """
    if len(remote) <= 2 * MOST_REGIONS and len(local) <= 2 * MOST_REGIONS:
        _read(pid, remote, local)
        return
    for there, here in _in_step(remote, local):
        _read(pid, there, here)


def _read(pid: int, remote: Regions[int], local: Regions[int]) -> None:
    wanted = total(local)
    if not wanted:
        return
    here, there = local.buffer_info()[0], remote.buffer_info()[0]
    count = _libc().process_vm_readv(pid, here, len(local) // 2, there, len(remote) // 2, 0)
    if count == wanted:
        return
    code = ctypes.get_errno() if count < 0 else errno.EFAULT
    if code in (errno.EPERM, errno.ENOSYS):
        raise TransportUnavailable(
            f"the memory of process {pid} can't be read: {os.strerror(code)}",
            hint="reading needs the same user and the system's permission to trace (Yama's ptrace_scope, seccomp)",
        )
    if code == errno.ESRCH:
        raise PeerLost(f"process {pid} has ended")
    raise TransportError(f"{wanted} bytes of process {pid} can't be read: {os.strerror(code)}")


def _in_step(remote: Regions[int], local: Regions[int]) -> Iterator[tuple[Regions[int], Regions[int]]]:
    """Both sides split into parts of equal size, with as many regions as one call takes."""
    there, here = array("Q"), array("Q")
    rest = iter(zip(remote[::2], remote[1::2], strict=True))
    far, far_bytes = next(rest, (0, 0))
    for start, nbytes in zip(local[::2], local[1::2], strict=True):
        near, near_bytes = start, nbytes
        while near_bytes and far_bytes:
            step = min(near_bytes, far_bytes)
            there.extend((far, step))
            here.extend((near, step))
            if len(here) == 2 * MOST_REGIONS:
                yield there, here
                there, here = array("Q"), array("Q")
            near, near_bytes = near + step, near_bytes - step
            far, far_bytes = far + step, far_bytes - step
            if not far_bytes:
                far, far_bytes = next(rest, (0, 0))
    if here:
        yield there, here
