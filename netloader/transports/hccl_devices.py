"""The import path that 0.1 documents for :mod:`netloader.transports.hccl.devices`."""

from __future__ import annotations

from netloader.transports.hccl.devices import hold_still, move_again

__all__ = ["hold_still", "move_again"]
