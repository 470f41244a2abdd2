"""The conformance checks: our implementations pass, and seeded faults don't."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import ClassVar

import anyio
import anyio.lowlevel
import msgspec
import pytest

from netloader.core.entries import Entry
from netloader.discovery import (
    Claim,
    Claims,
    Holder,
    Listed,
    Publication,
    Publisher,
    SourceChange,
    SourceProvider,
    Vanished,
    Wanted,
)
from netloader.discovery.conformance import (
    BACKEND_CHECKS,
    PROVIDER_CHECKS,
    STORE_CHECKS,
    BackendCheck,
    Failed,
    StoreCheck,
    check_backend,
    check_provider,
    check_store,
)
from netloader.discovery.leases import LeaseBackend
from netloader.discovery.memory import MemoryRegistry, MemoryStore
from tests.drivers.jumping import run


def done(check: Callable[[], Awaitable[None]]) -> None:
    async def main(_: object) -> None:
        await check()

    run(main)


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
def test_the_store_in_memory(check: StoreCheck) -> None:
    registry = MemoryRegistry()
    done(lambda: check_store(registry, [check]))


@pytest.mark.parametrize("check", BACKEND_CHECKS, ids=lambda check: check.__name__)
def test_a_backend_over_the_store_in_memory(check: BackendCheck) -> None:
    registry = MemoryRegistry()
    done(lambda: check_backend(lambda: LeaseBackend(registry), [check]))


# --- faulty stores ----------------------------------------------------------------------------------------------------


class NoExpiry(MemoryStore):
    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        await super().put(name, value, ttl=max(ttl, 30.0))


class ExpiresEarly(MemoryStore):
    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        return await super().renew(name, value, ttl=ttl / 5)


class CreateInTwoSteps(MemoryStore):
    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        if await self.read(name, limit=1):
            return False
        await self.put(name, value, ttl=ttl)
        return True


class RefusalProlongs(MemoryStore):
    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        created = await super().create(name, value, ttl=ttl)
        if not created:
            await super().renew(name, value, ttl=30.0)
        return created


class RenewsAnything(MemoryStore):
    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        found = await self.read(name, limit=1)
        return bool(found) and await super().renew(name, found[name], ttl=ttl)


class RemovesAnything(MemoryStore):
    async def remove(self, name: str, value: bytes) -> bool:
        found = await self.read(name, limit=1)
        return bool(found) and await super().remove(name, found.get(name, b""))


class RenewalsDoNothing(MemoryStore):
    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        return (await self.read(name, limit=1)).get(name) == value


class Glob(MemoryStore):
    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        import re

        everything = await super().read("", limit=10_000)
        found = [(name, value) for name, value in everything.items() if re.match(prefix, name)]
        return dict(found[:limit])


class NoLimit(MemoryStore):
    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        return await super().read(prefix, limit=10_000)


class TextOnly(MemoryStore):
    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        await super().put(name, value.decode("ascii", "replace").encode(), ttl=ttl)


class EndsWithItsConnection(MemoryStore):
    """Removes what it has written when it is closed."""

    def __init__(self, registry: MemoryRegistry) -> None:
        super().__init__(registry)
        self._mine: set[str] = set()

    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        await super().put(name, value, ttl=ttl)
        self._mine.add(name)

    def close(self) -> None:
        for name in self._mine:
            self._registry.names.pop(name, None)


class TellsNothingAtFirst(MemoryStore):
    async def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        async with aclosing(super().changes(prefix)) as changes:
            await anext(changes)
            async for _ in changes:
                yield


class TellsOnce(MemoryStore):
    async def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        yield
        await anyio.sleep_forever()


class OneAtATime(MemoryStore):
    """The answer to a call goes to whoever called last."""

    _last = b""

    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        self._asked = prefix
        await anyio.lowlevel.checkpoint()
        return await super().read(self._asked, limit=limit)


class LeavesATask(MemoryStore):
    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        await super().put(name, value, ttl=ttl)
        self._task = asyncio.create_task(anyio.sleep(100.0), name="left")


STORES = {
    NoExpiry: "names_expire",
    ExpiresEarly: "renewing_makes_names_last: a name is gone",
    CreateInTwoSteps: "one_creator_wins",
    RefusalProlongs: "a_refused_renewal_prolongs_nothing",
    RenewsAnything: "only_the_same_value_is_renewed_or_removed",
    RemovesAnything: "only_the_same_value_is_renewed_or_removed",
    RenewalsDoNothing: "names_expire|renewing_makes_names_last",
    Glob: "a_prefix_is_plain_text",
    NoLimit: "a_read_has_a_limit",
    TextOnly: "what_is_put_is_read",
    EndsWithItsConnection: "names_expire",
    TellsNothingAtFirst: "changes_are_told",
    TellsOnce: "changes_are_told",
    OneAtATime: "calls_may_overlap",
    LeavesATask: "it leaves behind: task left",
}


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.__name__)
def test_a_faulty_store_is_found(kind: type[MemoryStore]) -> None:
    registry = MemoryRegistry()

    @asynccontextmanager
    async def open_store() -> AsyncIterator[MemoryStore]:
        store = kind(registry)
        yield store
        if isinstance(store, EndsWithItsConnection):
            store.close()

    with pytest.raises(Failed, match=STORES[kind]):
        done(lambda: check_store(open_store))


def test_each_check_of_a_store_has_a_fault_that_it_finds() -> None:
    assert {check.__name__ for check in STORE_CHECKS} <= set("|".join(STORES.values()).replace(":", "|").split("|"))


# --- faulty backends --------------------------------------------------------------------------------------------------


class Faulty:
    """A backend over a registry in memory, of which one part is replaced."""

    def __init__(self, registry: MemoryRegistry) -> None:
        self._backend = LeaseBackend(registry)

    def sources(self, wanted: Wanted) -> SourceProvider:
        return self._backend.sources(wanted)

    def publisher(self) -> Publisher | None:
        return self._backend.publisher()

    def claims(self) -> Claims | None:
        return self._backend.claims()


class NoProvider(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        return "nothing"  # type: ignore[return-value]


class Changed:
    """A stream whose changes are changed; None leaves one out."""

    def __init__(self, provider: SourceProvider, change: Callable[[SourceChange], SourceChange | None]) -> None:
        self._provider = provider
        self._change = change

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        async with aclosing(self._provider.watch()) as changes:
            async for change in changes:
                if (changed := self._change(change)) is not None:
                    yield changed


class NeverListed(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        return Changed(super().sources(wanted), lambda change: None if isinstance(change, Listed) else change)


class NeverVanishes(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        return Changed(super().sources(wanted), lambda change: None if isinstance(change, Vanished) else change)


class ListedFirst(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        provider = super().sources(wanted)

        class ListsTooEarly:
            async def watch(self) -> AsyncGenerator[SourceChange, None]:
                yield Listed()
                async with aclosing(provider.watch()) as changes:
                    async for change in changes:
                        yield change

        return ListsTooEarly()


class OneStream(Faulty):
    """Its streams share their state, so that only one of them tells a change."""

    def __init__(self, registry: MemoryRegistry) -> None:
        super().__init__(registry)
        self._told: list[SourceChange] = []

    def sources(self, wanted: Wanted) -> SourceProvider:
        def once(change: SourceChange) -> SourceChange | None:
            if isinstance(change, Listed):
                return change
            if change in self._told:
                return None
            self._told.append(change)
            return change

        return Changed(super().sources(wanted), once)


class ClosesSlowly(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        provider = super().sources(wanted)

        class Slow:
            async def watch(self) -> AsyncGenerator[SourceChange, None]:
                try:
                    async with aclosing(provider.watch()) as changes:
                        async for change in changes:
                            yield change
                finally:
                    with anyio.CancelScope(shield=True):
                        await anyio.sleep(20.0)

        return Slow()


class StartsAThread(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        threading.Thread(target=self._stop.wait, args=(5.0,), name="netloader-left", daemon=True).start()
        return super().sources(wanted)

    _stop = threading.Event()


class IgnoresRank(Faulty):
    def sources(self, wanted: Wanted) -> SourceProvider:
        return super().sources(Wanted(wanted.key, 0, wanted.role))

    def publisher(self) -> Publisher | None:
        return Publishes(self._backend.publisher(), lambda entry: msgspec.structs.replace(entry, rank=0))


class Publishes:
    """Publishes another entry than it is given."""

    def __init__(self, publisher: Publisher, change: Callable[[Entry], Entry]) -> None:
        self._publisher = publisher
        self._change = change

    def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
        return self._publisher.publish(self._change(entry))


class LosesLabels(Faulty):
    def publisher(self) -> Publisher | None:
        return Publishes(self._backend.publisher(), lambda entry: msgspec.structs.replace(entry, labels={}))


class SameGeneration(Faulty):
    def publisher(self) -> Publisher | None:
        return Publishes(self._backend.publisher(), lambda entry: msgspec.structs.replace(entry, generation="same"))


class NoUpdates(Faulty):
    def publisher(self) -> Publisher | None:
        publisher = self._backend.publisher()

        class Publication:
            def update(self, entry: Entry) -> None:
                pass

        class OnceOnly:
            @asynccontextmanager
            async def publish(self, entry: Entry) -> AsyncIterator[Publication]:
                async with publisher.publish(entry):
                    yield Publication()

        return OnceOnly()


class StaysAfterErrors(Faulty):
    """Withdraws nothing if the body raised."""

    _kept: ClassVar[list[object]] = []  # otherwise the garbage collector withdraws it

    def publisher(self) -> Publisher | None:
        publisher = self._backend.publisher()
        kept = self._kept

        class Careless:
            @asynccontextmanager
            async def publish(self, entry: Entry) -> AsyncIterator[Publication]:
                leave = publisher.publish(entry)
                kept.append(leave)
                yield await leave.__aenter__()
                await leave.__aexit__(None, None, None)

        return Careless()


class WrapsErrors(Faulty):
    def publisher(self) -> Publisher | None:
        publisher = self._backend.publisher()

        class Wrapping:
            @asynccontextmanager
            async def publish(self, entry: Entry) -> AsyncIterator[Publication]:
                async with anyio.create_task_group(), publisher.publish(entry) as published:
                    yield published

        return Wrapping()


class NewPublisherEachTime(Faulty):
    """Does not know what it publishes already."""

    def publisher(self) -> Publisher | None:
        backend = self._backend

        class Forgetful:
            def publish(self, entry: Entry) -> AbstractAsyncContextManager[Publication]:
                return backend.publisher().publish(entry)

        return Forgetful()


class ClaimsDiffer(Faulty):
    """Names each claim anew."""

    def claims(self) -> Claims | None:
        claims = self._backend.claims()

        class Differ:
            def claim(
                self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
            ) -> AbstractAsyncContextManager[Claim | None]:
                return claims.claim(f"{work} {secrets.token_hex(8)}", within=within, label=label, waiting=waiting)

        return Differ()


class TellsNobody(Faulty):
    def claims(self) -> Claims | None:
        claims = self._backend.claims()

        class Silent:
            def claim(
                self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
            ) -> AbstractAsyncContextManager[Claim | None]:
                del waiting
                return claims.claim(work, within=within, label=label)

        return Silent()


class GivesAtOnceOnly(Faulty):
    """Does not wait."""

    def claims(self) -> Claims | None:
        claims = self._backend.claims()

        class Hasty:
            def claim(
                self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
            ) -> AbstractAsyncContextManager[Claim | None]:
                return claims.claim(work, within=0, label=label, waiting=waiting)

        return Hasty()


class HoldsForever(Faulty):
    """A claim whose context is left by an error is not given back."""

    def claims(self) -> Claims | None:
        claims = self._backend.claims()

        class Holding:
            @asynccontextmanager
            async def claim(
                self, work: str, *, within: float, label: str = "", waiting: Callable[[Holder], None] | None = None
            ) -> AsyncIterator[Claim | None]:
                leave = claims.claim(work, within=within, label=label, waiting=waiting)
                claim = await leave.__aenter__()
                try:
                    yield claim
                except KeyError:
                    self.kept = leave
                    raise
                except BaseException:
                    await leave.__aexit__(None, None, None)
                    raise
                await leave.__aexit__(None, None, None)

        return Holding()


BACKENDS = {
    NoProvider: "it_makes_its_parts",
    NeverListed: "Listed does not come",
    NeverVanishes: "what_is_published_is_found: changes_are_told_while_a_stream_is_open",
    ListedFirst: "what_is_published_is_found: a_stream_begins_with_what_is_there",
    OneStream: "what_is_published_is_found: (a_stream_begins|changes_are_told)",
    ClosesSlowly: "a cancelled stream does not end",
    IgnoresRank: "only_what_is_wanted_is_found",
    LosesLabels: "an_entry_is_found_whole",
    SameGeneration: "another_generation_is_another_server|an_entry_is_found_whole",
    NoUpdates: "an_entry_is_found_whole: the latest update",
    StaysAfterErrors: "a_server_is_withdrawn_however_its_context_ends|does not vanish|it leaves behind",
    WrapsErrors: "a_server_is_withdrawn_however_its_context_ends",
    NewPublisherEachTime: "a_publisher_refuses_what_the_caller_does_wrong",
    ClaimsDiffer: "one_instance_holds_a_claim: two instances",
    GivesAtOnceOnly: "of_many_exactly_one_gets_a_claim",
    TellsNobody: "those_that_wait_see_who_and_how_far",
    HoldsForever: "a_wait_that_is_cancelled_holds_nothing",
}


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.__name__)
def test_a_faulty_backend_is_found(kind: type[Faulty]) -> None:
    registry = MemoryRegistry()
    shared = kind(registry)
    with pytest.raises(Failed, match=BACKENDS[kind]):
        done(lambda: check_backend((lambda: shared) if kind is OneStream else (lambda: kind(registry))))


def test_a_thread_that_is_left_is_found() -> None:
    kind = StartsAThread
    try:
        with pytest.raises(Failed, match="it leaves behind: thread netloader-left"):
            done(lambda: check_backend(lambda: kind(MemoryRegistry())))
    finally:
        kind._stop.set()


def test_each_check_of_a_backend_has_a_fault_that_it_finds() -> None:
    named = " ".join(BACKENDS.values())
    assert [check.__name__ for check in BACKEND_CHECKS if check.__name__ not in named] == []


def test_a_provider_that_stays_silent_is_found() -> None:
    @asynccontextmanager
    async def available(address: object) -> AsyncIterator[None]:
        del address
        yield

    registry = MemoryRegistry()
    with pytest.raises(Failed, match=r"a_stream_begins_with_what_is_there: Listed comes after \[\] only"):
        done(lambda: check_provider(LeaseBackend(registry).sources(Wanted("key")), available))
    assert len(PROVIDER_CHECKS) == 4
