"""Which source to try next: order, pauses, redirects to relays, and failed relays. No I/O; the time is an argument."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from netloader.core.addresses import Address
from netloader.core.candidate import Candidate, Source
from netloader.core.choice import Here, other_name, preference

__all__ = ["MAX_KNOWN", "Source", "Sources"]

_PAUSE = (0.2, 5.0)
"""Seconds until a source that was not ready is tried again: first, and at most."""

_RELAY_PAUSE = 0.05
"""Seconds until a relay that was not ready is tried again: it waits only for the announcement of its own source."""

_RELAY_WAIT = 5.0
"""Seconds after which a relay that is still not ready is dropped."""

_PUT_OFF = 60.0
"""Seconds for which a source is waited for that delivered blocks and then sent this client away to serve others."""

_RELAYS_OF_RELAY = 4
"""Most relays that are taken from one relay; any number may be taken from a server that the search found."""

MAX_KNOWN = 4096
"""Most sources that one pull remembers, because a provider can find and servers can name any number of them."""


class Sources:
    """The sources of one pull.

    Sources are tried in the order given, those with less load before others, and relays that a server named before the
    servers themselves. Sources that are one of many come last, the nearest first, then the least busy.
    A source that answers "not ready" or cannot be reached is tried again after a growing pause, for the last time when
    the wait ends; if it is one of many, behind the others. A source that redirected this client to relays is tried
    again when none of those relays is left. The client then tells it which relays to avoid.

    Args:
        sources: In the order to try.
        tries: Sessions with one source that may fail after they delivered blocks.
        until: Time at which waiting for sources that are not ready ends.
        rng: Randomises pauses, so that clients that wait for one source don't all retry at once.
        max_hops: Most relays that may lead to a relay.
        here: Where this client runs.

    Attributes:
        follow: Whether redirections are followed; see :meth:`leave_relays`.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        tries: int,
        until: float,
        rng: random.Random,
        max_hops: int = 32,
        here: Here | None = None,
    ) -> None:
        self.follow = True
        self._here = here or Here()
        self._max_hops = max_hops
        self._tries = tries
        self._until = until
        self._rng = rng
        self._order = 0
        self._first_due: dict[bool, float] = {}  # by whether a block is pending; forgotten at every change
        self._instead: bool | None = None  # the same for `could_serve_instead`
        self._known: dict[Address, Candidate] = {}
        self._failed: dict[Address, None] = {}
        self._useless: dict[Address, None] = {}  # dropped, and still offered
        self._dead: dict[tuple[Address, str], None] = {}  # generations that were dropped, where they were
        self.add(sources)

    @property
    def avoid(self) -> tuple[Address, ...]:
        """Relays that failed in this pull, newest last."""
        return tuple(self._failed)

    @property
    def running(self) -> int:
        """Sources that are being pulled from."""
        return sum(c.running for c in self._known.values())

    @property
    def several(self) -> bool:
        """Whether more than one source is known that was not named by another one."""
        return sum(c.via is None for c in self._known.values()) > 1

    def add(self, sources: Iterable[Source]) -> int:
        """Add sources behind those that are known. Of a known source, only labels and load change.

        Another generation at a known address is another source. If a session runs with the earlier one, the new one
        is added when the earlier one is dropped.

        Returns:
            How many were left out, because :data:`MAX_KNOWN` are known.
        """
        self._changed()
        left_out = 0
        for source in sources:
            candidate = self._known.get(source.address)
            if (source.address, source.generation) in self._dead:
                continue
            if candidate is not None and "" not in (one := {source.generation, candidate.generation}) and len(one) > 1:
                if candidate.running:
                    candidate.follower = source
                    continue
                self._known.pop(source.address)
                candidate = None
            if candidate is None:
                # That its labels or its load changed does not make a source useful. Another generation may be.
                if not source.generation and source.address in self._useless:
                    continue
                if len(self._known) >= MAX_KNOWN:
                    left_out += 1
                    continue
                self._useless.pop(source.address, None)
                candidate = Candidate(self._tries, self._until, _PAUSE[0], self._next())
                # Under another name there is probably another model: no session with it beside those that work.
                candidate.last_resort = source.one_of_many and other_name(self._here, source.labels)
                self._known[source.address] = candidate
            candidate.lost, candidate.source = False, source
            candidate.preferred = self._preferred(source)
        return left_out

    def _preferred(self, source: Source) -> tuple[float, ...]:
        if not source.one_of_many:
            return 0, source.load
        name = source.generation or str(source.address)
        return 1, *preference(self._here, name, source.labels, source.load)

    def told_of(self, source: Address) -> tuple[Mapping[str, str], Address | None]:
        """Labels of a source that is known, and who named it: None when it was found."""
        candidate = self._known[source]
        return {} if candidate.source is None else candidate.source.labels, candidate.via

    def generation_of(self, source: Address) -> str:
        """The run of a server that a source is; empty if it is not known. If lost, it never returns."""
        candidate = self._known.get(source)
        return "" if candidate is None else candidate.generation

    def lose(self, source: Address) -> None:
        """A source is no longer offered: don't try it until it is added anew. A session that runs with it continues."""
        self._changed()
        self._useless.pop(source, None)
        candidate = self._known.get(source)
        if candidate is not None and candidate.running:
            candidate.lost, candidate.follower = True, None
        else:
            self._known.pop(source, None)

    def can_be_spared(self, source: Address) -> bool:
        """Whether `source` is a relay whose server is still known, and can name another relay or serve by itself."""
        candidate = self._known.get(source)
        return candidate is not None and candidate.via is not None and candidate.via in self._known

    @property
    def could_serve_instead(self) -> bool:
        """Whether there are relays, and a source that was not reached by redirection could be asked instead of them."""
        if self._instead is None:
            known = self._known.values()
            self._instead = any(c.via is not None for c in known) and any(
                c.via is None and not (c.running or c.resting or c.held) for c in known
            )
        return self._instead

    def leave_relays(self) -> None:
        """Follow no redirection from now on, and hold no source back for its relays.

        A relay that runs is dropped by :meth:`drop` when its session has ended.
        """
        self._changed()
        self.follow = False
        for source, candidate in list(self._known.items()):
            candidate.waits_for = frozenset()
            if candidate.via is not None and not candidate.running:
                self.drop(source)

    def hold(self, source: Address, now: float, *, until_unpinned: bool) -> None:
        """It holds other weights than a source that has delivered nothing yet: try it again when that one has failed.

        Args:
            source: The source.
            now: The time.
            until_unpinned: False if that has happened already.
        """
        self._changed()
        candidate = self._known[source]
        candidate.running, candidate.held, candidate.due = False, until_unpinned, now
        self._drop_lost(source)

    def try_held(self, now: float) -> None:
        """The source that decided what others have to hold has failed: try those again that hold something else."""
        self._changed()
        for candidate in self._known.values():
            if candidate.held:
                candidate.held, candidate.due = False, now

    def drop_held(self) -> None:
        """What sources have to hold is final now: drop those that hold something else."""
        self._changed()
        for source in [source for source, candidate in self._known.items() if candidate.held]:
            self.drop(source)

    def take(self, now: float, *, work: bool) -> Address | None:
        """Take the source to try now, and mark it as running. None when no source is due.

        Args:
            now: The time.
            work: Whether any block is pending.
        """
        if self._earliest(work=work) > now:
            return None
        due = (item for item in self._usable(work=work) if item[1].due <= now)
        source, candidate = min(due, key=lambda item: item[1].rank)
        self._changed()
        candidate.running, candidate.resting, candidate.last_resort = True, False, False
        candidate.waits_for = frozenset()
        return source

    def next_due(self, now: float, *, work: bool) -> float | None:
        """When :meth:`take` will next return a source, if no event comes before; None when it won't."""
        due = self._earliest(work=work)
        return None if due == math.inf else max(now, due)

    def _usable(self, *, work: bool) -> list[tuple[Address, Candidate]]:
        """Sources that may be taken once they are due."""
        alone = not self.running
        return [
            (source, c)
            for source, c in self._known.items()
            if not (c.running or c.held or (c.resting and not work) or (c.last_resort and not alone))
            and not self._held_back(c)
        ]

    def _earliest(self, *, work: bool) -> float:
        """When the first usable source is due. Kept until a change: a pull asks at each event, and many are known."""
        if work not in self._first_due:
            self._first_due[work] = min((c.due for _, c in self._usable(work=work)), default=math.inf)
        return self._first_due[work]

    def _changed(self) -> None:
        self._first_due.clear()
        self._instead = None

    def rest(self, source: Address, now: float, *, last: bool = False) -> None:
        """Its session ended because it had no block that was pending. It may be tried again while one is.

        Args:
            source: The source.
            now: The time.
            last: Try all other sources first, and this one after a pause: blocks are pending, and it had none of them.
        """
        self._changed()
        candidate = self._known[source]
        if last:
            candidate.late, candidate.due = self._next(), now + candidate.pause
            candidate.pause = min(candidate.pause * 2, _PAUSE[1])
        candidate.running, candidate.resting = False, True
        self._drop_lost(source)

    def demote(self, source: Address, now: float) -> None:
        """Its session was ended because others are faster. It is tried again once no other source is running."""
        self._changed()
        candidate = self._known[source]
        candidate.running, candidate.last_resort, candidate.due = False, True, now
        self._drop_lost(source)

    def again(self, source: Address, now: float, *, last: bool = False) -> None:
        """Its session failed after it delivered blocks: try it again at once, a limited number of times.

        Args:
            source: The source.
            now: The time.
            last: Try all other sources first.
        """
        self._changed()
        candidate = self._known[source]
        candidate.running = False
        if last:
            candidate.late = self._next()
        candidate.tries -= 1
        candidate.due = now
        if candidate.tries <= 0 or candidate.via is not None or candidate.lost:
            self.drop(source)

    def later(
        self,
        source: Address,
        now: float,
        at_least: float | None = None,
        *,
        put_off: bool = False,
        steady: bool = False,
    ) -> None:
        """It is not ready: try it again after a pause, until the wait ends.

        Args:
            source: The source.
            now: The time.
            at_least: Least pause in seconds, when the source asked for one.
            put_off: Whether it delivered blocks and then served others first: it is waited for anew, but not for long.
            steady: Whether the pause does not grow.
        """
        self._changed()
        candidate = self._known[source]
        candidate.running = False
        if candidate.via is None:
            self._release(source)
        if put_off and candidate.via is None:
            candidate.until = max(candidate.until, now + _PUT_OFF)
        if now >= candidate.until or candidate.lost:
            self.drop(source)
            return
        if candidate.source is not None and candidate.source.one_of_many:
            candidate.late = self._next()  # others of them may be ready at once
        pause = candidate.pause * self._rng.uniform(0.5, 1.5)
        if at_least is not None and candidate.via is None:
            pause = max(pause, at_least * self._rng.uniform(1.0, 1.25))
        candidate.due = min(now + pause, candidate.until)
        if not steady:
            candidate.pause = min(candidate.pause * 2, _PAUSE[1])

    def redirect(self, source: Address, relays: Sequence[Address], now: float) -> bool:
        """It redirected this client to relays.

        Args:
            source: The source.
            relays: The relays that it named.
            now: The time.

        Returns:
            Whether any relay is worth trying. If so, the source is held back until they are gone.
        """
        self._changed()
        candidate = self._known[source]
        usable = [r for r in relays if r != source and r not in self._failed and not self._waits_in_cycle(r, candidate)]
        candidate.waits_for = self._named(candidate, usable, source, now)
        if not candidate.waits_for:
            return False
        candidate.running = False
        candidate.due = now
        self._drop_lost(source)
        return True

    def gone(self, source: Address, others: Sequence[Address], now: float, at_least: float | None = None) -> None:
        """It stopped serving, and named the sources that it pulled from: try those now.

        Args:
            source: The source. A relay is dropped, because it may take long until it serves again.
            others: The sources that it named.
            now: The time.
            at_least: Least pause in seconds, when the source asked for one.
        """
        self._changed()
        candidate = self._known[source]
        via = candidate.via
        if via is None:
            self.later(source, now, at_least)
        else:
            self.drop(source)
        # A known source keeps its pause. Otherwise two sources that name each other would be tried in an endless loop.
        new = [r for r in others if r != source and r not in self._known and r not in self._failed]
        self._named(candidate, new, via or source, now)

    def _named(self, by: Candidate, relays: Sequence[Address], via: Address, now: float) -> frozenset[Address]:
        """Add the relays that a source named, within the bounds. Returns those that are known then."""
        if not self.follow or by.hops > self._max_hops:
            return frozenset()
        if by.via is not None:  # a relay has few clients, and this one needs one of them
            relays = relays[:_RELAYS_OF_RELAY]
        for relay in relays:
            if relay not in self._known and len(self._known) < MAX_KNOWN:
                self._known[relay] = Candidate(
                    *(self._tries, now + _RELAY_WAIT, _RELAY_PAUSE, -self._next()), via=via, hops=by.hops + 1, due=now
                )
        return frozenset(relay for relay in relays if relay in self._known)

    def drop(self, source: Address) -> None:
        """It is of no more use. If it is a relay, servers are told to name another one."""
        self._changed()
        candidate = self._forget(source)
        if candidate is None:
            return
        if candidate.via is not None:
            self._failed.pop(source, None)
            self._failed[source] = None
        elif not candidate.lost:
            _remember(self._useless, source)
        if candidate.generation:
            _remember(self._dead, (source, candidate.generation))

    def _forget(self, source: Address) -> Candidate | None:
        """Remove a source, and try the one that followed it at its address. Its generation may be added again."""
        candidate = self._known.pop(source, None)
        if candidate is not None and candidate.follower is not None:
            self.add([candidate.follower])
        return candidate

    def _drop_lost(self, source: Address) -> None:
        """A source that is no longer offered was of use until now. It may be offered again."""
        candidate = self._known[source]
        if candidate.lost and candidate.via is not None:
            self.drop(source)
        elif candidate.lost:
            self._forget(source)

    def _release(self, source: Address) -> None:
        """Hold nobody back for a source that was found, and was named too: it may be waited for long, and be dead."""
        for candidate in self._known.values():
            candidate.waits_for -= {source}

    def _held_back(self, candidate: Candidate) -> bool:
        """Whether one of the relays that it named is still known."""
        return any(r in self._known and not self._waits_in_cycle(r, candidate) for r in candidate.waits_for)

    def _waits_in_cycle(self, relay: Address, candidate: Candidate) -> bool:
        """Whether `relay` in turn waits for `candidate`: servers that name each other must not block each other."""
        seen: set[Address] = set()
        todo = [relay]
        while todo:
            name = todo.pop()
            if name in seen or name not in self._known:
                continue
            seen.add(name)
            if self._known[name] is candidate:
                return True
            todo.extend(self._known[name].waits_for)
        return False

    def _next(self) -> int:
        self._order += 1
        return self._order


_Name = TypeVar("_Name", Address, tuple[Address, str])


def _remember(names: dict[_Name, None], name: _Name) -> None:
    """Add a name, and forget the oldest one if there are too many."""
    names[name] = None
    if len(names) > MAX_KNOWN:
        del names[next(iter(names))]
