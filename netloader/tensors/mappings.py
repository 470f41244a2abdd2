"""Which addresses of this process are mapped, and how, as Linux tells it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["HEAP", "NOT_WRITABLE", "mapped"]

NOT_WRITABLE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .-", re.MULTILINE)
"""A mapping whose second permission is none: ``7f00-7f10 r--p ...``."""

HEAP = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .*\[heap\]$", re.MULTILINE)
"""The first heap of the C library."""

_MAPS = Path("/proc/self/maps")


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
