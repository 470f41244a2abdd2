"""The messages that the two ends of an HCCL channel exchange over the control connection.

HCCL does not report that a peer is gone, and waits until its own timeout. The control connection detects it at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import msgspec

from netloader.errors import PeerLost
from netloader.transports.base import Signals

__all__ = [
    "Ended",
    "Go",
    "GroupMessage",
    "HcclMessage",
    "Messenger",
    "Open",
    "Ready",
    "Take",
    "Value",
    "Waiting",
    "Withdraw",
]

_TELLING = 1.0
"""Seconds to send the peer the reason why this end ended."""

_LONGEST_REASON = 500

T = TypeVar("T")


class Ready(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The receiving end is ready, and wants `blocks` more blocks; 0 while the group is not connected."""

    group: int
    blocks: int = 0


class Open(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The sending end has its device's turn, to send `blocks` or to connect (0). `number` counts the attempts."""

    group: int
    number: int
    blocks: int


class Take(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The receiving end has its device's turn too."""

    group: int
    number: int


class Go(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """Both ends have their turns: the transfer begins now."""

    group: int
    number: int


class Withdraw(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """The sending end has given its turn back, because the receiving end did not get its own turn for too long."""

    group: int
    number: int


class Value(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """A key and value that torch_npu stores for the other end."""

    group: int
    key: str
    value: bytes


class Waiting(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """This end is alive, and waits for its device's turn."""


class Ended(msgspec.Struct, frozen=True, tag=True, tag_field="is"):
    """This end has ended, and moves nothing more.

    Attributes:
        reason: Why.
        inside: Whether it is in HCCL's connect call, which can't be cancelled, and waits there for the other end.
    """

    reason: str
    inside: bool = False


GroupMessage = Ready | Open | Take | Go | Withdraw
HcclMessage = GroupMessage | Value | Waiting | Ended
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(HcclMessage).decode


class Messenger:
    """Sends and receives the messages of one end. Messages are received only in :meth:`run_while_listening`.

    Args:
        signals: The connection to the peer's transport.
        value: Called with each :class:`Value`; returns False when it is not acceptable.
        heard: Called with each :data:`GroupMessage`; returns False when it is invalid.
        waiting: Called with each :class:`Waiting`.
        lost: Called with the reason when the peer has ended, and with whether it is in HCCL's connect call: once when
            it sends :class:`Ended`, once when the connection ends. Must not block.
    """

    def __init__(
        self,
        signals: Signals,
        value: Callable[[Value], bool],
        heard: Callable[[GroupMessage], bool],
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

    async def post(self, note: HcclMessage) -> None:
        """Send a message to the peer.

        Raises:
            PeerLost: The connection to the peer has ended.
        """
        await self._signals.post(_encode(note))

    async def send_ended(self, reason: str, *, inside: bool = False) -> None:
        """Try to tell the peer that this end has ended. Shielded from cancellation, bounded in time, and never raises.

        Args:
            reason: Why.
            inside: See :class:`Ended`.
        """
        if not self._cut_off:  # also after the peer's own Ended: it may wait for this end in HCCL's connect call
            with anyio.move_on_after(_TELLING, shield=True), suppress(PeerLost):
                await self.post(Ended(reason[:_LONGEST_REASON], inside))

    async def run_while_listening(
        self, work: Callable[[], Awaitable[T]], *beside: Callable[[], Coroutine[Any, Any, None]]
    ) -> T:
        """Run `work` while receiving messages. The tasks in `beside` run along, and are cancelled when `work` ends.

        Raises what `work` raises. `beside` must not raise.
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
        # Continue after the peer's Ended: both ends may be in HCCL's connect call, which can't be cancelled (see
        # `_GroupEnd.connect`) and still needs values from the other end.
        while not self._cut_off:
            async with self._listening:  # a send and a receive may run at the same time
                if not self._cut_off:
                    await self._hear()

    async def _hear(self) -> None:
        try:
            note = _decode(await self._signals.fetch())
        except PeerLost as error:
            self._cut(error.message)
            return
        except msgspec.DecodeError as error:
            self._cut(f"the peer's message about HCCL can't be read: {error}")
            return
        match note:
            case Waiting():
                self._waiting()
            case Ended(reason, inside):
                self._lose(f"the peer ended the channel: {reason[:_LONGEST_REASON]}", inside=inside)
            case Value():
                if not self._value(note):
                    self._cut("the peer sent a value that no group of two needs")
            case _:
                if not self._heard(note):
                    self._cut(f"the peer sent an invalid message: {note}")

    def _cut(self, reason: str) -> None:
        self._cut_off = True
        self._lose(reason)

    def _lose(self, reason: str, *, inside: bool = False) -> None:
        self.gone = self.gone or reason
        self._lost(self.gone, inside)
