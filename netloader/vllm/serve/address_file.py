"""How a worker announces the address of its server: a log line, and a file whose path begins with OUTPUT_PREFIX."""

from __future__ import annotations

import logging
from pathlib import Path

from netloader.discovery.address_file import AddressFile as OneAddressFile
from netloader.discovery.address_file import AddressFileError

__all__ = ["SERVING_PATTERN", "AddressFile", "AddressFileError", "serving_line"]

log = logging.getLogger(__name__)

SERVING_PATTERN = r"netloader: rank (?P<rank>\d+) serves (?P<role>\w+) at (?P<address>\S+)"
"""Pattern of the log line with the address: groups ``rank``, ``role`` and ``address``."""

_HINT = "OUTPUT_PREFIX must name a folder that exists and can be written; the log has the address too"


def serving_line(rank: int, role: str, address: str, detail: str) -> str:
    """The log line that SERVING_PATTERN matches."""
    return f"netloader: rank {rank} serves {role} at {address} ({detail})"


class AddressFile(OneAddressFile):
    """The file ``{prefix}{rank}.txt`` with the one text ``IP:Port``.

    It is made when the worker starts, long before the address is written. A folder that can't be used is logged then.

    Args:
        prefix: OUTPUT_PREFIX, the beginning of the path. The folder must exist.
        rank: The rank.
    """

    def __init__(self, prefix: str, rank: int) -> None:
        super().__init__(Path(f"{prefix}{rank}.txt"), hint=_HINT)
        problem = self.problem()
        if problem is not None:
            log.error("netloader: rank %d: %s", rank, problem)
