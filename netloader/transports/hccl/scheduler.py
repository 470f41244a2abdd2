"""The scheduler of an HCCL group: blocks move only while both ends have their devices' turns.

The sender takes its device's turn first, and only for blocks that it has. The receiver takes its turn when it is told
so. Therefore no end holds a turn while it waits for blocks that its peer does not have yet: a relay's turn is free for
its own clients until its source is about to send. Chains of relays are finite, so every wait for a turn ends. If
devices send in a cycle all the same, an end that waits too long gives its turn back and asks again, so there is no
deadlock.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import anyio

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.hccl.messages import Go, GroupMessage, HcclMessage, Open, Ready, Take, Withdraw

__all__ = ["Scheduler", "Turn"]

_PATIENCE = (0.2, 0.3)
"""How long a turn is held while the peer waits for its own, in stall times. The time is random, so that one of two ends
that wait for each other gives its turn back first."""


class Turn(Protocol):
    """The turn of this end's device."""

    async def take(self) -> None:
        """Wait for the turn. It may be held even if this raises or is cancelled."""
        ...

    def give(self) -> None:
        """Give the turn back. Idempotent."""
        ...

    def check_pace(self) -> None:
        """Check the peer's rate.

        Raises:
            TransferTimeout: The peer is too slow.
        """
        ...


class Scheduler:
    """One end of a group.

    It belongs to one event loop. While a method waits, another task has to receive messages and call
    :meth:`handle_message`.

    Args:
        group: Number of the group.
        post: Sends a message to the peer.
        turn: The turn of this side's device.
        stall: Seconds without a message from the peer after which it is given up.
    """

    def __init__(self, group: int, post: Callable[[HcclMessage], Awaitable[None]], turn: Turn, stall: float) -> None:
        self._group = group
        self._post = post
        self._turn = turn
        self._stall = stall
        self._changed = anyio.Event()
        self._gone: str | None = None
        # State of the peer, when this end sends:
        self._ready = False
        self._wanted = 0
        self._number = 0
        self._taken = 0
        # State of the peer, when this end receives:
        self._open: Open | None = None
        self._go = 0
        self._signs = 0

    # --- messages ---------------------------------------------------------------------------------------------------

    def handle_message(self, note: GroupMessage) -> bool:
        """Handle a message of the peer. Returns False when it is invalid."""
        match note:
            case Ready(_, blocks):
                if blocks < 0:
                    return False
                self._ready = True
                self._wanted += blocks
            case Open(_, number, blocks):
                if number <= self._go or blocks < 0:
                    return False
                self._open = note
                self._signs += 1
            case Take(_, number):
                self._taken = number
            case Go(_, number):
                if self._open is None or number != self._open.number:
                    return False
                self._go = number
            case Withdraw(_, number):
                if self._open is not None and number == self._open.number and number != self._go:
                    self._open = None
                self._signs += 1
        self._wake()
        return True

    def alive(self) -> None:
        """The peer reported that it waits for its turn."""
        self._signs += 1
        self._wake()

    def lose(self, reason: str) -> None:
        """The group has failed: end every wait."""
        self._gone = self._gone or reason
        self._wake()

    # --- sending ----------------------------------------------------------------------------------------------------

    async def open(self, most: int, *, connecting: bool = False) -> int:
        """Get both turns, for as many of the next blocks as both ends can move now. :meth:`go` has to follow.

        This side's turn may be held even if this raises.

        Args:
            most: Number of blocks that this end could send, at least 1; 0 to connect.
            connecting: Whether this is for the first operation, for which the peer has to be ready but wants no blocks.

        Returns:
            The number of blocks.

        Raises:
            PeerLost: The peer is gone, or this end was closed.
            TransferTimeout: The peer wants no blocks, or does not get its own turn and sends no message.
        """
        if connecting:
            await self._until(lambda: self._ready, None)
        elif not await self._until(lambda: self._wanted > 0, self._stall):
            # Messages that the peer waits for its turn do not count here, because it has not asked for blocks yet.
            raise self._too_long("the peer takes no bytes")
        waited, signs = 0.0, self._signs
        while True:
            await self._turn.take()
            blocks = min(most, self._wanted)
            self._number += 1
            await self._post(Open(self._group, self._number, blocks))
            began, patience = anyio.current_time(), self._stall * random.uniform(*_PATIENCE)  # noqa: S311 - no secret
            if await self._until(lambda: self._taken == self._number, patience):
                self._wanted -= blocks
                return blocks
            self._turn.give()
            await self._post(Withdraw(self._group, self._number))
            self._turn.check_pace()
            waited += anyio.current_time() - began
            if self._signs != signs:
                waited, signs = 0.0, self._signs
            if not connecting and waited >= self._stall:
                raise self._too_long("the peer takes no bytes")

    async def go(self) -> None:
        """Tell the peer that the transfer begins now."""
        await self._post(Go(self._group, self._number))

    # --- receiving --------------------------------------------------------------------------------------------------

    async def want(self, blocks: int) -> None:
        """Tell the peer how many more blocks this end can receive; 0 says only that it is ready."""
        await self._post(Ready(self._group, blocks))

    async def take(self, most: int, *, connecting: bool = False) -> int:
        """Wait until the peer has its turn, take this side's turn, and wait for the peer's "go".

        This side's turn may be held even if this raises.

        Args:
            most: Number of blocks that this end still wants.
            connecting: Whether this is for the first operation, which is limited by the set-up's timeout.

        Returns:
            The number of blocks that come now.

        Raises:
            PeerLost: The peer is gone, or this end was closed.
            TransferTimeout: The peer sends neither blocks nor messages.
            TransportError: The peer wants to send more blocks than this end wants.
        """
        limit = None if connecting else self._stall
        while True:
            await self._sign(lambda: self._open is not None, limit)
            await self._turn.take()
            while (note := self._open) is not None:
                if note.blocks > most or (most and not note.blocks):
                    raise TransportError(f"the peer is about to send {note.blocks} blocks where {most} are wanted")
                await self._post(Take(self._group, note.number))
                await self._sign(partial(self._settled, note), limit)
                if self._open is note:
                    self._open = None
                    return note.blocks
            self._turn.give()  # the peer has given its own turn back meanwhile

    async def _sign(self, there: Callable[[], bool], limit: float | None) -> None:
        """Wait until `there` is true, for at most `limit` seconds after the peer's last message."""
        while not there():
            if not await self._until(partial(self._news, there, self._signs), limit):
                raise self._too_long("the peer sends no bytes")

    def _settled(self, note: Open) -> bool:
        return self._open is not note or self._go == note.number

    def _news(self, there: Callable[[], bool], signs: int) -> bool:
        return there() or self._signs != signs

    # --- parts ------------------------------------------------------------------------------------------------------

    async def _until(self, there: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until `there` is true, for at most `seconds`. Returns whether it is."""
        with anyio.move_on_after(seconds):
            while not there():
                if self._gone is not None:
                    raise PeerLost(self._gone)
                await self._changed.wait()
        return there()

    def _too_long(self, what: str) -> TransferTimeout:
        return TransferTimeout(f"{what} for {self._stall:.3g} s", hint="check that the peer is still running")

    def _wake(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
