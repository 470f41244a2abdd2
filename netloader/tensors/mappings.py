"""Lists the memory mappings of this process and their permissions. Linux only."""

from __future__ import annotations

import errno
import fcntl
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ANY", "HEAP", "mapped", "not_writable"]

_NOT_WRITABLE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .-", re.MULTILINE)
"""A mapping without write permission: ``7f00-7f10 r--p ...``."""

ANY = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
"""Every mapping."""

HEAP = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .*\[heap\]$", re.MULTILINE)
"""The first heap of the C library."""

_MAPS = Path("/proc/self/maps")

_QUERY = struct.Struct("=9Q4I2Q")
"""The kernel's ``struct procmap_query``: its size, flags and an address; then start, end and permissions."""

_QUERY_IOCTL = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
"""``PROCMAP_QUERY``, of Linux 6.11."""

_COVERING_OR_NEXT = 0x10
_WRITABLE = 0x02

_MAX_QUERIES = 256
"""Most mappings that are queried one by one. Reading the list of all mappings is faster than more queries."""


def mapped(kind: re.Pattern[bytes]) -> list[tuple[int, int]]:
    """Start and end of each mapping of a kind, ascending; empty if the system has no such list.

    Args:
        kind: One of the patterns of this module.
    """
    try:
        maps = _MAPS.read_bytes()
    except OSError:
        return []
    return [(int(start, 16), int(end, 16)) for start, end in kind.findall(maps)]


def not_writable(starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each read-only mapping; mappings that overlap none of these ranges may be missing.

    Empty if the system gives no information.

    Args:
        starts: Starts of the ranges, ascending.
        ends: Ends of the ranges, which must not overlap.
    """
    try:
        found = _queried(starts, ends)
    except OSError:  # an older kernel
        found = None
    return mapped(_NOT_WRITABLE) if found is None else found


def _queried(starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]] | None:
    """The same by one query for each mapping; None when there are too many mappings.

    Raises:
        OSError: The kernel has no such query.
    """
    found: list[tuple[int, int]] = []
    at = reached = 0
    with _MAPS.open("rb") as maps:
        for _ in range(_MAX_QUERIES):
            if at == len(starts):
                return found
            query = bytearray(_QUERY.pack(_QUERY.size, _COVERING_OR_NEXT, max(starts[at], reached), *[0] * 12))
            try:
                fcntl.ioctl(maps, _QUERY_IOCTL, query)
            except OSError as error:
                if error.errno == errno.ENOENT:  # nothing is mapped from there on
                    return found
                raise
            _, _, _, start, reached, permissions, *_ = _QUERY.unpack(query)
            if not permissions & _WRITABLE:
                found.append((start, reached))
            at = bisect_right(ends, reached, at)
    return None
