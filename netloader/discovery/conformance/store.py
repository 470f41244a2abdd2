"""Conformance checks of a registry's store; see :mod:`netloader.discovery.conformance`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import anyio

from netloader.discovery.store import MAX_VALUE_BYTES, LeaseStore, OpenStore
from netloader.transports.conformance_kit import require, within

__all__ = ["STORE_CHECKS", "StoreCheck"]

StoreCheck = Callable[[OpenStore], Awaitable[None]]

_SOON = 10.0
"""Seconds within which something is told."""

_LONG = 30.0
"""A lease that does not end while a check runs."""

_SHORT = 2.0
_LATE = 2.0
"""Seconds after the end of a lease within which a name has to be gone."""

_CALLS = 50


async def what_is_put_is_read(open_store: OpenStore) -> None:
    """By another connection too, byte for byte, also the longest; a second put replaces the first."""
    async with _two(open_store) as (ours, theirs, root):
        values = {
            f"{root}/a": b"1",
            f"{root}/a/b": bytes(range(256)),
            f"{root}/c": b"x" * MAX_VALUE_BYTES,
            f"{root}/d": b"",
        }
        for name, value in values.items():
            await ours.put(name, b"before", ttl=_LONG)
            await ours.put(name, value, ttl=_LONG)
        for store in (ours, theirs):
            require(dict(await store.read(f"{root}/", limit=10)) == values, "what is read is not what was put")


async def a_prefix_is_plain_text(open_store: OpenStore) -> None:
    """No character of a name is a wildcard, case counts, and names that only resemble the prefix are not read."""
    async with _two(open_store) as (ours, _, root):
        names = [f"{root}/a.b/x", f"{root}/a_b/x", f"{root}/a%b/x", f"{root}/a~b/@:-", f"{root}/A.b/x", f"{root}/a.bc"]
        for name in names:
            await ours.put(name, name.encode(), ttl=_LONG)
        for name in names:
            prefix = name[:-1]
            expected = {one: one.encode() for one in names if one.startswith(prefix)}
            require(dict(await ours.read(prefix, limit=10)) == expected, f"a read below {prefix!r} finds other names")


async def a_read_has_a_limit(open_store: OpenStore) -> None:
    """No more names than asked for are read, and all of them if they are not more."""
    async with _two(open_store) as (ours, _, root):
        for number in range(30):
            await ours.put(f"{root}/{number}", b"x", ttl=_LONG)
        for limit, expected in ((7, 7), (30, 30), (1000, 30)):
            found = len(await ours.read(f"{root}/", limit=limit))
            require(found == expected, f"a read of at most {limit} of 30 names finds {found}")
        require(not await ours.read(f"{root}/none/", limit=10), "a read finds names that were never written")


async def one_creator_wins(open_store: OpenStore) -> None:
    """Of many that create a name at the same time exactly one is answered True, and its value stays."""
    async with _two(open_store) as (ours, theirs, root):
        for turn in range(10):
            won: list[bytes] = []

            async def create(store: LeaseStore, value: bytes, name: str, won: list[bytes]) -> None:
                if await store.create(name, value, ttl=_LONG):
                    won.append(value)

            name = f"{root}/{turn}"
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(create, (ours, theirs)[number % 2], b"%d" % number, name, won)
            require(len(won) == 1, f"{len(won)} of 8 have created one name")
            require(dict(await ours.read(name, limit=2)) == {name: won[0]}, "the value is not that of the creator")
            require(not await ours.create(name, won[0], ttl=_LONG), "a name can be created twice with the same value")


async def only_the_same_value_is_renewed_or_removed(open_store: OpenStore) -> None:
    """Another value is answered False, and nothing changes."""
    async with _two(open_store) as (ours, theirs, root):
        name = f"{root}/a"
        require(not await ours.renew(name, b"1", ttl=_LONG), "a name that is not there can be renewed")
        require(not await ours.remove(name, b"1"), "a name that is not there can be removed")
        require(not await ours.read(name, limit=2), "renewing or removing has made a name")
        await ours.put(name, b"1", ttl=_LONG)
        for value in (b"2", b"", b"11"):
            require(not await theirs.renew(name, value, ttl=_LONG), "a name with another value can be renewed")
            require(not await theirs.remove(name, value), "a name with another value can be removed")
        require(dict(await ours.read(name, limit=2)) == {name: b"1"}, "what was refused has changed something")
        require(await theirs.renew(name, b"1", ttl=_LONG), "a name can't be renewed by another connection")
        require(await theirs.remove(name, b"1"), "a name can't be removed by another connection")
        require(not await ours.read(name, limit=2), "a name that was removed is there")
        require(await ours.create(name, b"3", ttl=_LONG), "a name that was removed can't be created")


async def names_expire(open_store: OpenStore) -> None:
    """Not before their time and soon after it, however they were written last; also if the connection is closed."""
    async with _two(open_store) as (ours, theirs, root):
        async with open_store() as gone:
            began = anyio.current_time()
            await gone.put(f"{root}/put", b"1", ttl=_SHORT)
            await gone.create(f"{root}/created", b"1", ttl=_SHORT)
            await gone.put(f"{root}/shortened", b"1", ttl=_LONG)
            await gone.put(f"{root}/shortened", b"2", ttl=_SHORT)
            await gone.put(f"{root}/renewed", b"1", ttl=_LONG)
            await gone.renew(f"{root}/renewed", b"1", ttl=_SHORT)
            await gone.put(f"{root}/long", b"1", ttl=_LONG)
            names = sorted(await gone.read(f"{root}/", limit=10))
            if anyio.current_time() < began + _SHORT:  # else this host is too slow to tell
                written = [f"{root}/{name}" for name in ("created", "long", "put", "renewed", "shortened")]
                require(names == written, f"names are gone before their time: only {names} are left")
        with within(_SHORT + _LATE + 1.0, "names whose lease has ended do not go"):
            while len(await theirs.read(f"{root}/", limit=10)) > 1:  # noqa: ASYNC110 - nobody tells that a name expired
                await anyio.sleep(0.1)
        require(list(await ours.read(f"{root}/", limit=10)) == [f"{root}/long"], "the long lease has ended too")
        require(await ours.create(f"{root}/put", b"2", ttl=_LONG), "a name that has expired can't be created")
        require(not await ours.renew(f"{root}/created", b"1", ttl=_LONG), "a name that has expired can be renewed")


async def renewing_makes_names_last(open_store: OpenStore) -> None:
    """A name that is renewed or put again in time is there for several leases; its value does not change."""
    async with _two(open_store) as (ours, theirs, root):
        names = {f"{root}/renewed": b"1", f"{root}/put": b"2"}
        for name, value in names.items():
            await ours.put(name, value, ttl=_SHORT)
        for _ in range(8):
            await anyio.sleep(_SHORT / 4)
            require(await ours.renew(f"{root}/renewed", b"1", ttl=_SHORT), "a name is gone before its time")
            await ours.put(f"{root}/put", b"2", ttl=_SHORT)
        require(dict(await theirs.read(f"{root}/", limit=10)) == names, "renewed names are gone or have other values")


async def a_refused_renewal_prolongs_nothing(open_store: OpenStore) -> None:
    """Neither does a refused create."""
    async with _two(open_store) as (ours, theirs, root):
        await ours.put(f"{root}/a", b"1", ttl=_SHORT)
        with within(_SHORT + _LATE + 1.0, "a name lasts because others tried to renew or create it"):
            while await theirs.read(f"{root}/", limit=10):
                if await theirs.renew(f"{root}/a", b"2", ttl=_LONG):
                    require(condition=False, what="a name with another value can be renewed")
                if await theirs.create(f"{root}/a", b"1", ttl=1.0):
                    break
                await anyio.sleep(0.1)


async def changes_are_told(open_store: OpenStore) -> None:
    """Each watcher hears once at the beginning, and soon after each put, create and remove of another connection."""
    async with _two(open_store) as (ours, theirs, root):
        steps: dict[str, Callable[[], Awaitable[object]]] = {
            "put": lambda: ours.put(f"{root}/a", b"1", ttl=_LONG),
            "put of another value": lambda: ours.put(f"{root}/a", b"2", ttl=_LONG),
            "create": lambda: ours.create(f"{root}/b/c", b"1", ttl=_LONG),
            "remove": lambda: ours.remove(f"{root}/a", b"2"),
        }
        async with anyio.create_task_group() as tasks:
            first, second = _Listener(theirs, f"{root}/"), _Listener(theirs, f"{root}/")
            for listener in (first, second):
                tasks.start_soon(listener.run)
                await listener.hears("the first change is not told at the beginning", since=0)
            for what, step in steps.items():
                before = [await listener.quiet() for listener in (first, second)]
                await step()
                for listener, heard in zip((first, second), before, strict=True):
                    await listener.hears(f"a {what} is not told", since=heard)
            first.scope.cancel()
            heard = await second.quiet()
            await ours.put(f"{root}/d", b"1", ttl=_LONG)
            await second.hears("a watcher hears nothing after another one was closed", since=heard)
            tasks.cancel_scope.cancel()


async def calls_may_overlap(open_store: OpenStore) -> None:
    """Many calls on one connection at once, while one of them is cancelled."""
    async with _two(open_store) as (ours, _, root):
        found: list[int] = []

        async def work(number: int) -> None:
            name, value = f"{root}/{number}/x", b"%d" % number
            await ours.put(name, value, ttl=_LONG)
            if dict(await ours.read(f"{root}/{number}/", limit=5)) == {name: value}:
                found.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(_CALLS):
                tasks.start_soon(work, number)
            for _ in range(5):
                with anyio.move_on_after(0.001):
                    await ours.read(f"{root}/", limit=100)
        require(len(found) == _CALLS, f"{_CALLS - len(found)} of {_CALLS} calls that overlap get wrong answers")


STORE_CHECKS: tuple[StoreCheck, ...] = (
    what_is_put_is_read,
    a_prefix_is_plain_text,
    a_read_has_a_limit,
    one_creator_wins,
    only_the_same_value_is_renewed_or_removed,
    names_expire,
    renewing_makes_names_last,
    a_refused_renewal_prolongs_nothing,
    changes_are_told,
    calls_may_overlap,
)
"""All checks of a `LeaseStore`, in order."""


@asynccontextmanager
async def _two(open_store: OpenStore) -> AsyncIterator[tuple[LeaseStore, LeaseStore, str]]:
    """Two connections, and the beginning of names that nobody else uses."""
    async with open_store() as ours, open_store() as theirs:
        yield ours, theirs, f"netloader-check/{secrets.token_hex(8)}"


class _Listener:
    """Counts what a store tells of changes."""

    def __init__(self, store: LeaseStore, prefix: str) -> None:
        self.scope = anyio.CancelScope()
        self._store = store
        self._prefix = prefix
        self._heard = 0
        self._more = anyio.Event()

    async def run(self) -> None:
        with self.scope:
            async with aclosing(self._store.changes(self._prefix)) as changes:
                async for _ in changes:
                    self._heard += 1
                    more, self._more = self._more, anyio.Event()
                    more.set()

    async def quiet(self) -> int:
        """How often something was told, once nothing more is told of what happened before; or after half a second."""
        with anyio.move_on_after(0.5):
            heard = -1
            while heard != self._heard:
                heard = self._heard
                await anyio.sleep(0.1)
        return self._heard

    async def hears(self, otherwise: str, *, since: int) -> None:
        with within(_SOON, otherwise):
            while self._heard <= since:
                await self._more.wait()
