"""The store of an HCCL group of two: values that one end sets are sent over the control connection to the other end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from netloader.errors import PeerLost, TransferTimeout
from netloader.transports.io.channel_state import LoopEvent

__all__ = ["MAX_KEYS", "MAX_VALUE", "PeerStore"]

MAX_KEYS = 16
"""Keys that a peer may set: torch_npu uses two."""

MAX_VALUE = 16 << 10
"""Bytes of one value: HCCL's root information has 4108."""


class PeerStore(Store):
    """One end's store. It has no port, so no unauthenticated peer can connect to it.

    It belongs to the event loop that creates it. torch_npu calls it from worker threads.

    Args:
        timeout: Seconds to wait for a value of the peer.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._aborted = False
        self._outgoing: deque[tuple[str, bytes]] = deque()
        self._ready = LoopEvent()

    # --- called by torch_npu, in any thread -------------------------------------------------------------------------

    def set(self, key: str, value: Any) -> None:
        """Store a value, and queue it for the peer."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._values[key] = data
            self._changed.notify_all()
        self._outgoing.append((key, data))
        self._ready.set()

    def get(self, key: str) -> bytes:
        """Wait for a value of either end, and return it."""
        with self._changed:
            there = self._changed.wait_for(lambda: key in self._values or self._aborted, self._timeout)
            if self._aborted:
                raise PeerLost("setting up was cancelled")
            if not there:
                raise TransferTimeout(f"the peer did not send the value of {key!r} within {self._timeout:g} s")
            return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all `keys` have values. The timeout of this store applies, not `timeout`."""
        del timeout
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all `keys` have values now."""
        with self._changed:
            return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        """Remove a value from this store."""
        with self._changed:
            return self._values.pop(key, None) is not None

    def has_extended_api(self) -> bool:
        """False: there are only set, get and wait."""
        return False

    # --- called by the channel --------------------------------------------------------------------------------------

    def deliver(self, key: str, value: bytes) -> bool:
        """Store a value from the peer. Returns False when it exceeds the limits."""
        with self._changed:
            if len(value) > MAX_VALUE or (key not in self._values and len(self._values) >= MAX_KEYS):
                return False
            self._values[key] = value
            self._changed.notify_all()
        return True

    async def published(self) -> tuple[str, bytes]:
        """Wait for the next value that was set here, and return it. Loses no value when cancelled."""
        while not self._outgoing:
            await self._ready.wait()
            if not self._outgoing:
                self._ready = LoopEvent()  # what is set from now on sets the new one
        return self._outgoing.popleft()

    def abort(self) -> None:
        """End every wait. Any thread may call it."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()
