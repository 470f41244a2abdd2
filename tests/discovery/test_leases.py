"""Sources, publishing and claims over a registry in memory, in simulated time."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import anyio
import msgspec
import pytest

from netloader.core.addresses import Address
from netloader.core.entries import Entry, Load, encode_entry
from netloader.discovery import Backend, Claim, Holder, Wanted
from netloader.discovery.beside import beside
from netloader.discovery.leases import LeaseBackend
from netloader.discovery.leases.names import lock_name, progress_name, server_name
from netloader.discovery.outage import Outage
from netloader.discovery.publishing import Updates
from netloader.errors import ConfigError, DiscoveryError, LocalProtocolError
from tests.discovery.forged import NESTED, forged
from tests.discovery.world import Faulty, Watcher
from tests.drivers.jumping import run

TTL = 15.0
LEASES = 2 * TTL
AT_ONCE = 2.0
WANTED = Wanted("key", 0)
ONE = Entry("key", "10.0.0.1:1", "first", labels={"zone": "a"})
TWO = Entry("key", "[fd00::2]:1", "second", load=Load(clients=1, cap=2))
AT_ONE, AT_TWO = Address("10.0.0.1", 1), Address("fd00::2", 1)


def backend(world: Faulty) -> LeaseBackend:
    return LeaseBackend(world, ttl=TTL, name="memory")


def watched(work: Callable[[Faulty, Watcher], Awaitable[None]]) -> Watcher:
    """Run `work` with a registry and a client that watches it, in simulated time."""

    async def main(_: object) -> Watcher:
        world = Faulty()
        watcher = Watcher(backend(world).sources(WANTED))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            await watcher.listed.wait()
            await work(world, watcher)
            tasks.cancel_scope.cancel()
        return watcher

    return run(main, alone=True)


async def killed_after(seconds: float, world: Faulty, entry: Entry) -> None:
    """A server that publishes, and dies without a word."""
    publisher = backend(world).publisher()
    with anyio.move_on_after(seconds):
        async with publisher.publish(entry):
            try:
                await anyio.sleep_forever()
            finally:
                world.fault = lambda method: "refused" if method == "remove" else ""
    world.start()


def test_it_is_a_backend() -> None:
    assert isinstance(LeaseBackend(Faulty()), Backend)


@pytest.mark.parametrize(("argument", "value"), [("ttl", 0.5), ("ttl", 31.0), ("prefix", "a*b"), ("prefix", "/a")])
def test_a_lease_and_a_prefix_have_bounds(argument: str, value: object) -> None:
    with pytest.raises(ConfigError, match=argument):
        LeaseBackend(Faulty(), **{argument: value})  # type: ignore[arg-type]


def test_a_published_server_is_found_changes_and_is_withdrawn() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        publisher = backend(world).publisher()
        async with publisher.publish(ONE) as published, publisher.publish(TWO):
            await watcher.until(lambda: len(watcher.sources) == 2, AT_ONCE)
            assert watcher.sources[AT_ONE] == ONE.source()
            assert watcher.sources[AT_TWO].load == 0.5
            await anyio.sleep(10 * TTL)
            for clients in range(1, 6):
                published.update(msgspec.structs.replace(ONE, load=Load(clients=clients)))
            puts = world.calls.count("put")
            await watcher.until(lambda: watcher.sources[AT_ONE].load == 5.0, AT_ONCE)
            assert world.calls.count("put") == puts + 1
            with pytest.raises(LocalProtocolError, match="already"):
                async with publisher.publish(ONE):
                    pass
            with pytest.raises(LocalProtocolError, match="another server"):
                published.update(TWO)
            with pytest.raises(DiscoveryError, match="bytes"):
                published.update(msgspec.structs.replace(ONE, labels={"long": "x" * 10_000}))
        await watcher.until(lambda: not watcher.sources, AT_ONCE)

    words = watched(work).words
    assert words[:2] == [".", "+10.0.0.1:1/first"]
    assert sorted(words[-2:]) == ["-10.0.0.1:1", "-[fd00::2]:1"]


def test_others_than_wanted_are_not_found() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        others = [
            msgspec.structs.replace(ONE, key="another key " * 50),
            msgspec.structs.replace(ONE, rank=1),
            msgspec.structs.replace(ONE, role="draft"),
        ]
        publisher = backend(world).publisher()
        async with publisher.publish(others[0]), publisher.publish(others[1]), publisher.publish(others[2]):
            await anyio.sleep(LEASES)
            assert watcher.words == ["."]
            for other in others:
                of_other = Watcher(backend(world).sources(Wanted(other.key, other.rank, other.role)))
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(of_other.run)
                    with anyio.fail_after(AT_ONCE):
                        await of_other.listed.wait()
                    assert list(of_other.sources) == [AT_ONE]
                    tasks.cancel_scope.cancel()

    watched(work)


def test_a_dead_server_is_gone_within_two_leases_and_not_before_one() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        await killed_after(20.0, world, ONE)
        assert AT_ONE in watcher.sources
        began = anyio.current_time()
        await watcher.until(lambda: not watcher.sources, LEASES)
        assert anyio.current_time() - began > TTL / 2

    watched(work)


def test_a_restarted_server_replaces_itself_at_once() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        await killed_after(20.0, world, ONE)
        async with backend(world).publisher().publish(msgspec.structs.replace(ONE, generation="second")):
            await watcher.until(lambda: "+10.0.0.1:1/second" in watcher.words, AT_ONCE)
            await anyio.sleep(LEASES)

    assert watched(work).words[:4] == [".", "+10.0.0.1:1/first", "-10.0.0.1:1", "+10.0.0.1:1/second"]


def test_of_two_servers_at_one_address_the_later_stays(caplog: pytest.LogCaptureFixture) -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        later = msgspec.structs.replace(ONE, generation="second")
        async with backend(world).publisher().publish(ONE):
            await watcher.until(lambda: len(watcher.sources) == 1, AT_ONCE)
            async with backend(world).publisher().publish(later):
                await anyio.sleep(4 * TTL)
                assert watcher.words == [".", "+10.0.0.1:1/first", "-10.0.0.1:1", "+10.0.0.1:1/second"]
            await anyio.sleep(LEASES)
            assert watcher.words[4:] == ["-10.0.0.1:1", "+10.0.0.1:1/first"]

    watched(work)
    assert [record.levelname for record in caplog.records if "another server" in record.getMessage()] == ["WARNING"]


def test_a_server_that_was_cut_off_does_not_replace_a_later_one() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        later = msgspec.structs.replace(ONE, generation="second")
        cut = Faulty(world.registry)
        async with backend(cut).publisher().publish(ONE) as published:
            await watcher.until(lambda: AT_ONE in watcher.sources, AT_ONCE)
            cut.stop()
            async with backend(world).publisher().publish(later):
                await anyio.sleep(TTL)
                published.update(msgspec.structs.replace(ONE, load=Load(clients=3)))
                await anyio.sleep(TTL)
                cut.start()
                await anyio.sleep(2 * TTL)
                assert watcher.words == [".", "+10.0.0.1:1/first", "-10.0.0.1:1", "+10.0.0.1:1/second"]

    watched(work)


def test_an_emptied_registry_makes_nobody_vanish() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        async with backend(world).publisher().publish(ONE), backend(world).publisher().publish(TWO):
            await watcher.until(lambda: len(watcher.sources) == 2, AT_ONCE)
            for _ in range(20):
                world.registry.flush()
                await anyio.sleep(7.1)
                assert len(world.registry.names) == 2

    assert [word for word in watched(work).words if word.startswith("-")][:-2] == []


@pytest.mark.parametrize("seconds", [1.0, 14.0, 60.0, 600.0])
@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("fault", ["refused", "stuck"])
def test_an_outage_makes_nobody_vanish(
    seconds: float, emptied: bool, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def work(world: Faulty, watcher: Watcher) -> None:
        async with backend(world).publisher().publish(ONE) as published:
            await watcher.until(lambda: len(watcher.sources) == 1, AT_ONCE)
            world.stop()
            world.fault = lambda _: fault
            await anyio.sleep(seconds / 2)
            published.update(msgspec.structs.replace(ONE, load=Load(clients=3)))
            await anyio.sleep(seconds / 2)
            if emptied:
                world.registry.flush()
            world.start()
            await watcher.until(lambda: watcher.sources[AT_ONE].load == 3.0, TTL)
            await anyio.sleep(LEASES)
            assert watcher.words == [".", "+10.0.0.1:1/first", "+10.0.0.1:1/first"]

    watched(work)
    levels = [record.levelname for record in caplog.records if record.name == "netloader"]
    assert levels.count("WARNING") <= 2  # the server and the client once each
    assert levels.count("INFO") <= 3
    if seconds >= 14.0:
        assert levels.count("WARNING") == 2


def test_a_server_that_starts_while_the_registry_is_down_is_found_later() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        world.stop()
        async with backend(world).publisher().publish(ONE):
            await anyio.sleep(100.0)
            assert watcher.words == ["."]
            world.start()
            await watcher.until(lambda: AT_ONE in watcher.sources, TTL)

    watched(work)


def test_a_server_whose_last_answer_was_lost_is_withdrawn_all_the_same() -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        async with backend(world).publisher().publish(ONE) as published:
            await watcher.until(lambda: len(watcher.sources) == 1, AT_ONCE)
            world.fault = lambda method: "lost" if method == "put" else ""
            published.update(msgspec.structs.replace(ONE, load=Load(clients=3)))
            await watcher.until(lambda: watcher.sources[AT_ONE].load == 3.0, AT_ONCE)
        await watcher.until(lambda: not watcher.sources, AT_ONCE)

    watched(work)


def test_what_is_no_entry_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        store = backend(world)
        name = server_name("netloader", ONE)
        async with store._open() as connection:
            garbage = {
                "a": b"\xff",
                "b": b"{}",
                "c": b"x" * 60_000,
                "d": encode_entry(ONE),
                "e": encode_entry(ONE).replace(b'"labels":{', b'"load":{"clients":1e999},"labels":{'),
                **{f"f{number}": value for number, value in enumerate(forged(ONE).values())},
            }
            for tail, value in garbage.items():
                await connection.put(name.replace("10.0.0.1:1", tail), value, ttl=100.0)
        async with store.publisher().publish(TWO):
            await watcher.until(lambda: AT_TWO in watcher.sources, AT_ONCE)
            await anyio.sleep(LEASES)
            assert list(watcher.sources) == [AT_TWO]

    watched(work)
    assert len([record for record in caplog.records if "can't be used" in record.getMessage()]) == 1


@pytest.mark.parametrize("value", forged(ONE).values(), ids=forged(ONE))
def test_a_forged_entry_hides_no_other(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It stands under the very name that it says, so nothing but its value tells that it is of no use."""

    async def work(world: Faulty, watcher: Watcher) -> None:
        async with backend(world)._open() as connection, backend(world).publisher().publish(TWO):
            await watcher.until(lambda: AT_TWO in watcher.sources, AT_ONCE)
            await connection.put(server_name("netloader", ONE), value, ttl=100.0)
            await anyio.sleep(LEASES)
            assert list(watcher.sources) == [AT_TWO]

    watched(work)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("value", [*forged(ONE).values(), b"withdrawn"], ids=[*forged(ONE), "withdrawn"])
