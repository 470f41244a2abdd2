"""The store of an HCCL group of two: what one end sets travels over the control connection to the other end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from netloader.errors import PeerLost, TransferTimeout
from netloader.transports.io.channel_state import LoopEvent

__all__ = ["MAX_KEYS", "MAX_VALUE", "Exchange"]

MAX_KEYS = 16
"""Keys that a peer may set: torch_npu uses two."""

MAX_VALUE = 16 << 10
"""Bytes of one value: HCCL's root information has 4108."""


class Exchange(Store):
    """One end's store. No port, no server: a stranger has nothing to connect to.

    Belongs to the event loop in which it is made; torch_npu calls it from worker threads.

    Args:
        timeout: Seconds to wait for a value of the peer's.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._aborted = False
        self._outgoing: deque[tuple[str, bytes]] = deque()
        self._ready = LoopEvent()

    # --- torch_npu's side, any thread -------------------------------------------------------------------------------

    def set(self, key: str, value: Any) -> None:
        """Keep a value, and have it sent to the peer."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._values[key] = data
            self._changed.notify_all()
        self._outgoing.append((key, data))
        self._ready.set()

    def get(self, key: str) -> bytes:
        """A value of either end; waits for it."""
        with self._changed:
            there = self._changed.wait_for(lambda: key in self._values or self._aborted, self._timeout)
            if self._aborted:
                raise PeerLost("the set-up was given up")
            if not there:
                raise TransferTimeout(f"the peer did not say {key!r} within {self._timeout:g} s")
            return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all `keys` have values; our own limit counts."""
        del timeout
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` have values now."""
        with self._changed:
            return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        """Forget a value here."""
        with self._changed:
            return self._values.pop(key, None) is not None

    def has_extended_api(self) -> bool:
        """No: set, get and wait are all there is."""
        return False

    # --- our side ---------------------------------------------------------------------------------------------------

    def deliver(self, key: str, value: bytes) -> bool:
        """Take a value from the peer; False when it sends more than any group needs."""
        with self._changed:
            if len(value) > MAX_VALUE or (key not in self._values and len(self._values) >= MAX_KEYS):
                return False
            self._values[key] = value
            self._changed.notify_all()
        return True

    async def published(self) -> tuple[str, bytes]:
        """The next value that was set here; waits for it. Loses nothing when cancelled."""
        while not self._outgoing:
            await self._ready.wait()
            if not self._outgoing:
                self._ready = LoopEvent()  # what is set from now on sets the new one
        return self._outgoing.popleft()

    def abort(self) -> None:
        """End every wait; any thread."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()
