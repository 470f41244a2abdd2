"""What two ends of an HCCL channel say to each other over the control connection, before and while blocks move.

HCCL itself tells nobody that a peer is gone: it waits until a timeout of its own. The control connection knows at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import msgspec

from netloader.errors import PeerLost
from netloader.transports.base import Signals

__all__ = ["Ended", "Go", "GroupNote", "Line", "Note", "Open", "Ready", "Take", "Value", "Waiting", "Withdraw"]

_TELLING = 1.0
"""Seconds to tell the peer how it ended."""

_LONGEST_REASON = 500

T = TypeVar("T")


class Ready(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The end that receives is there, and wants `blocks` more; none while the group is not connected yet."""

    group: int
    blocks: int = 0


class Open(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The end that sends has its device's turn for `blocks` blocks, none to connect: its `number`-th try to."""

    group: int
    number: int
    blocks: int


class Take(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The end that receives has its device's turn as well."""

    group: int
    number: int


class Go(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """Both have: now."""

    group: int
    number: int


class Withdraw(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The end that sends has given its turn back, since the other one did not get its own for long."""

    group: int
    number: int


class Value(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """A value that the library wants the other end to know."""

    group: int
    key: str
    value: bytes


class Waiting(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """All is well, others have the device's turn."""


class Ended(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """This end will move nothing any more.

    Attributes:
        reason: Why.
        inside: It is inside HCCL, where it cannot be called back, and waits there for the other end to connect.
    """

    reason: str
    inside: bool = False


GroupNote = Ready | Open | Take | Go | Withdraw
Note = GroupNote | Value | Waiting | Ended
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Note).decode


class Line:
    """One end of the conversation. Somebody has to be listening whenever something is expected: see :meth:`during`.

    Args:
        signals: What carries it.
        value: Called with each :class:`Value`; False when it is not acceptable.
        heard: Called with what the peer says of a group; False when that makes no sense.
        waiting: Called with each :class:`Waiting`.
        lost: Called with the reason when the peer will move nothing any more, and with whether it is inside HCCL and
            waits there to be connected: once when it says farewell, once when the connection ends. Must not block.
    """

    def __init__(
        self,
        signals: Signals,
        value: Callable[[Value], bool],
        heard: Callable[[GroupNote], bool],
        waiting: Callable[[], object],
        lost: Callable[[str, bool], object],
    ) -> None:
        self._signals = signals
        self._value = value
        self._heard = heard
        self._waiting = waiting
        self._lost = lost
        self._listening = anyio.Lock()
        self._cut_off = False
        self.gone: str | None = None

    async def post(self, note: Note) -> None:
        """Tell the peer.

        Raises:
            PeerLost: It can't be told anything any more.
        """
        await self._signals.post(_encode(note))

    async def farewell(self, reason: str, *, inside: bool = False) -> None:
        """Tell the peer that this end is done; not more than a try. Shielded, bounded, never raises.

        Args:
            reason: Why.
            inside: See :class:`Ended`.
        """
        if not self._cut_off:  # also to a peer that said so itself: it may be inside HCCL and wait for us there
            with anyio.move_on_after(_TELLING, shield=True), suppress(PeerLost):
                await self.post(Ended(reason[:_LONGEST_REASON], inside))

    async def during(self, work: Callable[[], Awaitable[T]], *beside: Callable[[], Coroutine[Any, Any, None]]) -> T:
        """Do `work` while listening; whatever runs `beside` ends with it.

        Raises what `work` raises, as it is. `beside` may not raise.
        """
        outcome: list[T] = []
        failure: list[Exception] = []
        async with anyio.create_task_group() as tasks:
            for one in (self._listen, *beside):
                tasks.start_soon(one)
            try:
                outcome.append(await work())
            except Exception as error:  # noqa: BLE001 - raised below, outside of the group
                failure.append(error)
            tasks.cancel_scope.cancel()
        if failure:
            raise failure.pop()
        return outcome[0]

    async def _listen(self) -> None:
        # Also after the peer's farewell: both ends may be inside HCCL, where neither can be called back (see
        # `_Half.connect`), and the values by which they find each other still travel.
        while not self._cut_off:
            async with self._listening:  # a send and a receive may both be listening
                if not self._cut_off:
                    await self._hear()

    async def _hear(self) -> None:
        try:
            note = _decode(await self._signals.fetch())
        except PeerLost as error:
            self._cut(error.message)
            return
        except msgspec.DecodeError as error:
            self._cut(f"the peer's note about HCCL can't be read: {error}")
            return
        match note:
            case Waiting():
                self._waiting()
            case Ended(reason, inside):
                self._lose(f"the peer ended the channel: {reason[:_LONGEST_REASON]}", inside=inside)
            case Value():
                if not self._value(note):
                    self._cut("the peer sends values that no group of two needs")
            case _:
                if not self._heard(note):
                    self._cut(f"the peer says what makes no sense: {note}")

    def _cut(self, reason: str) -> None:
        self._cut_off = True
        self._lose(reason)

    def _lose(self, reason: str, *, inside: bool = False) -> None:
        self.gone = self.gone or reason
        self._lost(self.gone, inside)
