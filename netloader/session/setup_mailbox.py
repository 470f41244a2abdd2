"""Small messages between the two ends of a transport, carried by the control connection of their session."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio

from netloader.core.protocol import events as e
from netloader.errors import PeerLost, RemoteProtocolError

__all__ = ["SetupMailbox"]

_SIGNALS = 256
_SIGNAL_BYTES = 1 << 20
"""Most signals, and most bytes of them, that are kept until the transport fetches them. More would let a peer fill this
process's memory."""

_NO_SIGNALS = "the control connection ended while a channel was being set up"


class SetupMailbox:
    """The signals of one session: implements :class:`netloader.transports.base.Signals`."""

    def __init__(self, feed: Callable[[e.Event], None]) -> None:
        self._feed = feed
        self._closed = False
        self._arrived: deque[bytes] = deque()
        self._kept = 0
        self._changed = anyio.Event()

    async def post(self, data: bytes) -> None:
        """Send `data` to the other end."""
        if self._closed:
            raise PeerLost(_NO_SIGNALS)
        self._feed(e.SignalPosted(data))
        await anyio.lowlevel.checkpoint()

    async def fetch(self) -> bytes:
        """Wait for the next signal from the other end."""
        await anyio.lowlevel.checkpoint()
        while not self._arrived:
            if self._closed:
                raise PeerLost(_NO_SIGNALS)
            await self._changed.wait()
        data = self._arrived.popleft()
        self._kept -= len(data)
        return data

    def deliver(self, data: bytes) -> None:
        """Store a signal from the peer.

        Raises:
            RemoteProtocolError: The mailbox is full.
        """
        if len(self._arrived) >= _SIGNALS or self._kept + len(data) > _SIGNAL_BYTES:
            raise RemoteProtocolError(
                f"the peer sent more than {_SIGNALS} signals, or {_SIGNAL_BYTES} bytes of them, that nobody asked for"
            )
        self._arrived.append(data)
        self._kept += len(data)
        self._wake()

    def close(self) -> None:
        """Close the mailbox: tasks that wait for a signal get PeerLost."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
