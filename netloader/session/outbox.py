"""The messages that a session sends: in order, without blocking, and authenticated once there is a key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

from netloader.codecs.frames import LARGE_FRAME, encode_frame, seal_frame
from netloader.core.keys import FrameSeal
from netloader.core.messages import Announce, ClientMessage, ServerMessage
from netloader.errors import LocalProtocolError, NetloaderError, PeerLost, shortage
from netloader.session.connection import ControlConnection
from netloader.session.off_loop import FEW_TENSORS

__all__ = ["Outbox"]

_LIMIT = 256
"""Messages in the outbox above which this side stops reading: a peer that does not read gets no more answers."""

_SEND_LIMIT = 30.0
"""Seconds that sending one control message may take."""


class Outbox:
    """The messages that wait to be sent on one control connection.

    A message is sent at once if no other one waits and the socket takes it. Most sessions never need :meth:`write`.
    Frames get their authentication code at the moment when they are sent, because it counts them.

    Args:
        connection: Where to send.
        start: Starts :meth:`write` as a task; returns whether it did.
        lost: Called with the reason when the connection is lost.
        failed: Called with the error when a queued message can't be encoded, or no thread starts that encodes it.
    """

    def __init__(
        self,
        connection: ControlConnection[Any],
        *,
        start: Callable[[], bool],
        lost: Callable[[str], None],
        failed: Callable[[NetloaderError], None],
    ) -> None:
        self._connection = connection
        self._start = start
        self._tell_lost = lost
        self._tell_failed = failed
        self._rest = b""  # of a frame that was begun
        self._queue: deque[bytes | Announce] = deque()
        self._seal: FrameSeal | None = None
        self._writing = self._lost = False
        self._shrank = anyio.Event()
        self._seconds = _SEND_LIMIT
        self._scope = anyio.CancelScope()

    def __len__(self) -> int:
        """Messages that are not sent completely."""
        return len(self._queue) + bool(self._rest)

    def authenticate(self, key: bytes) -> None:
        """Authenticate every message that is put in from here on. Called while the outbox is empty."""
        if self._queue:
            raise LocalProtocolError("messages that must not be authenticated are still waiting")
        self._seal = FrameSeal(key)

    def put(self, message: ClientMessage | ServerMessage) -> None:
        """Send a message, after those that wait. A large announcement is encoded in a thread.

        Raises:
            LocalProtocolError: It can't be encoded.
        """
        if isinstance(message, Announce) and _large(message):
            self._wait(message)
            return
        frame = encode_frame(message)
        if self or self._writing:
            self._wait(frame)
        elif not self._lost:
            self._rest = self._connection.send_now(self._sealed(frame))
            if self._rest:
                self._begin()

    def _wait(self, frame: bytes | Announce) -> None:
        if not self._lost:
            self._queue.append(frame)
            self._begin()

    def _begin(self) -> None:
        if not self._writing:
            self._writing = self._start()

    def lose(self) -> None:
        """Forget everything: the connection is lost."""
        self._lost, self._rest = True, b""
        self._queue.clear()

    async def has_room(self) -> None:
        """Wait while too many messages wait."""
        while len(self) > _LIMIT:
            await self._shrank.wait()

    def hurry(self, seconds: float, deadline: float) -> None:
        """The session ends: give each later message `seconds`, and the one being sent until `deadline`."""
        self._seconds = seconds
        self._scope.deadline = min(self._scope.deadline, deadline)

    async def write(self) -> None:
        """Send what waits.

        Sending is shielded from cancellation: a frame that was begun when the session closes is sent whole, because the
        peer could not parse the frames after a partial one.
        """
        while self:
            try:
                frame = await self._next()
            except LocalProtocolError as error:
                self._tell_failed(error)
                continue
            except RuntimeError as error:
                scarce = shortage(error)  # no thread starts that could encode it
                if scarce is None:
                    raise
                self._tell_failed(scarce)
                continue
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + self._seconds) as self._scope:
                try:
                    await self._connection.send(frame)
                except PeerLost as error:
                    self._tell_lost(error.message)
                    return
            if self._scope.cancelled_caught:
                self._tell_lost("the peer does not read")
                return
            changed, self._shrank = self._shrank, anyio.Event()
            changed.set()
        self._writing = False

    async def flush(self) -> None:
        """Send what waits, and then end the sending direction; :meth:`write` must not run any more.

        Raises:
            PeerLost: The connection ended.
            LocalProtocolError: A message can't be encoded.
        """
        self._writing = True
        while self and not self._lost:
            await self._connection.send(await self._next())
        if not self._lost:
            await self._connection.finish()

    async def _next(self) -> bytes:
        """The rest of a frame that was begun, or the next frame, encoded and authenticated."""
        if self._rest:
            frame, self._rest = self._rest, b""
            return frame
        message = self._queue.popleft()
        if isinstance(message, bytes):
            return self._sealed(message)
        # A thread that began is waited for, so that a frame that was counted is sent.
        return await anyio.to_thread.run_sync(lambda: self._sealed(encode_frame(message)))

    def _sealed(self, frame: bytes) -> bytes:
        return frame if self._seal is None else seal_frame(frame, self._seal)


def _large(message: Announce) -> bool:
    """Whether encoding and authenticating it would block the event loop for some milliseconds."""
    tensors = 0 if message.manifest is None else len(message.manifest.tensors)
    return tensors > FEW_TENSORS or len(message.digests) > LARGE_FRAME
