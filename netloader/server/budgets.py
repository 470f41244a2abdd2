"""What peers may hold at a server: limits of connections by stage, and who has to go when one is reached.

Pure: no I/O and no clock. The server carries out what this module decides.

The rules:

* A connection whose client has not identified itself goes before one whose client has. Among equals the oldest goes.
* Of those, silent ones and ones that have said something share the places: the oldest goes of the kind that has more.
* An address is no reason to refuse anybody: a whole fleet may come from one. It only decides the order. The address
  with the most connections of a kind loses its oldest one first.
* A client that waits in the queue, or that is being served, never has to go because others connect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from netloader.core.options import ServeOptions

__all__ = ["Connections", "Limits", "Stage", "limits_for"]

_CHANNEL_DESCRIPTORS = 8
"""Descriptors that one channel may need: its listener, its lanes, and the shared memory of other transports."""

_LEAST_CONNECTIONS = 4

_PROBES = 64
"""Clients that were told what is held, and have not ended their session yet."""

_NEWCOMERS = 4
"""Connections of clients that have not identified themselves are always allowed one part in this many of all."""


class Stage(Enum):
    """What a connection is for. The values name it in messages."""

    SILENT = "have said nothing"
    STRANGER = "have not identified themselves"
    PROBE = "have asked what is held"
    QUEUED = "wait for their turn"
    ASIDE = "had a turn and did not use it"
    SERVED = "are being served"
    ENDING = "are being closed"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many of each kind a server allows.

    Attributes:
        connections: Connections, all together.
        strangers: Connections of clients that have not identified themselves.
        queue: Clients that wait for a turn, and clients that had one and did not use it.
        probes: Clients that asked what is held and have not ended their session.
        turns: Clients that are served at once.
        channels: Channels that are open or being opened. More than turns, because a channel that stands still keeps no
            turn.
    """

    connections: int
    strangers: int
    queue: int
    probes: int
    turns: int
    channels: int


def limits_for(options: ServeOptions, descriptors: int) -> Limits:
    """The limits of a server in a process that may have `descriptors` files open.

    At least half of the descriptors stay free for what else runs in the process, such as an engine. With few
    descriptors all limits become smaller.
    """
    ours = descriptors // 2
    channels = min(2 * options.max_clients, max(1, ours // 2 // _CHANNEL_DESCRIPTORS))
    turns = min(options.max_clients, channels)
    wanted = options.max_strangers + options.max_queue + _PROBES + channels
    connections = min(wanted, max(_LEAST_CONNECTIONS, ours - channels * _CHANNEL_DESCRIPTORS))

    def part(limit: int, least: int) -> int:
        return min(limit, max(least, limit * (connections - channels) // (wanted - channels)))

    return Limits(
        connections=connections,
        strangers=part(options.max_strangers, 1),
        queue=part(options.max_queue, 0),
        probes=part(_PROBES, 1),
        turns=turns,
        channels=channels,
    )


class _Entry(NamedTuple):
    address: str
    stage: Stage


class Connections:
    """The accounts of a server's connections.

    Args:
        limits: The limits.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[Hashable, _Entry] = {}
        # By stage and address, the oldest in its stage first. The numbers say which of two is older.
        self._order: dict[Stage, dict[str, dict[Hashable, int]]] = {stage: {} for stage in Stage}
        self._count: Counter[Stage] = Counter()
        self._entered = 0

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, stage: Stage) -> int:
        """Connections of a stage."""
        return self._count[stage]

    def enter(self, connection: Hashable, address: str, stage: Stage = Stage.STRANGER) -> None:
        """Add a new connection."""
        self._entered += 1
        self._entries[connection] = _Entry(address, stage)
        self._order[stage].setdefault(address, {})[connection] = self._entered
        self._count[stage] += 1

    def move(self, connection: Hashable, stage: Stage) -> None:
        """A connection is for something else now. Does nothing for one that has left, or is being closed."""
        entry = self._entries.get(connection)
        if entry is None or entry.stage in (stage, Stage.ENDING):
            return
        self.leave(connection)
        self.enter(connection, entry.address, stage)

    def leave(self, connection: Hashable) -> None:
        """Remove a connection. Idempotent."""
        entry = self._entries.pop(connection, None)
        if entry is None:
            return
        self._count[entry.stage] -= 1
        of_stage = self._order[entry.stage]
        del of_stage[entry.address][connection]
        if not of_stage[entry.address]:
            del of_stage[entry.address]

    def surplus(self) -> Hashable | None:
        """The connection that has to be closed now, because a limit is passed; None if none has to.

        Move it to ENDING, and ask again.
        """
        limits, count = self._limits, self._count
        unknown = count[Stage.SILENT] + count[Stage.STRANGER]
        newcomer = Stage.SILENT if count[Stage.SILENT] >= count[Stage.STRANGER] else Stage.STRANGER
        if unknown > limits.strangers:
            return self._first_to_go(newcomer)
        for stage, most in ((Stage.PROBE, limits.probes), (Stage.ASIDE, limits.queue)):
            if count[stage] > most:
                return self._first_to_go(stage)
        if len(self._entries) - count[Stage.ENDING] <= limits.connections:
            return None
        order = [Stage.PROBE, Stage.ASIDE, newcomer]
        if unknown > limits.connections // _NEWCOMERS:
            order.insert(0, newcomer)
        return next((self._first_to_go(stage) for stage in order if count[stage]), None)

    def _first_to_go(self, stage: Stage) -> Hashable:
        """Of the connections of a stage, the oldest one of the address that has most of them."""
        of_each = self._order[stage].values()
        most = max(map(len, of_each))
        oldest = (next(iter(mine.items())) for mine in of_each if len(mine) == most)
        return min(oldest, key=lambda item: item[1])[0]