def test_a_forged_entry_ends_no_renewal(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It was written under the name of a server that does not know what its last call did, and so reads it."""

    async def work(world: Faulty, watcher: Watcher) -> None:
        name = server_name("netloader", ONE)
        async with backend(world).publisher().publish(ONE) as published:
            await watcher.until(lambda: AT_ONE in watcher.sources, AT_ONCE)
            world.fault = lambda method: "lost" if method == "put" else ""
            published.update(msgspec.structs.replace(ONE, load=Load(clients=3)))
            await watcher.until(lambda: watcher.sources[AT_ONE].load == 3.0, AT_ONCE)
            world.start()
            world.registry.names[name] = value, anyio.current_time() + TTL
            await watcher.until(lambda: AT_ONE not in watcher.sources, TTL)
            await watcher.until(lambda: AT_ONE in watcher.sources, LEASES)  # when it has expired

    watched(work)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_whatever_a_publisher_raises_it_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[float] = []

    async def send(_: bytes) -> None:
        sent.append(anyio.current_time())
        if len(sent) == 2:
            raise RuntimeError("a fault")

    async def main(_: object) -> None:
        updates = Updates(ONE, send, Outage("publishing"), renew=5.0, retry=1.0, every=1.0)
        await updates.send()
        with anyio.move_on_after(30.0):
            await updates.run()

    run(main, alone=True)
    assert len(sent) >= 6
    assert "a fault" in caplog.text


def test_a_task_that_ended_is_logged_while_the_context_is_open(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("a fault")

    async def main(_: object) -> None:
        async with beside(fail, "the work"):
            await anyio.sleep(1.0)
            assert "the work has ended: a fault" in caplog.text
        assert caplog.text.count("has ended") == 1

    run(main, alone=True)


def test_a_task_that_does_not_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def stay() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(20.0)

    async def main(_: object) -> None:
        async with beside(stay, "the work"):
            await anyio.sleep(1.0)
        assert "the work does not end within 5 s" in caplog.text
        await anyio.sleep(30.0)

    run(main, alone=True)


def test_too_many_entries_are_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def work(world: Faulty, watcher: Watcher) -> None:
        async with backend(world)._open() as connection:
            for number in range(4200):
                entry = msgspec.structs.replace(ONE, address=f"10.0.{number // 200}.{number % 200}:1")
                await connection.put(server_name("netloader", entry), encode_entry(entry), ttl=1000.0)
        await watcher.until(lambda: len(watcher.sources) == 4096, AT_ONCE + TTL)
        await anyio.sleep(LEASES)
        assert len(watcher.sources) == 4096

    watched(work)
    assert len([record for record in caplog.records if "4096" in record.getMessage()]) == 1


# --- claims -----------------------------------------------------------------------------------------------------------


def is_held(claim: Claim) -> bool:
    """For mypy, which takes a property for constant."""
    return claim.held


def claimed(work: Callable[[Faulty], Awaitable[None]]) -> None:
    async def main(_: object) -> None:
        await work(Faulty())

    run(main, alone=True)


def test_one_instance_holds_a_claim_and_the_others_see_who_and_how_far() -> None:
    async def work(world: Faulty) -> None:
        told: list[Holder] = []
        got = anyio.Event()

        async def wait() -> None:
            async with backend(world).claims().claim("w", within=1000.0, waiting=told.append) as claim:
                assert claim is not None
                got.set()

        async with anyio.create_task_group() as tasks:
            async with backend(world).claims().claim("w", within=0, label="node-7") as first:
                assert first is not None
                tasks.start_soon(wait)
                await anyio.sleep(5.0)
                first.tell("1 of 2 GB")
                await anyio.sleep(50 * TTL)
                first.tell("2 of 2 GB\n")
                await anyio.sleep(5.0)
                assert is_held(first)
                async with backend(world).claims().claim("w", within=1.0) as second:
                    assert second is None
                async with backend(world).claims().claim("another", within=0) as other:
                    assert other is not None
            assert not is_held(first)
            with anyio.fail_after(AT_ONCE):
                await got.wait()
        assert told == [Holder("node-7"), Holder("node-7", "1 of 2 GB"), Holder("node-7", "2 of 2 GB\\n")]

    claimed(work)


def test_a_dead_holder_is_followed_within_two_leases() -> None:
    async def work(world: Faulty) -> None:
        with anyio.move_on_after(100.0):
            async with backend(world).claims().claim("w", within=0) as first:
                assert first is not None
                try:
                    await anyio.sleep_forever()
                finally:
                    world.fault = lambda method: "refused" if method in {"remove", "put"} else ""
        world.start()
        began = anyio.current_time()
        async with backend(world).claims().claim("w", within=LEASES) as second:
            assert second is not None
            assert anyio.current_time() - began > TTL / 2

    claimed(work)


def test_a_holder_that_cannot_renew_has_lost_it_before_another_gets_it() -> None:
    async def work(world: Faulty) -> None:
        cut = Faulty(world.registry)
        async with backend(cut).claims().claim("w", within=0) as first:
            assert first is not None
            await anyio.sleep(100.0)
            cut.stop()
            async with anyio.create_task_group() as tasks:

                async def follow() -> None:
                    async with backend(world).claims().claim("w", within=LEASES) as second:
                        assert second is not None
                        assert not first.held
                        await anyio.sleep(100.0)

                tasks.start_soon(follow)
                with anyio.fail_after(TTL):
                    await first.lost()
                cut.start()
                await anyio.sleep(50.0)
                assert not first.held
        async with backend(world).claims().claim("w", within=LEASES) as third:
            assert third is not None

    claimed(work)


def test_an_emptied_registry_gives_a_claim_to_nobody_else_that_waits() -> None:
    async def work(world: Faulty) -> None:
        async with anyio.create_task_group() as tasks, backend(world).claims().claim("w", within=0) as first:
            assert first is not None

            async def wait() -> None:
                async with backend(world).claims().claim("w", within=10_000.0):
                    assert not first.held

            for _ in range(3):
                tasks.start_soon(wait)
            for _ in range(20):
                await anyio.sleep(7.3)
                world.registry.flush()
            await anyio.sleep(LEASES)
            assert first.held
            tasks.cancel_scope.cancel()

    claimed(work)


def test_a_claim_whose_answer_was_lost_is_held_or_given_back() -> None:
    async def work(world: Faulty) -> None:
        world.fault = lambda method: "lost" if method == "create" else ""
        with pytest.raises(DiscoveryError):
            async with backend(world).claims().claim("w", within=0):
                pass
        assert world.registry.names == {}
        world.start()
        async with backend(world).claims().claim("w", within=0):
            asked: list[str] = []

            def fault(method: str) -> str:
                asked.append(method)
                return "lost" if method == "create" and asked.count("create") == 2 else ""

            other = Faulty(world.registry)
            other.fault = fault
            async with anyio.create_task_group() as tasks:

                async def wait() -> None:
                    async with backend(other).claims().claim("w", within=100.0) as second:
                        assert second is not None
                        assert second.held

                tasks.start_soon(wait)
                await anyio.sleep(5.0)
                world.registry.flush()
                world.stop()
                await anyio.sleep(50.0)
                world.start()

    claimed(work)


def test_a_registry_that_is_down_ends_a_wait_after_two_leases() -> None:
    async def work(world: Faulty) -> None:
        async with backend(Faulty(world.registry)).claims().claim("w", within=0):
            began = anyio.current_time()
            async with anyio.create_task_group() as tasks:

                async def wait() -> None:
                    with pytest.raises(DiscoveryError):
                        async with backend(world).claims().claim("w", within=10_000.0):
                            pass
                    assert 100.0 + LEASES < anyio.current_time() - began < 100.0 + LEASES + TTL

                tasks.start_soon(wait)
                await anyio.sleep(50.0)
                world.stop()
                await anyio.sleep(LEASES - 5)
                world.start()
                await anyio.sleep(50.0 - LEASES + 5)
                world.stop()

    claimed(work)


@pytest.mark.parametrize("name", [lock_name, progress_name])
@pytest.mark.parametrize("value", [b'{"token":"a","holder":"b","text":"c","x":' + NESTED, NESTED, b"\xff", b"{}"])
def test_a_forged_claim_is_held_until_it_expires(value: bytes, name: Callable[[str, str], str]) -> None:
    async def work(world: Faulty) -> None:
        if name is progress_name:
            world.registry.names[lock_name("netloader", "w")] = b"somebody", anyio.current_time() + TTL
        world.registry.names[name("netloader", "w")] = value, anyio.current_time() + TTL
        async with backend(world).claims().claim("w", within=2.0) as claim:
            assert claim is None
        async with backend(world).claims().claim("w", within=LEASES) as claim:
            assert claim is not None
            assert is_held(claim)

    claimed(work)


@pytest.mark.parametrize("fault", ["refused", "stuck"])
def test_a_wait_may_begin_while_the_registry_is_down(fault: str) -> None:
    async def work(world: Faulty) -> None:
        world.fault = lambda _: fault
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:

            async def wait(within: float, least: float, most: float) -> None:
                with pytest.raises(DiscoveryError):
                    async with backend(world).claims().claim("w", within=within):
                        pass
                assert least <= anyio.current_time() - began <= most

            tasks.start_soon(wait, 0.0, 0.0, 2 * TTL / 3)
            tasks.start_soon(wait, 10.0, 10.0, 10.0 + TTL)
            tasks.start_soon(wait, 10_000.0, LEASES, LEASES + 4 * TTL / 3)
        async with anyio.create_task_group() as tasks:

            async def get() -> None:
                began = anyio.current_time()
                async with backend(world).claims().claim("w", within=10_000.0) as claim:
                    assert claim is not None
                    assert TTL <= anyio.current_time() - began < 2 * TTL

            tasks.start_soon(get)
            await anyio.sleep(TTL)
            world.start()

    claimed(work)


def test_a_claim_whose_first_answer_was_lost_is_held_at_once() -> None:
    async def work(world: Faulty) -> None:
        world.fault = lambda method: "lost" if method == "create" and "create" not in world.calls[:-1] else ""
        told: list[Holder] = []
        began = anyio.current_time()
        async with backend(world).claims().claim("w", within=LEASES, waiting=told.append) as claim:
            assert claim is not None
            assert anyio.current_time() - began < AT_ONCE
        assert told == []

    claimed(work)


def test_a_cancelled_wait_holds_nothing() -> None:
    async def work(world: Faulty) -> None:
        async with backend(world).claims().claim("w", within=0):
            with anyio.move_on_after(20.0):
                async with backend(world).claims().claim("w", within=1000.0):
                    raise AssertionError("it is held")
        async with backend(world).claims().claim("w", within=0) as claim:
            assert claim is not None

    claimed(work)


def test_the_error_of_a_body_is_raised_as_it_is() -> None:
    async def work(world: Faulty) -> None:
        with pytest.raises(KeyError):
            async with backend(world).publisher().publish(ONE):
                raise KeyError("mine")
        with pytest.raises(KeyError):
            async with backend(world).claims().claim("w", within=0):
                raise KeyError("mine")
        async with backend(world).claims().claim("w", within=0) as claim:
            assert claim is not None

    claimed(work)
