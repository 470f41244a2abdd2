"""The checks of each contract. Every other provider has to pass the same checks with its own backend."""

from __future__ import annotations

from contextlib import aclosing

import anyio
import msgspec
import pytest

import netloader
from netloader.core.addresses import Address
from netloader.core.entries import Entry, Load
from netloader.core.sources import Source
from netloader.discovery import (
    Appeared,
    Claim,
    Claims,
    FixedSources,
    Listed,
    Publisher,
    SourceChange,
    SourceProvider,
    Vanished,
)
from netloader.errors import ConfigError, DiscoveryError, LocalProtocolError
from tests.discovery.backend import InMemoryBackend, InMemoryClaims, InMemoryProvider, InMemoryPublisher

PATIENCE = 30.0
ONE = Entry("key", "10.0.0.1:1", "first", labels={"zone": "a"})
TWO = Entry("key", "10.0.0.2:1", "second", load=Load(clients=2))
THIRD = Source(Address("10.0.0.3", 1), load=2.0)


async def heard(provider: SourceProvider, count: int) -> list[SourceChange]:
    """The first `count` changes of a stream, which is closed afterwards."""
    changes: list[SourceChange] = []
    with anyio.fail_after(PATIENCE):
        async with aclosing(provider.watch()) as stream:
            async for change in stream:
                changes.append(change)
                if len(changes) == count:
                    break
    return changes


# --- to find and to publish -------------------------------------------------------------------------------------------


async def check_published_is_found(publisher: Publisher, provider: SourceProvider) -> None:
    """A published source appears, changes, and vanishes when its context is left; each stream lists present sources."""
    async with aclosing(provider.watch()) as stream:
        with anyio.fail_after(PATIENCE):
            assert await anext(stream) == Listed()
            async with publisher.publish(ONE) as published:
                assert await anext(stream) == Appeared(ONE.source())
                busy = msgspec.structs.replace(ONE, load=Load(clients=3))
                published.update(busy)
                assert await anext(stream) == Appeared(busy.source())
                assert await heard(provider, 2) == [Appeared(busy.source()), Listed()]
                async with publisher.publish(TWO):
                    assert await anext(stream) == Appeared(TWO.source())
                assert await anext(stream) == Vanished(TWO.source().address)
            assert await anext(stream) == Vanished(ONE.source().address)


async def check_withdrawn_by_a_cancellation(publisher: Publisher, provider: SourceProvider) -> None:
    """The source of a cancelled instance is withdrawn."""
    with anyio.CancelScope() as scope:
        async with publisher.publish(ONE):
            scope.cancel()
            await anyio.sleep(PATIENCE)
    assert scope.cancelled_caught
    assert await heard(provider, 1) == [Listed()]


async def check_published_once(publisher: Publisher) -> None:
    async with publisher.publish(ONE):
        with pytest.raises(LocalProtocolError):
            async with publisher.publish(ONE):
                pass
    async with publisher.publish(ONE):  # it can be published again
        pass


async def test_a_published_source_is_found_until_it_is_withdrawn() -> None:
    backend = InMemoryBackend()
    await check_published_is_found(InMemoryPublisher(backend), InMemoryProvider(backend))
    await check_withdrawn_by_a_cancellation(InMemoryPublisher(backend), InMemoryProvider(backend))
    await check_published_once(InMemoryPublisher(backend))


async def test_a_backend_that_is_down_raises_on_entering() -> None:
    backend = InMemoryBackend()
    backend.down = True
    with pytest.raises(DiscoveryError):
        async with InMemoryClaims(backend).claim("work", within=0):
            pass
    with pytest.raises(DiscoveryError):
        await heard(InMemoryProvider(backend), 1)
    assert backend.sources == {}
    assert backend.claims == {}


# --- to claim ---------------------------------------------------------------------------------------------------------


def is_held(claim: Claim) -> bool:
    return claim.held


async def check_one_at_a_time(ours: Claims, theirs: Claims) -> None:
    """One instance has the claim, others get None after their wait, and one of them gets it once it is released."""
    with anyio.fail_after(PATIENCE):
        async with ours.claim("read", within=0) as first:
            assert first is not None
            assert is_held(first)
            async with theirs.claim("read", within=0.01) as second:
                assert second is None
            async with theirs.claim("another work", within=0) as other:
                assert other is not None
        assert not is_held(first)
        await first.lost()
        async with theirs.claim("read", within=0) as second:
            assert second is not None


async def check_a_waiting_instance_gets_it(ours: Claims, theirs: Claims) -> None:
    got = anyio.Event()

    async def wait() -> None:
        async with theirs.claim("read", within=PATIENCE) as claim:
            assert claim is not None
            got.set()

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with ours.claim("read", within=0):
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert not got.is_set()
                scope.cancel()
                await anyio.sleep(PATIENCE)
        with anyio.fail_after(PATIENCE):
            await got.wait()


async def check_a_wait_that_is_cancelled_holds_nothing(ours: Claims, theirs: Claims) -> None:
    async with ours.claim("read", within=0), anyio.create_task_group() as tasks:

        async def wait() -> None:
            async with theirs.claim("read", within=PATIENCE):
                raise AssertionError("it was held by another instance")

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    async with ours.claim("read", within=0) as again:
        assert again is not None


async def test_a_claim_is_held_by_one_instance_at_a_time() -> None:
    backend = InMemoryBackend()
    ours, theirs = InMemoryClaims(backend), InMemoryClaims(backend)
    await check_one_at_a_time(ours, theirs)
    await check_a_waiting_instance_gets_it(ours, theirs)
    await check_a_wait_that_is_cancelled_holds_nothing(ours, theirs)


async def test_an_expired_lease_is_lost_before_another_instance_gets_it() -> None:
    backend = InMemoryBackend()
    async with InMemoryClaims(backend).claim("read", within=0) as first:
        assert first is not None
        backend.claims["read"].lose()
        async with InMemoryClaims(backend).claim("read", within=0) as second:
            assert second is not None
            assert (first.held, second.held) == (False, True)
        with anyio.fail_after(PATIENCE):
            await first.lost()


# --- the fixed list ---------------------------------------------------------------------------------------------------


async def test_the_fixed_list_yields_its_sources_in_order_and_ends() -> None:
    fixed = FixedSources(["10.0.0.7:80", Address("10.0.0.8", 80), THIRD])
    assert isinstance(fixed, SourceProvider)
    expected = [Source(Address("10.0.0.7", 80)), Source(Address("10.0.0.8", 80)), THIRD]
    for _ in range(2):
        async with aclosing(fixed.watch()) as stream:
            assert [change async for change in stream] == [Appeared(source) for source in expected]


@pytest.mark.parametrize(
    ("sources", "field"), [(["10.0.0.7:80", "nowhere"], r"sources\[1\]"), ("10.0.0.7:80", "sources = ")]
)
def test_an_invalid_address_in_the_fixed_list_is_an_error_that_names_its_place(sources: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        FixedSources(sources)


def test_a_list_is_not_taken_for_a_source_provider() -> None:
    assert not isinstance(["10.0.0.7:80"], SourceProvider)
    assert netloader.SourceProvider is SourceProvider
