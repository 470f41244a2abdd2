"""Which addresses of this process are mapped, and how, as Linux tells it."""

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
"""A mapping whose second permission is none: ``7f00-7f10 r--p ...``."""

ANY = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
"""Every mapping."""

HEAP = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .*\[heap\]$", re.MULTILINE)
"""The first heap of the C library."""

_MAPS = Path("/proc/self/maps")

_QUERY = struct.Struct("=9Q4I2Q")
"""The kernel's ``struct procmap_query``: its size, what is asked, an address; then start, end and permissions."""

_ASK = 3 << 30 | _QUERY.size << 16 | ord("f") << 8 | 17
"""``PROCMAP_QUERY``, of Linux 6.11."""

_THERE_OR_NEXT = 0x10
_WRITABLE = 0x02

_MOST_QUESTIONS = 256
"""Mappings asked for one by one; a process has some hundreds, and with more of them the list of all is read sooner."""


def mapped(kind: re.Pattern[bytes]) -> list[tuple[int, int]]:
    """Start and end of each mapping of a kind, ascending; none where the system can't say.

    Args:
        kind: One of the patterns here.
    """
    try:
        maps = _MAPS.read_bytes()
    except OSError:
        return []
    return [(int(start, 16), int(end, 16)) for start, end in kind.findall(maps)]


def not_writable(starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each mapping that can't be written to, at least of those that these ranges reach into.

    None where the system can't say.

    Args:
        starts: Where the ranges start, ascending.
        ends: Where they end; they don't overlap.
    """
    try:
        found = _asked(starts, ends)
    except OSError:  # an older kernel
        found = None
    return mapped(_NOT_WRITABLE) if found is None else found


def _asked(starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]] | None:
    """The same by asking for each mapping; None when there are too many of them.

    Raises:
        OSError: The system takes no such questions.
    """
    found: list[tuple[int, int]] = []
    at = reached = 0
    with _MAPS.open("rb") as maps:
        for _ in range(_MOST_QUESTIONS):
            if at == len(starts):
                return found
            query = bytearray(_QUERY.pack(_QUERY.size, _THERE_OR_NEXT, max(starts[at], reached), *[0] * 12))
            try:
                fcntl.ioctl(maps, _ASK, query)
            except OSError as error:
                if error.errno == errno.ENOENT:  # nothing is mapped from there on
                    return found
                raise
            _, _, _, start, reached, permissions, *_ = _QUERY.unpack(query)
            if not permissions & _WRITABLE:
                found.append((start, reached))
            at = bisect_right(ends, reached, at)
    return None
