"""Bytes per second, as people write them."""

from __future__ import annotations

import re

__all__ = ["ALLOWED_RATE", "LEAST_RATE", "parse_rate"]

LEAST_RATE = 1 << 20
"""Least limit, in bytes per second: with less, a block for each of several clients would take longer than they wait."""

ALLOWED_RATE = "bytes per second: a number from 1048576 on, or text like '500MB/s', '2GiB/s' or '10Gbit/s'"

_RATE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([kKMGT]i?)?(B|bit)(?:/s|ps)")
_FACTORS = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_rate(value: float | str) -> float | None:
    """The rate in bytes per second; None when `value` is no rate, or less than :data:`LEAST_RATE`.

    Args:
        value: A number of bytes per second, or text: a number, a unit (B or bit; k, M, G and T mean powers of 1000, Ki,
            Mi, Gi and Ti powers of 1024) and ``/s``.
    """
    if isinstance(value, str):
        match = _RATE.fullmatch(value.strip())
        if match is None:
            return None
        number, prefix, unit = match.groups()
        factor = 1 if prefix is None else (1024 if prefix.endswith("i") else 1000) ** _FACTORS[prefix[0]]
        value = float(number) * factor / (8 if unit == "bit" else 1)
    return float(value) if LEAST_RATE <= value < float("inf") else None
