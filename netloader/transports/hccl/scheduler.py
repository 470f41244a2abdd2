"""How the two ends of an HCCL group agree when something moves: once both have their device's turn, and only then.

Who sends takes its device's turn first, and only for blocks that it has; who receives takes its own when it hears so.
So nobody holds a turn while it waits for blocks that its peer does not have yet: a relay's turn is free for its own
clients until its parent is about to send. Chains of relays end somewhere, so does every wait for a turn; where devices
send in a circle nevertheless, who waits too long gives its turn back and asks again.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import anyio

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.hccl.messages import Go, GroupNote, Note, Open, Ready, Take, Withdraw

__all__ = ["Scheduler", "Turn"]

_PATIENCE = (0.2, 0.3)
"""How long a turn is held for a peer that waits for its own, in stall times. By chance, so that of two ends that hold
their turns for each other one is the first to give way."""


class Turn(Protocol):
    """The turn of this end's device."""

    async def take(self) -> None:
        """Wait for it; it may be held already when this raises or is cancelled."""
        ...

    def give(self) -> None:
        """Let others have it. Idempotent."""
        ...

    def check_pace(self) -> None:
        """See whether the peer is worth more waiting.

        Raises:
            TransferTimeout: It is too slow.
        """
        ...


class Scheduler:
    """One end of a group.

    Belongs to one event loop. Whatever is awaited here needs somebody who listens to the peer and calls :meth:`heard`.

    Args:
        group: Number of the group.
        post: Tells the peer.
        turn: The turn of our device.
        stall: Seconds without a sign of life of the peer after which it is given up.
    """

    def __init__(self, group: int, post: Callable[[Note], Awaitable[None]], turn: Turn, stall: float) -> None:
        self._group = group
        self._post = post
        self._turn = turn
        self._stall = stall
        self._changed = anyio.Event()
        self._gone: str | None = None
        # Of the peer's, where we send:
        self._ready = False
        self._wanted = 0
        self._number = 0
        self._taken = 0
        # And where we receive:
        self._open: Open | None = None
        self._go = 0
        self._signs = 0

    # --- what is heard ----------------------------------------------------------------------------------------------

    def heard(self, note: GroupNote) -> bool:
        """Take a note of the peer; False when it makes no sense."""
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
        """The peer says that it waits for its turn."""
        self._signs += 1
        self._wake()

    def lose(self, reason: str) -> None:
        """Nothing moves any more: end every wait."""
        self._gone = self._gone or reason
        self._wake()

    # --- who sends --------------------------------------------------------------------------------------------------

    async def open(self, most: int, *, connecting: bool = False) -> int:
        """Get both turns, for as many of the next blocks as both ends can move now; :meth:`go` has to follow.

        Our turn may be held when this raises.

        Args:
            most: Blocks that we could send, one at least; 0 to connect.
            connecting: Whether this is for the first operation: the peer has to be there, but wants no blocks.

        Returns:
            How many blocks.

        Raises:
            PeerLost: The peer is gone, or this end was closed.
            TransferTimeout: The peer does not want them, or does not get its own turn and does not say why.
        """
        if connecting:
            await self._until(lambda: self._ready, None)
        elif not await self._until(lambda: self._wanted > 0, self._stall):
            # Signs of life do not count here: who wants blocks says so, who wants none has no turn to wait for.
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
        """Tell the peer that it happens now."""
        await self._post(Go(self._group, self._number))

    # --- who receives -----------------------------------------------------------------------------------------------

    async def want(self, blocks: int) -> None:
        """Tell the peer for how many more blocks there is room; 0: that this end is there."""
        await self._post(Ready(self._group, blocks))

    async def take(self, most: int, *, connecting: bool = False) -> int:
        """Wait until the peer has its turn, get ours, and wait for its "go".

        Our turn may be held when this raises.

        Args:
            most: Blocks that we still want.
            connecting: Whether this is for the first operation; the time for setting up is the limit then.

        Returns:
            How many blocks come now.

        Raises:
            PeerLost: The peer is gone, or this end was closed.
            TransferTimeout: It sends nothing and does not say why.
            TransportError: It wants to send more than we want.
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
            self._turn.give()  # it has given its own back meanwhile

    async def _sign(self, there: Callable[[], bool], limit: float | None) -> None:
        """Wait until `there`, for `limit` seconds after the last sign of life."""
        while not there():
            if not await self._until(partial(self._news, there, self._signs), limit):
                raise self._too_long("the peer sends no bytes")

    def _settled(self, note: Open) -> bool:
        return self._open is not note or self._go == note.number

    def _news(self, there: Callable[[], bool], signs: int) -> bool:
        return there() or self._signs != signs

    # --- parts ------------------------------------------------------------------------------------------------------

    async def _until(self, there: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until something is so, for some seconds at most; whether it is."""
        with anyio.move_on_after(seconds):
            while not there():
                if self._gone is not None:
                    raise PeerLost(self._gone)
                await self._changed.wait()
        return there()

    def _too_long(self, what: str) -> TransferTimeout:
        return TransferTimeout(f"{what} for {self._stall:.3g} s", hint="is the peer still alive?")

    def _wake(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
