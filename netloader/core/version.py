"""The version of this software, from the metadata of the installed package."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

__all__ = ["UNKNOWN", "own_version"]

UNKNOWN = "0+unknown"
"""The version of a source tree that is used without being installed. It is valid and sorts before every release."""


@lru_cache(maxsize=1)
def own_version() -> str:
    """The version of the installed package; :data:`UNKNOWN` if it is not installed."""
    try:
        return version("netloader")
    except PackageNotFoundError:
        return UNKNOWN
