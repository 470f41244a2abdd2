"""Conformance checks of a backend: what it publishes and claims; see :mod:`netloader.discovery.conformance`."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

import anyio
import msgspec

from netloader.core.addresses import Address, parse_address
from netloader.core.entries import MAX_ENTRY_BYTES, Entry, Load
from netloader.discovery.base import Backend, Claims, Holder, Publisher, SourceProvider, Wanted
from netloader.discovery.conformance.provider import LEAVING, ONE, PROVIDER_CHECKS, TWO, named, watched
from netloader.errors import DiscoveryError, LocalProtocolError
from netloader.transports.conformance_kit import PATIENCE, Failed, require, within

__all__ = ["BACKEND_CHECKS", "BackendCheck"]

BackendCheck = Callable[[Callable[[], Backend]], Awaitable[None]]


# --- publishers -------------------------------------------------------------------------------------------------------


def _entry(address: Address = ONE, **changes: object) -> Entry:
    entry = Entry(
        key=secrets.token_hex(16),
        address=str(address),
        generation=secrets.token_hex(8),
        labels={"host": "node-1", "zone": "b"},
        load=Load(clients=1, cap=4),
    )
    return msgspec.structs.replace(entry, **changes)


def _publisher(make: Callable[[], Backend]) -> Publisher | None:
    return make().publisher()


def _wanted(entry: Entry) -> Wanted:
    return Wanted(entry.key, entry.rank, entry.role)


async def it_makes_its_parts(make: Callable[[], Backend]) -> None:
    """It is a `Backend`: its sources can be watched; its publisher and its claims are None or have their methods."""
    backend = make()
    require(isinstance(backend, Backend), f"{type(backend).__name__} is no Backend")
    provider = backend.sources(Wanted(secrets.token_hex(16), 0, "target"))
    require(isinstance(provider, SourceProvider), f"{type(provider).__name__} is no SourceProvider")
    for part, method in ((backend.publisher(), "publish"), (backend.claims(), "claim")):
        require(part is None or callable(getattr(part, method, None)), f"{type(part).__name__} has no {method}")


async def what_is_published_is_found(make: Callable[[], Backend]) -> None:
    """By the provider of another instance, for as long as the context is open: the checks of a provider."""
    publisher = _publisher(make)
    if publisher is None:
        return
    entry = _entry()
    provider = make().sources(_wanted(entry))
    for check in PROVIDER_CHECKS:
        published = check(provider, lambda at: publisher.publish(msgspec.structs.replace(entry, address=str(at))))
        await named(check.__name__, published)


async def an_entry_is_found_whole(make: Callable[[], Backend]) -> None:
    """With its labels, its load and its generation, and with those of the latest update."""
    publisher = _publisher(make)
    if publisher is None:
        return
    entry = _entry()
    async with watched(make().sources(_wanted(entry))) as (stream,), publisher.publish(entry) as published:
        await stream.until(lambda: ONE in stream.sources, "a published server does not appear")
        require(stream.sources[ONE] == entry.source(), f"the source is {stream.sources[ONE]}, not {entry.source()}")
        for clients in range(2, 50):
            entry = msgspec.structs.replace(entry, load=Load(clients=clients, cap=4), root="ab" * clients)
            published.update(entry)
        await stream.until(lambda: stream.sources.get(ONE) == entry.source(), "the latest update is not told")
        require(not stream.vanished, "a server that is updated vanishes")


async def only_what_is_wanted_is_found(make: Callable[[], Backend]) -> None:
    """Not servers of another key, rank or role, which may have the same address."""
    publisher = _publisher(make)
    if publisher is None:
        return
    entry = _entry()
    others = [_entry(rank=0), _entry(key=entry.key, rank=1), _entry(key=entry.key, role="draft")]
    odd = _entry(TWO, key="a key * with % odd [characters]/ü" * 10, role="a/../b?")
    async with (
        publisher.publish(others[0]),
        publisher.publish(others[1]),
        publisher.publish(others[2]),
        publisher.publish(odd),
    ):
        for one in [*others, odd]:
            async with watched(make().sources(_wanted(one))) as (found,):
                address = parse_address(one.address)
                await found.until(lambda: address in found.sources, "a server does not appear")  # noqa: B023
                require(found.sources == {address: one.source()}, "a server of another key, rank or role is found")
        async with watched(make().sources(_wanted(entry))) as (none,):
            require(not none.sources, "a server of another key, rank or role is found")


async def another_generation_is_another_server(make: Callable[[], Backend]) -> None:
    """One that publishes at the address of another one replaces it, and stays when that one withdraws."""
    first, second = _publisher(make), _publisher(make)
    if first is None or second is None:
        return
    entry = _entry()
    later = msgspec.structs.replace(entry, generation=secrets.token_hex(8))
    over = anyio.Event()

    async def restarted(publisher: Publisher) -> None:
        async with publisher.publish(later):
            await over.wait()

    async with anyio.create_task_group() as tasks, watched(make().sources(_wanted(entry))) as (stream,):
        async with first.publish(entry):
            await stream.until(lambda: ONE in stream.sources, "a published server does not appear")
            tasks.start_soon(restarted, second)
            await stream.until(
                lambda: ONE in stream.sources and stream.sources[ONE].generation == later.generation,
                "a server that restarted at its address does not appear",
            )
            require(ONE in stream.vanished, "the server that was there before does not vanish")
        async with watched(make().sources(_wanted(entry))) as (again,):
            require(again.sources == {ONE: later.source()}, "the one that withdrew has taken the other one with it")
        over.set()
        await stream.until(lambda: not stream.sources, "a server that withdrew does not vanish")


async def a_server_is_withdrawn_however_its_context_ends(make: Callable[[], Backend]) -> None:
    """By an error, which is raised as it is, and by a cancellation; and it can be published again."""
    publisher = _publisher(make)
    if publisher is None:
        return
    entry = _entry()
    async with watched(make().sources(_wanted(entry))) as (stream,):
        for how in ("an error", "a cancellation"):
            with within(PATIENCE + LEAVING, f"a context does not end by {how}"), anyio.CancelScope() as scope:
                try:
                    async with publisher.publish(entry):
                        await stream.until(lambda: ONE in stream.sources, "a published server does not appear")
                        if how == "a cancellation":
                            scope.cancel()
                            await anyio.sleep(PATIENCE)
                        raise KeyError(how)
                except KeyError as error:
                    require(error.args == (how,), "another error than that of the body is raised")
            await stream.until(lambda: not stream.sources, f"after {how}, a server does not vanish")


async def a_publisher_refuses_what_the_caller_does_wrong(make: Callable[[], Backend]) -> None:
    """The same server twice, an update that names another server, and an entry that is too long."""
    publisher = _publisher(make)
    if publisher is None:
        return
    entry = _entry()
    long = msgspec.structs.replace(entry, labels={"long": "x" * MAX_ENTRY_BYTES})
    await _refused(publisher, long, DiscoveryError, "an entry that is too long")
    async with publisher.publish(entry) as published:
        await _refused(publisher, entry, LocalProtocolError, "a server that is published already")
        for other in (
            msgspec.structs.replace(entry, address=str(TWO)),
            msgspec.structs.replace(entry, generation="other"),
        ):
            try:
                published.update(other)
            except LocalProtocolError:
                continue
            raise Failed("an update that names another server is accepted")
        async with watched(make().sources(_wanted(entry))) as (stream,):
            await stream.until(lambda: ONE in stream.sources, "a refused call has withdrawn the server")
            require(stream.sources == {ONE: entry.source()}, "a refused call has changed what is published")


async def _refused(publisher: Publisher, entry: Entry, kind: type[Exception], what: str) -> None:
    try:
        async with publisher.publish(entry):
            pass
    except kind:
        return
    raise Failed(f"{what} is published")


# --- claims -----------------------------------------------------------------------------------------------------------


async def one_instance_holds_a_claim(make: Callable[[], Backend]) -> None:
    """Others get None after their wait; other work is not concerned; after the release it can be claimed again."""
    ours, theirs = make().claims(), make().claims()
    if ours is None or theirs is None:
        return
    work = f"check {secrets.token_hex(8)}"
    for _ in range(2):
        async with ours.claim(work, within=0) as first:
            require(first is not None and first.held, "a claim that nobody holds is not given")
            for seconds in (0.0, 0.5):
                async with theirs.claim(work, within=seconds) as second:
                    require(second is None, "two instances hold one claim")
            async with theirs.claim(f"{work}, another one", within=0) as other:
                require(other is not None, "a claim on other work is not given")
        with within(1.0, "the claim of a context that was left is not lost"):
            require(first is None or not first.held, "the claim of a context that was left is held")
            if first is not None:
                await first.lost()


async def of_many_exactly_one_gets_a_claim(make: Callable[[], Backend]) -> None:
    """Instances that ask at the same time; and each of them in turn, if they wait long enough."""
    if make().claims() is None:
        return
    work = f"check {secrets.token_hex(8)}"
    holding: list[int] = []
    done: list[int] = []

    async def instance(number: int, claims: Claims) -> None:
        async with claims.claim(work, within=2 * PATIENCE) as claim:
            require(claim is not None, "a claim is not given within a minute to one of five that give it back at once")
            require(not holding, "two instances hold one claim")
            holding.append(number)
            await anyio.sleep(0.05)
            holding.remove(number)
            done.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            claims = make().claims()
            if claims is not None:
                tasks.start_soon(instance, number, claims)
    require(sorted(done) == list(range(5)), "not every instance got the claim")


async def those_that_wait_see_who_and_how_far(make: Callable[[], Backend]) -> None:
    """The label of the holder, and what it tells; then one of them gets the claim, however its holder ends."""
    ours, theirs = make().claims(), make().claims()
    if ours is None or theirs is None:
        return
    work = f"check {secrets.token_hex(8)}"
    seen: list[Holder] = []
    more = anyio.Event()
    got = anyio.Event()

    def waiting(holder: Holder) -> None:
        seen.append(holder)
        more.set()

    async def wait() -> None:
        async with theirs.claim(work, within=2 * PATIENCE, waiting=waiting) as claim:
            require(claim is not None, "a claim that was given back is not given to one that waits")
            got.set()

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with ours.claim(work, within=0, label="node-7") as first:
                require(first is not None, "a claim that nobody holds is not given")
                tasks.start_soon(wait)
                for text in ("", "half", "all"):
                    if first is not None and text:
                        first.tell(text)
                    with within(PATIENCE, f"{Holder('node-7', text)} is not told to one that waits, but {seen}"):
                        while Holder("node-7", text) not in seen:
                            more = anyio.Event()
                            await more.wait()
                scope.cancel()
                await anyio.sleep(PATIENCE)
        with within(PATIENCE, "a claim that was given back is not given to one that waits"):
            await got.wait()


async def a_wait_that_is_cancelled_holds_nothing(make: Callable[[], Backend]) -> None:
    """Neither then nor when the holder has given the claim back; the error of a body is raised as it is."""
    ours, theirs = make().claims(), make().claims()
    if ours is None or theirs is None:
        return
    work = f"check {secrets.token_hex(8)}"
    try:
        async with ours.claim(work, within=0):
            with within(LEAVING, "a wait does not end when it is cancelled"), anyio.move_on_after(0.5):
                async with theirs.claim(work, within=PATIENCE):
                    raise Failed("two instances hold one claim")
            raise KeyError(work)
    except KeyError as error:
        require(error.args == (work,), "another error than that of the body is raised")
    async with ours.claim(work, within=0) as again:
        require(again is not None, "a claim is held by a wait that was cancelled")


BACKEND_CHECKS: tuple[BackendCheck, ...] = (
    it_makes_its_parts,
    what_is_published_is_found,
    an_entry_is_found_whole,
    only_what_is_wanted_is_found,
    another_generation_is_another_server,
    a_server_is_withdrawn_however_its_context_ends,
    a_publisher_refuses_what_the_caller_does_wrong,
    one_instance_holds_a_claim,
    of_many_exactly_one_gets_a_claim,
    those_that_wait_see_who_and_how_far,
    a_wait_that_is_cancelled_holds_nothing,
)
"""All checks of a `Backend`, in order."""
