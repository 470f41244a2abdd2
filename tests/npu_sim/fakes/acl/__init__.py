"""A simulated ``acl``, CANN's own Python module: only what is imported before anything computes."""

from __future__ import annotations

from . import rt

__all__ = ["rt"]
