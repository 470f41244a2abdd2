"""Makes known what a server serves, in the registries that it was given, until it does not serve it any more.

Nothing of the server waits for a registry, and no fault of one ends anything here.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import msgspec
from anyio.abc import TaskGroup

from netloader.core.addresses import Address
from netloader.core.choice import NAME, Here
from netloader.core.entries import Entry, Load
from netloader.core.identity import Role, name_of
from netloader.core.model_key import key_of, rank_of
from netloader.core.texts import one_line
from netloader.discovery.base import Publisher
from netloader.discovery.place import labels_of
from netloader.errors import DiscoveryError
from netloader.observe.events import Event, ServingStarted, ServingStopped
from netloader.server.catalog import Holdings
from netloader.session.holding import Holding
from netloader.session.relay_progress import Supply

__all__ = ["Publishing", "Traffic"]

_log = logging.getLogger("netloader")

UPDATE_EVERY = 2.0
"""Least seconds between two updates of an entry. A registry has to take those of all servers."""

_RATE_STEP = 0.25
"""Least change of the rate that is published, in relation to the last one: it never stands quite still."""

_PAUSE = (2.0, 60.0)
"""Seconds until a publisher that raised is tried again: first, and at most."""

_NAME_LENGTH = 200

Slot = tuple[str, Role]
"""Key and role: a registry holds one entry of a server for each."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a server does now.

    Attributes:
        clients: Clients that it serves.
        waiting: Clients that wait for a turn.
        nbytes: Bytes that it has sent since it began.
        cap: Most clients that it serves at once.
    """

    clients: int
    waiting: int
    nbytes: int
    cap: int


@dataclass(eq=False, slots=True)
class _Shown:
    """One holding that is served, and made known under a generation of its own."""

    holding: Holding
    supply: Supply | None
    generation: str = field(default_factory=lambda: secrets.token_hex(8))
    tried: bool = False  # the registry has accepted it, or the first attempt has failed


class Publishing:
    """Publishes the holdings of one server.

    Args:
        publisher: Of the registries.
        holdings: The catalog of the server.
        here: Where the server runs.
        rank: The rank that it serves, as its engine numbers it; None without an engine.
        address: The address at which clients reach it.
        traffic: What it does now.
    """

    def __init__(
        self,
        publisher: Publisher,
        holdings: Holdings,
        here: Here,
        *,
        rank: int | None,
        address: Callable[[], Address],
        traffic: Callable[[], Traffic],
    ) -> None:
        self._publisher = publisher
        self._holdings = holdings
        self._labels = labels_of(here)
        self._rank = rank
        self._address = address
        self._traffic = traffic
        self._shown: dict[Slot, _Shown] = {}
        self._kept: set[Slot] = set()
        self._changed = anyio.Event()
        self._stopped = False
        self._sent = (time.monotonic(), 0)
        self._rate = 0.0

    def note(self, event: Event) -> None:
        """An observer: what is served has changed."""
        if isinstance(event, ServingStarted | ServingStopped):
            self._notify()

    async def published(self, holding: Holding) -> None:
        """Wait until `holding` is published, or the first attempt to do so has failed. Bound it by a deadline."""
        while not any(shown.holding is holding and shown.tried for shown in self._shown.values()):
            await self._changed.wait()

    def stop(self) -> None:
        """Withdraw everything, and publish nothing any more. :meth:`run` ends soon after, within seconds."""
        self._stopped = True
        self._shown.clear()
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def run(self) -> None:
        """Publish until :meth:`stop`. If it is cancelled, everything is withdrawn too. Raises no `Exception`."""
        try:
            async with anyio.create_task_group() as tasks:
                while not self._stopped:
                    changed = self._changed
                    self._look(tasks)
                    with anyio.move_on_after(UPDATE_EVERY):
                        await changed.wait()
                    self._measure()
        except Exception:  # noqa: BLE001 - it may not end the server
            _log.exception("unexpected error: what is served is not published any more")

    def _look(self, tasks: TaskGroup) -> None:
        """Compare what is shown with what is served, and start to publish what is new."""
        served: dict[Slot, Holding] = {}
        for holding in self._holdings.held():
            identity = holding.announcement.identity
            served.setdefault((key_of(identity), identity.role), holding)
        for slot in self._shown.keys() - served.keys():
            del self._shown[slot]
        for slot, holding in served.items():
            if slot not in self._shown or self._shown[slot].holding is not holding:
                self._shown[slot] = _Shown(holding, self._holdings.supply_of(holding))
        for slot in self._shown.keys() - self._kept:
            self._kept.add(slot)
            tasks.start_soon(self._keep, slot)

    async def _keep(self, slot: Slot) -> None:
        """Publish what is shown in one slot, one after the other, until nothing is. What fails is tried again."""
        failed: _Shown | None = None
        pause = _PAUSE[0]
        while (shown := self._shown.get(slot)) is not None:
            try:
                await self._publish(slot, shown)
                continue
            except DiscoveryError as error:
                _log.log(logging.DEBUG if failed is shown else logging.WARNING, "not published: %s", error)
            except Exception as error:  # noqa: BLE001 - third-party code: no fault of it may end a server
                level, kind = logging.DEBUG if failed is shown else logging.ERROR, type(self._publisher).__name__
                _log.log(level, "not published: unexpected error of %s", kind, exc_info=error)
            pause = min(2 * pause, _PAUSE[1]) if failed is shown else _PAUSE[0]
            failed, shown.tried = shown, True
            self._notify()
            with anyio.move_on_after(pause):
                while self._shown.get(slot) is shown:
                    await self._changed.wait()
                    await anyio.lowlevel.checkpoint()  # `run` looks first
        self._kept.discard(slot)

    async def _publish(self, slot: Slot, shown: _Shown) -> None:
        """Publish until something else is shown in this slot.

        Raises:
            DiscoveryError: The entry is too long.
        """
        entry = self._entry(slot, shown)
        async with self._publisher.publish(entry) as publication:
            shown.tried = True
            self._notify()
            while self._shown.get(slot) is shown:
                changed = self._changed
                with anyio.move_on_after(UPDATE_EVERY) as waited:
                    await changed.wait()
                if not waited.cancelled_caught:
                    await anyio.lowlevel.checkpoint()  # `run` looks first
                    continue
                now = self._entry(slot, shown)
                if _differs(now, entry):
                    publication.update(now)
                    entry = now

    def _measure(self) -> None:
        now, nbytes = time.monotonic(), self._traffic().nbytes
        before, sent = self._sent
        if now - before >= UPDATE_EVERY / 2:
            self._rate, self._sent = (nbytes - sent) / (now - before), (now, nbytes)

    def _entry(self, slot: Slot, shown: _Shown) -> Entry:
        announcement, traffic = shown.holding.announcement, self._traffic()
        identity, supply = announcement.identity, shown.supply
        name = one_line(name_of(identity), _NAME_LENGTH)
        return Entry(
            key=slot[0],
            address=str(self._address()),
            generation=shown.generation,
            kind="seed" if supply is None or supply.complete else "relay",
            rank=rank_of(identity, self._rank),
            role=identity.role,
            layout=identity.layout,
            root=announcement.root,
            labels={**self._labels, **({NAME: name} if name else {})},
            load=Load(traffic.clients, traffic.waiting, max(0.0, self._rate), traffic.cap),
        )


def _differs(now: Entry, last: Entry) -> bool:
    """Whether an entry has to be updated."""
    rates = sorted((now.load.bytes_per_second, last.load.bytes_per_second))
    if rates[0] < rates[1] * (1 - _RATE_STEP):
        return True
    same_rate = msgspec.structs.replace(now.load, bytes_per_second=last.load.bytes_per_second)
    return msgspec.structs.replace(now, load=same_rate) != last
