"""The public import path of :mod:`netloader.observe.progress`."""

from __future__ import annotations

from netloader.observe.progress import ProgressBar, ProgressLog

__all__ = ["ProgressBar", "ProgressLog"]
