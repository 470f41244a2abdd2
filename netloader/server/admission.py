"""Admission control: a limited number of turns, a queue for them, and the pace at which a turn has to be used.

Time is an argument of every method, and nothing here waits except :meth:`Admission.wait`.

A turn is for a client that uses it. While others wait, a client that does not answer, or whose blocks stand still, is
put *aside*: its session goes on, but its turn passes to the next client. It has its turn back once it moves again. So a
client that is only slow to begin, or on a slow network, loses nothing, and a client that does nothing keeps nobody out.
As many clients may hold a channel while they are aside as there are turns. Only when all those are taken too, the
session that has been below the least rate for longest is ended with "busy".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import anyio

__all__ = ["LEAST_RATE", "Admission"]

LEAST_RATE = 256 << 10
"""Bytes per second, on average, that a client has to take while others wait. A turn that moves less is not in use."""

_ANSWER = 0.5
"""Seconds that a client may take to answer the announcement before its turn passes to a client that waits."""

_AHEAD = 2.0
"""Most seconds for which a client has a turn in advance: its blocks may stand still for so long."""

_ARREARS = 10.0
"""Seconds below the least rate after which a session may be ended, when there is no channel left for others."""


@dataclass(slots=True, eq=False)
class _Place:
    """One client: in the queue, with a turn, or aside.

    Attributes:
        number: Order of arrival.
        address: Where it comes from.
        given: Whether it had a turn at least once, so that its session knows what is held.
        turn: Whether it has a turn now.
        channel: Whether it holds a channel.
        until: The time up to which it has used its turn.
        calls: Running calls of the channel: when each has to end at the latest, at the least rate.
        excused: Whether it waits for this server.
        called: Set when it need not wait any more.
    """

    number: int
    address: str
    given: bool = False
    turn: bool = False
    channel: bool = False
    until: float = 0.0
    calls: list[float] = field(default_factory=list)
    excused: bool = False
    called: anyio.Event = field(default_factory=anyio.Event)


class Admission:
    """A limited number of turns, and a queue of limited length for them.

    All changes are synchronous, so a cancellation cannot lose a turn.

    Args:
        total: Turns that may be taken at once.
        queue: Clients that may wait for one.
        channels: Channels that may be held at once; by default twice as many as turns.
    """

    def __init__(self, total: int, queue: int, channels: int | None = None) -> None:
        self.total = total
        self._queue = queue
        self._channels = 2 * total if channels is None else channels
        self._places: dict[Hashable, _Place] = {}  # with a turn, or aside
        self._waiting: dict[Hashable, _Place] = {}
        self._count = 0
        self._newest = False

    @property
    def taken(self) -> int:
        """Turns that are taken."""
        return sum(place.turn for place in self._places.values())

    @property
    def waiting(self) -> int:
        """Clients that wait."""
        return len(self._waiting)

    @property
    def channels(self) -> int:
        """Channels that are held."""
        return sum(place.channel for place in self._places.values())

    def enter(self, client: Hashable, now: float, address: str = "") -> bool:
        """Give `client` a turn or a place in the queue; False when there is neither.

        The turns of clients that have not answered yet count as places: they may be free in a moment.
        """
        unanswered = sum(place.turn and not place.channel for place in self._places.values())
        self._count += 1
        place = _Place(self._count, address)
        if self.taken >= self.total and len(self._waiting) >= self._queue + (unanswered if self._queue else 0):
            return False
        self._waiting[client] = place
        self._fill(now)
        return True

    def has(self, client: Hashable) -> bool:
        """Whether `client` was given a turn; it may be aside now."""
        return client in self._places

    def queued(self, client: Hashable) -> bool:
        """Whether `client` waits."""
        return client in self._waiting

    def aside(self, client: Hashable) -> bool:
        """Whether `client` was given a turn and has none now."""
        place = self._places.get(client)
        return place is not None and not place.turn

    def in_use(self, client: Hashable, now: float) -> bool:
        """Whether `client` has a turn or a channel and uses it: it was given it just now, or its blocks move."""
        place = self._places.get(client)
        return place is not None and place.until >= now

    def moves(self, client: Hashable, now: float) -> bool:
        """Whether `client` answered, or still may, and is not far below the least rate: others can depend on it."""
        place = self._places.get(client)
        return place is not None and place.until + (_ARREARS if place.channel else 0.0) >= now

    def holds_channel(self, client: Hashable) -> bool:
        """Whether `client` holds a channel."""
        place = self._places.get(client)
        return place is not None and place.channel

    def before(self, client: Hashable) -> int:
        """Number of clients ahead of `client` in the queue; 0 when it does not wait."""
        place = self._waiting.get(client)
        return 0 if place is None else sum(other.number < place.number for other in self._waiting.values())

    async def wait(self, client: Hashable) -> None:
        """Wait until `client`, which has entered, has a turn."""
        place = self._waiting.get(client)
        if place is not None:
            await place.called.wait()

    def take_channel(self, client: Hashable, now: float) -> bool:
        """`client` answered the announcement: give it a channel, and its turn if it is aside.

        Returns:
            Whether it has a channel; False when it waits in the queue for one, or has left.
        """
        place = self._places.get(client)
        if place is None:
            return False
        if self.channels < self._channels:
            place.channel = True
            place.turn = place.turn or self._room_to_return
            place.until = now + _AHEAD
            return True
        del self._places[client]
        place.turn, place.called = False, anyio.Event()
        self._waiting[client] = place
        self._fill(now)
        return self.holds_channel(client)

    def answer_takes(self, client: Hashable, nbytes: int) -> None:
        """The client is sent an announcement of `nbytes`: it may answer so much later."""
        place = self._places.get(client)
        if place is not None:
            place.until += nbytes / LEAST_RATE

    def call_began(self, client: Hashable, nbytes: int, now: float) -> None:
        """A call of the client's channel sends `nbytes`."""
        place = self._places.get(client)
        if place is not None:
            place.calls.append(now + max(_ARREARS, nbytes / LEAST_RATE))

    def call_ended(self, client: Hashable, nbytes: int, now: float) -> None:
        """The client's oldest running call sent its `nbytes`. A client that is aside may get its turn back by that."""
        place = self._places.get(client)
        if place is not None:
            if place.calls:
                place.calls.pop(0)
            place.until = min(place.until + nbytes / LEAST_RATE, now + _AHEAD)
            place.turn = place.turn or (place.until >= now and self._room_to_return)

    @property
    def _room_to_return(self) -> bool:
        """Whether a client that was put aside may have its turn back, besides those to whom turns were passed on."""
        return self.taken < 2 * self.total

    def excuse(self, client: Hashable, now: float, *, excused: bool) -> None:
        """The client waits for this server (`excused`), or no longer does."""
        place = self._places.get(client)
        if place is not None and place.excused is not excused:
            place.excused = excused
            place.until = max(place.until, now + _AHEAD)

    def leave(self, client: Hashable, now: float) -> None:
        """Remove `client` from the turns or the queue. A turn that becomes free goes to the next client. Idempotent."""
        self._waiting.pop(client, None)
        place = self._places.pop(client, None)
        if place is not None:
            self._fill(now, used=place.until >= now)

    def pass_on(self, now: float) -> list[Hashable]:
        """Put clients aside whose turn is not in use, while others wait, and give the turns to those.

        Returns:
            The clients that were put aside.
        """
        put = []
        for client, place in sorted(self._places.items(), key=lambda item: item[1].until):
            if not self._waiting:
                break
            if place.turn and place.until < now:
                place.turn = False
                put.append(client)
                self._fill(now, used=False)
        return put

    def overdue(self, now: float) -> Hashable | None:
        """The client whose session has to end so that another one gets a channel; None when none has to."""
        if not self._waiting or self.channels < self._channels:
            return None
        late = [
            (place.until, place.number, client)
            for client, place in self._places.items()
            if place.channel
            and not place.excused
            and now - place.until > _ARREARS
            and (not place.calls or place.calls[0] < now)
        ]
        return min(late, key=lambda one: one[:2])[2] if late else None

    def _give(self, client: Hashable, place: _Place, now: float) -> None:
        if place.given and self.channels < self._channels:
            place.channel = True
        place.given = place.turn = True
        place.until = now + (_AHEAD if place.channel else _ANSWER)
        self._places[client] = place

    def _call(self, client: Hashable, now: float) -> None:
        place = self._waiting.pop(client)
        self._give(client, place, now)
        place.called.set()

    def _fill(self, now: float, *, used: bool = True) -> None:
        """Give the turns that are free to clients that wait.

        A turn that was in use goes to the client that has waited longest. Clients that do nothing may have come in
        large numbers. So turns that were not `used` go alternately to the newest client and to the oldest one, and
        neither waits for all the others.
        """
        while self._waiting and self.taken < self.total:
            full = self.channels >= self._channels  # then nobody can go on who needs a channel at once
            able = [client for client, place in self._waiting.items() if not (full and place.given)]
            if not able:
                return
            self._newest = not (used or self._newest)
            self._call(self._newest_of(able) if self._newest else self._oldest_of(able), now)

    def _oldest_of(self, able: Iterable[Hashable]) -> Hashable:
        return min(able, key=lambda client: self._waiting[client].number)

    def _newest_of(self, able: Iterable[Hashable]) -> Hashable:
        """The newest client of the address that has the fewest clients here."""
        of_each = Counter(place.address for place in (*self._waiting.values(), *self._places.values()))

        def order(client: Hashable) -> tuple[int, int]:
            place = self._waiting[client]
            return of_each[place.address], -place.number

        return min(able, key=order)
