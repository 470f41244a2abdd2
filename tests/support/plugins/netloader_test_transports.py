# ruff: noqa: INP001 - on PYTHONPATH by itself, as an installed module would be
"""Transports for tests, found through the entry-point group when this folder is on PYTHONPATH.

`held` is gloo that can be held in the middle of a transfer. Both sides have to use it by name; the environment of each
process configures it:

NETLOADER_TEST_HOLD   number of the block after which each channel stops sending ...
NETLOADER_TEST_FILE   ... until this file exists
NETLOADER_TEST_MARKS  folder in which each hold creates a file when it begins
NETLOADER_TEST_FAULT  a fault in the form of the command line (`corrupt:3:17`), once in this process
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from netloader.transports.gloo import GlooTransport


class HeldTransport(FaultyTransport):
    """Gloo with the faults that the environment configures."""

    def __init__(self) -> None:
        faults = []
        block = os.environ.get("NETLOADER_TEST_HOLD")
        if block is not None:
            until = Path(os.environ["NETLOADER_TEST_FILE"])
            faults.append(Fault(FaultKind.HOLD, int(block), until=until, times=None))
        fault = os.environ.get("NETLOADER_TEST_FAULT")
        if fault is not None:
            faults.append(Fault.parse(fault))
        super().__init__(GlooTransport(), _Marking(faults, os.environ.get("NETLOADER_TEST_MARKS")), name="held")


class _Marking(Faults):
    """Faults whose holds are visible to other processes."""

    def __init__(self, faults: Sequence[Fault], folder: str | None) -> None:
        super().__init__(faults)
        self._folder = folder

    def take(self, side: Side, block: int, nbytes: int) -> list[Fault]:
        struck = super().take(side, block, nbytes)
        if self._folder is not None and any(fault.kind is FaultKind.HOLD for fault in struck):
            os.close(tempfile.mkstemp(prefix="held-", dir=self._folder)[0])
        return struck
