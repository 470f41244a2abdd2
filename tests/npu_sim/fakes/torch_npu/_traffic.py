"""A record of the operations of each device, and of two communicators of one device that worked at the same time."""

from __future__ import annotations

import threading
from typing import NamedTuple


class Began(NamedTuple):
    """An operation that was started."""

    device: int
    peer: int
    sends: bool


class Traffic:
    """The record of all devices of this process.

    Attributes:
        journal: Operations in the order in which they were started; the first one of each communicator left out.
        overlaps: Operations that were started while another communicator of the device had running ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, dict[int, int]] = {}
        self.journal: list[Began] = []
        self.overlaps: list[Began] = []

    def begin(self, communicator: int, began: Began, *, first: bool) -> None:
        """An operation was started."""
        with self._lock:
            running = self._running.setdefault(began.device, {})
            if running.keys() - {communicator}:
                self.overlaps.append(began)
            running[communicator] = running.get(communicator, 0) + 1
            if not first:
                self.journal.append(began)

    def end(self, communicator: int, device: int) -> None:
        """The operation has ended."""
        with self._lock:
            running = self._running[device]
            running[communicator] -= 1
            if not running[communicator]:
                del running[communicator]

    def destroyed(self, communicator: int, device: int) -> None:
        """Running operations of a freed communicator never end, and move nothing any more."""
        with self._lock:
            self._running.get(device, {}).pop(communicator, None)


traffic = Traffic()
