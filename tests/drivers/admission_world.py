"""A simulated server and its clients: the rules of admission in seconds of simulated time, without I/O."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum

from netloader.server.admission import Admission

STEP = 0.1
BLOCK = 4 << 20
AGAIN = 1.0


class Kind(Enum):
    """What a client does."""

    HONEST = "answers, and takes its blocks"
    SILENT = "identifies itself, and nothing more"
    HALF = "answers, and takes no block"
    SLOW = "takes 8 kB/s"


@dataclass(eq=False)
class Client:
    kind: Kind
    came: float
    answers_after: float = 0.0
    rate: float = 8000.0
    left: float = 1 << 40
    began: float | None = None
    inside: bool = False
    due: float = 0.0
    turn_at: float | None = None
    block: float = 0.0
    verified: int = 0
    turned_away: int = 0


@dataclass
class World:
    """Steps of 0.1 s. Every client that is turned away comes back after a second, with the blocks that it has."""

    seed: int
    turns: int
    queue: int
    now: float = 0.0
    clients: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(self.turns, self.queue)
        self._rng = random.Random(self.seed)

    def add_strangers(self, kind: Kind, count: int) -> None:
        self.clients += [Client(kind, self.now) for _ in range(count)]

    def add_honest(self, *, answers_after: float, rate: float, nbytes: int) -> Client:
        client = Client(Kind.HONEST, self.now, answers_after, rate, float(nbytes))
        self.clients.append(client)
        return client

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self._step()

    def run_until_honest_are_done(self, within: float) -> None:
        until = self.now + within
        while any(client.kind is Kind.HONEST and client.left > 0 for client in self.clients):
            assert self.now < until, [client for client in self.clients if client.kind is Kind.HONEST]
            self._step()

    def _step(self) -> None:
        self.now += STEP
        order = [client for client in self.clients if client.left > 0]
        self._rng.shuffle(order)
        for client in order:
            self._act(client)
        if self.admission.waiting:
            self.admission.pass_on(self.now)
            late = self.admission.overdue(self.now)
            if isinstance(late, Client):
                late.turned_away += 1
                self._leave(late)

    def _leave(self, client: Client) -> None:
        self.admission.leave(client, self.now)
        client.inside, client.turn_at, client.due, client.block = False, None, self.now + AGAIN, 0.0

    def _act(self, client: Client) -> None:
        turns, now = self.admission, self.now
        if not client.inside:
            if now >= client.due:
                client.inside = turns.enter(client, now)
                client.due = now + AGAIN
            return
        if turns.queued(client) and client.turn_at is None:
            return
        if client.turn_at is None:
            client.turn_at = now
        if client.kind is Kind.SILENT or now - client.turn_at < client.answers_after:
            return
        if not turns.holds_channel(client) and (turns.queued(client) or not turns.take_channel(client, now)):
            return
        if client.kind is Kind.HALF:
            return
        if not client.block:
            turns.call_began(client, BLOCK, now)
        if client.began is None:
            client.began = now
        client.block += client.rate * STEP
        while client.block >= BLOCK and client.left > 0:
            turns.call_ended(client, BLOCK, now)
            client.block -= BLOCK
            client.left -= BLOCK
            if client.block:
                turns.call_began(client, BLOCK, now)
        if client.left <= 0:
            turns.leave(client, now)
