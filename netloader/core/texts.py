"""Short texts for people: bytes, times, and lines of a log."""

from __future__ import annotations

import math

from netloader.errors import legible

__all__ = ["LINE", "byte_text", "findable", "one_line", "time_text"]

LINE = 300
"""Most characters of a log line that holds text of a peer or of an error."""

_WORD = "netloader"

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_STEP = 1000


def byte_text(nbytes: float) -> str:
    """A number of bytes with three or four digits: ``512 B``, ``4.19 MB``, ``141 GB``."""
    value, unit = float(nbytes), 0
    while value >= _STEP - 0.5 and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    digits = 0 if unit == 0 else max(0, 2 - len(str(int(value))) + 1)
    return f"{value:.{digits}f} {_UNITS[unit]}"


def time_text(seconds: float) -> str:
    """A time in whole seconds, rounded up: ``0:07``, ``12:05``, ``1:02:09``."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def one_line(text: str, limit: int = 160) -> str:
    """`text` as :func:`~netloader.errors.legible` writes it, cut at `limit` characters."""
    return legible(text, limit)


def findable(line: str) -> str:
    """`line` with the word by which all lines of this package are found in a log, unless it begins with it."""
    return line if line.startswith(_WORD) else f"{_WORD}: {line}"
