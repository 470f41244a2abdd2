"""Claims work in a registry: one instance holds the lock, the others wait and are told how far it is."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
import msgspec

from netloader.discovery.base import Claim, Holder
from netloader.discovery.beside import beside
from netloader.discovery.leases import names
from netloader.discovery.leases.calls import LEAVING, Pace, ask, listen
from netloader.discovery.outage import Outage
from netloader.discovery.store import LeaseStore, OpenStore
from netloader.errors import DiscoveryError, legible

__all__ = ["LeaseClaims"]

_MARGIN = 0.05
"""The part of a lease by which the holder counts it as shorter than the registry does: clocks differ in rate."""

_FEW = 8
"""Most names that are read below one claim; there are two."""

_log = logging.getLogger("netloader")


class LeaseClaims:
    """Claims work in a registry. `Claims`.

    If a lock is missing that its holder did not give back, it expired, or the registry lost its data. An instance that
    waits therefore takes it only after another half lease, within which a holder that lives has written it again.

    Args:
        open_store: Opens a connection to the registry.
        prefix: The beginning of all names.
        pace: How long a lease lasts, and how often it is renewed.
        name: Of the registry, for the log.
    """

    def __init__(self, open_store: OpenStore, prefix: str, pace: Pace, name: str) -> None:
        self._open = open_store
        self._prefix = prefix
        self._pace = pace
        self._name = name

    def claim(
        self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
    ) -> AbstractAsyncContextManager[Claim | None]:
        """See :meth:`netloader.discovery.Claims.claim`."""
        return self._claim(work, within, label, waiting)

    @asynccontextmanager
    async def _claim(
        self, work: str, within: float, label: str, waiting: Callable[[Holder], None] | None
    ) -> AsyncIterator[Claim | None]:
        until = anyio.current_time() + within
        outage = Outage(f"claiming {legible(work, 100)} in {self._name}")
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(self._open())
            lock = _Lock(store, self._prefix, work, label, self._pace)
            stack.push_async_callback(lock.release)
            claim: _LeaseClaim | None = None
            if await self._wait(lock, until, outage, waiting):
                claim = _LeaseClaim(lock, outage)
                stack.callback(claim.end)
                await stack.enter_async_context(beside(claim.run, "netloader-claim"))
            else:
                await stack.aclose()  # the connection is of no more use while the caller goes on
            yield claim

    async def _wait(self, lock: _Lock, until: float, outage: Outage, waiting: Callable[[Holder], None] | None) -> bool:
        """Get the lock. Returns False if another instance still holds it at `until`.

        Raises:
            DiscoveryError: The registry does not answer at `until`, or has not for two leases.
        """
        began = anyio.current_time()
        failing: float | None = None
        try:
            if await lock.create():
                return True
        except DiscoveryError as error:
            outage.failed(error)
            failing = began
            if began >= until:
                raise
            await anyio.sleep(self._pace.retry)
        changed = asyncio.Event()
        seen = _Seen(self._pace.missing)
        async with beside(partial(listen, lock.store, lock.below, changed, self._pace), "netloader-changes"):
            while True:
                changed.clear()
                began = anyio.current_time()
                try:
                    told = seen.holder
                    values = await lock.read()
                    free = lock.is_ours(values[0]) or seen.is_free(values, anyio.current_time())
                    if seen.holder is not None and seen.holder != told and waiting is not None:
                        waiting(seen.holder)
                    if free and await lock.create():
                        outage.over()
                        return True
                except DiscoveryError as error:
                    failing = began if failing is None else failing
                    outage.failed(error)
                    seen.missing = None  # it counts from when the registry answers again
                    if began >= until or began - failing > 2 * self._pace.ttl:
                        raise
                    await anyio.sleep(self._pace.retry)
                    continue
                outage.over()
                failing = None
                if began >= until:
                    return False
                due = until if seen.due is None else min(until, seen.due)
                with anyio.move_on_at(min(due, began + self._pace.renew)):
                    await changed.wait()
                await anyio.sleep_until(min(until, began + self._pace.update))


@dataclass(slots=True)
class _Seen:
    """Who was seen to hold a lock. Pure: the time is an argument.

    Args:
        missing_for: Seconds for which a lock may be missing that was not given back.
    """

    missing_for: float
    holder: Holder | None = None
    token: str = ""
    missing: float | None = None

    @property
    def due(self) -> float | None:
        """When a lock that is missing may be taken."""
        return None if self.missing is None else self.missing + self.missing_for

    def is_free(self, values: tuple[bytes | None, bytes | None], now: float) -> bool:
        """Whether the lock may be taken now, by the values of the lock and of the progress of its holder."""
        lock_value, progress = values
        if lock_value is not None:
            lock = names.read_lock(lock_value)
            if progress is not None or lock.token != self.token:  # the same holder writes it again
                self.holder = Holder(lock.holder) if progress is None else names.read_progress(progress, lock)
            self.token, self.missing = lock.token, None
            return False
        if not self.token or (progress is not None and names.is_released(progress, self.token)):
            return True
        self.missing = now if self.missing is None else self.missing
        return now - self.missing >= self.missing_for


class _Lock:
    """One attempt to get the lock of a piece of work. Its value is unique, so it is known whose lock it is.

    Args:
        store: The connection.
        prefix: The beginning of all names.
        work: The work.
        label: Whom others are told; empty for this host and process.
        pace: Times.

    Attributes:
        store: As given.
        below: The beginning of all names of the work.
        pace: As given.
        until: Until when this instance holds the lock, by the clock of its event loop.
    """

    def __init__(self, store: LeaseStore, prefix: str, work: str, label: str, pace: Pace) -> None:
        self.store = store
        self.below = names.claim_prefix(prefix, work)
        self.pace = pace
        self.until = 0.0
        self._lock = names.lock_name(prefix, work)
        self._progress = names.progress_name(prefix, work)
        self._token = secrets.token_hex(16)
        label = legible(label or f"{platform.node()} (process {os.getpid()})", names.LONGEST_LABEL)
        self._value = msgspec.json.encode(names.Lock(self._token, label))
        self._maybe_ours = False  # the registry may hold our value

    async def create(self) -> bool:
        """Get the lock if nobody has it.

        Raises:
            DiscoveryError: The registry does not answer.
        """
        if self._maybe_ours and await self.renew():  # the answer of an earlier attempt was lost
            return True
        sent, self._maybe_ours = anyio.current_time(), True
        if await ask(self.store.create(self._lock, self._value, ttl=self.pace.ttl), self.pace.call):
            self._hold(sent)
            return True
        self._maybe_ours = False
        return False

    async def renew(self) -> bool:
        """Hold the lock for another lease, if it is still ours.

        Raises:
            DiscoveryError: The registry does not answer.
        """
        sent = anyio.current_time()
        if not await ask(self.store.renew(self._lock, self._value, ttl=self.pace.ttl), self.pace.call):
            return False
        self._hold(sent)
        return True

    def _hold(self, sent: float) -> None:
        # The registry counts from when it got the request, which is later.
        self.until = sent + self.pace.ttl * (1 - _MARGIN)

    async def read(self) -> tuple[bytes | None, bytes | None]:
        """The values of the lock and of the progress of its holder.

        Raises:
            DiscoveryError: The registry does not answer.
        """
        values = await ask(self.store.read(self.below, limit=_FEW), self.pace.call)
        return values.get(self._lock), values.get(self._progress)

    def is_ours(self, value: bytes | None) -> bool:
        """Whether a value that was read is that of this attempt: the answer to creating it was lost."""
        return value == self._value

    async def tell(self, text: str, *, released: bool = False) -> None:
        """Write how far the work is.

        Raises:
            DiscoveryError: The registry does not answer.
        """
        value = msgspec.json.encode(names.Progress(self._token, text, released))
        await ask(self.store.put(self._progress, value, ttl=self.pace.ttl), self.pace.call)

    async def release(self) -> None:
        """Give the lock back if it may be ours. Raises nothing; the lease ends anyway."""
        if not self._maybe_ours:
            return
        with anyio.move_on_after(LEAVING, shield=True):
            try:
                if anyio.current_time() < self.until:
                    await self.tell("", released=True)
                await ask(self.store.remove(self._lock, self._value), LEAVING)
            except DiscoveryError as error:
                _log.debug("a claim can't be given back, and expires: %s", error)


class _LeaseClaim:
    """A lock that this instance holds, and the task that renews it."""

    def __init__(self, lock: _Lock, outage: Outage) -> None:
        self._lock = lock
        self._outage = outage
        self._lost = asyncio.Event()
        self._text = self._told = ""
        self._more = asyncio.Event()

    @property
    def held(self) -> bool:
        """See :attr:`netloader.discovery.Claim.held`."""
        if not self._lost.is_set() and anyio.current_time() >= self._lock.until:
            self._lost.set()
        return not self._lost.is_set()

    async def lost(self) -> None:
        """See :meth:`netloader.discovery.Claim.lost`."""
        while self.held:
            with anyio.move_on_at(self._lock.until):
                await self._lost.wait()

    def tell(self, progress: str) -> None:
        """See :meth:`netloader.discovery.Claim.tell`."""
        self._text = legible(progress, names.LONGEST_PROGRESS)
        if self._text != self._told:
            self._more.set()

    def end(self) -> None:
        """The context is left."""
        self._lost.set()

    async def run(self) -> None:
        """Renew the lock and tell how far the work is, until the lock is lost or this is cancelled."""
        pace = self._lock.pace
        sent, answered = anyio.current_time(), True
        while True:
            if answered:
                with anyio.move_on_at(sent + pace.renew):
                    await self._more.wait()
                await anyio.sleep_until(sent + pace.update)
            else:
                await anyio.sleep(pace.retry)
            if not self.held:
                return
            sent = anyio.current_time()
            answered = await self._renew()

    async def _renew(self) -> bool:
        """Returns whether the registry answered."""
        until = self._lock.until
        self._more.clear()
        try:
            # If the lock is missing, the registry lost it before its time: it is ours as long as nobody else took it.
            ours = await self._lock.renew() or await self._lock.create()
            if not ours or anyio.current_time() >= until:
                self._lost.set()  # for good, also if the lock is ours again: another instance may have had it
                _log.warning("netloader: a claim is lost: %s", "it was renewed too late" if ours else "another has it")
                return True
            self._outage.over()
            if text := self._text:  # it expires as the lock does
                await self._lock.tell(text)
                self._told = text
        except DiscoveryError as error:
            self._outage.failed(error)
            return False
        return True
