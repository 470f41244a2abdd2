"""``dns://`` and ``dns+srv://``, with a real name server. Its seconds are real, those of the client are simulated."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

pytest.importorskip("dns", reason="needs dnspython (the extra dns)")

from netloader.core.addresses import Address
from netloader.discovery import Backend, Wanted
from netloader.discovery.conformance import (
    PROVIDER_CHECKS,
    ProviderCheck,
    check_backend,
    check_provider,
)
from netloader.discovery.dns_records import _parse
from netloader.discovery.registry import open_backend
from netloader.errors import ConfigError
from tests.discovery.nameserver import NameServer, needs_dnsmasq
from tests.discovery.world import Watcher
from tests.drivers.jumping import Clock, run

PORT = 19374
SOON = 20.0
LATER = 40.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NameServer]:
    with NameServer(tmp_path) as running:
        yield running


def at(*hosts: str, port: int = PORT) -> list[Address]:
    return [Address(host, port) for host in hosts]


def watched(url: str, work: Callable[[Watcher], Awaitable[None]], rank: int = 0) -> Watcher:
    async def main(clock: Clock) -> Watcher:
        clock.watching = lambda: True  # the name server is another process: give it real time before each jump
        watcher = Watcher(open_backend(url).sources(Wanted("key", rank)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            await work(watcher)
            tasks.cancel_scope.cancel()
        return watcher

    return run(main)


async def listed(watcher: Watcher) -> None:
    with anyio.fail_after(SOON):
        await watcher.listed.wait()


@needs_dnsmasq
@pytest.mark.parametrize("check", PROVIDER_CHECKS, ids=lambda check: check.__name__)
def test_it_is_a_provider(check: ProviderCheck, server: NameServer) -> None:
    there: list[str] = []

    @asynccontextmanager
    async def available(address: Address) -> AsyncIterator[None]:
        there.append(address.host)
        await anyio.to_thread.run_sync(partial(server.set, sources=list(there)))
        yield
        there.remove(address.host)
        await anyio.to_thread.run_sync(partial(server.set, sources=list(there)))

    async def main(clock: Clock) -> None:
        clock.watching = lambda: True
        backend = open_backend(f"dns://sources.fleet.test:{PORT}?server={server.address}&family=any")
        await check_backend(lambda: backend)  # it neither publishes nor claims
        await check_provider(backend.sources(Wanted("key")), available, [check])

    run(main)


@needs_dnsmasq
def test_the_rank_is_added_to_the_port_or_stands_in_the_name(server: NameServer) -> None:
    server.set(sources=["10.0.0.1"], rank_3=["10.0.0.3"], rank_33=["10.0.0.33"])
    base = f"?server={server.address}"
    assert list(watched(f"dns://sources.fleet.test:{PORT}{base}", listed, 3).sources) == at("10.0.0.1", port=PORT + 3)
    assert list(watched(f"dns://rank-{{rank}}.fleet.test:{PORT}{base}", listed, 3).sources) == at("10.0.0.3")
    assert list(watched(f"DNS://Rank-{{rank}}{{rank}}.fleet.test.:{PORT}{base}", listed, 3).sources) == at("10.0.0.33")


@needs_dnsmasq
def test_families(server: NameServer) -> None:
    server.set(both=["10.0.0.1", "fd00::1"], six=["fd00::2"], four=["10.0.0.4"])

    def found(name: str, family: str) -> set[Address]:
        url = f"dns://{name}.fleet.test:{PORT}?server={server.address}{family}"
        return set(watched(url, listed).sources)

    assert found("both", "") == {*at("10.0.0.1")}
    assert found("both", "&family=any") == {*at("10.0.0.1", "fd00::1")}
    assert found("both", "&family=6") == {*at("fd00::1")}
    assert found("six", "") == {*at("fd00::2")}
    assert found("six", "&family=4") == set()
    assert found("four", "") == {*at("10.0.0.4")}


@needs_dnsmasq
def test_servers_that_come_and_go(server: NameServer) -> None:
    """A name without records has no source yet; a server that restarts on the same address is there all the time."""

    async def work(watcher: Watcher) -> None:
        await listed(watcher)
        assert watcher.sources == {}
        await anyio.to_thread.run_sync(partial(server.set, sources=["10.0.0.1", "10.0.0.2"]))
        await watcher.until(lambda: len(watcher.sources) == 2, SOON)
        await anyio.to_thread.run_sync(partial(server.set, sources=["10.0.0.2", "10.0.0.3"]))
        await watcher.until(lambda: at("10.0.0.3")[0] in watcher.sources, SOON)
        await watcher.until(lambda: list(watcher.sources) == at("10.0.0.2", "10.0.0.3"), LATER)
        await anyio.to_thread.run_sync(server.set)
        await watcher.until(lambda: not watcher.sources, LATER)

    words = watched(f"dns://sources.fleet.test:{PORT}?server={server.address}", work).words
    assert words.count(f"+10.0.0.2:{PORT}/") == 1


@needs_dnsmasq
@pytest.mark.parametrize("how", ["stopped", "paused"])
def test_a_name_server_that_is_down_makes_nobody_vanish(
    how: str, server: NameServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.set(sources=["10.0.0.1"])

    async def work(watcher: Watcher) -> None:
        await listed(watcher)
        await anyio.to_thread.run_sync(server.stop if how == "stopped" else server.pause)
        await anyio.sleep(100.0)
        await anyio.to_thread.run_sync(server.start if how == "stopped" else server.go_on)
        await anyio.to_thread.run_sync(partial(server.set, sources=["10.0.0.1", "10.0.0.2"]))
        await watcher.until(lambda: len(watcher.sources) == 2, SOON)

    words = watched(f"dns://sources.fleet.test:{PORT}?server={server.address}", work).words
    assert words == [f"+10.0.0.1:{PORT}/", ".", f"+10.0.0.2:{PORT}/"]
    ours = [record for record in caplog.records if record.name == "netloader"]
    assert [record.levelname for record in ours] == ["WARNING", "INFO"]
    assert "sources.fleet.test" in ours[0].getMessage()


@needs_dnsmasq
def test_a_thousand_servers_do_not_fit_into_one_packet(server: NameServer) -> None:
    hosts = [f"10.0.{number // 200}.{number % 200 + 1}" for number in range(1000)]
    server.set(sources=hosts)
    found = watched(f"dns://sources.fleet.test:{PORT}?server={server.address}", listed).sources
    assert set(found) == set(at(*hosts))


@needs_dnsmasq
def test_short_and_long_times_to_live_are_bounded(tmp_path: Path) -> None:
    for ttl, expected in ((0, 1.0), (7, 7.0), (3600, 30.0)):
        with NameServer(tmp_path, ttl=ttl) as server:
            server.set(sources=["10.0.0.1"])

            async def work(watcher: Watcher, server: NameServer = server) -> None:
                await listed(watcher)
                await anyio.to_thread.run_sync(partial(server.set, sources=["10.0.0.1", "10.0.0.2"]))
                await watcher.until(lambda: len(watcher.sources) == 2, LATER)

            history = watched(f"dns://sources.fleet.test:{PORT}?server={server.address}", work).history
            between = history[-1][0] - history[0][0]
            assert expected <= between < expected + 0.5, ttl


@needs_dnsmasq
def test_srv_records(tmp_path: Path) -> None:
    services = [
        "_pull._tcp.fleet.test,host-2.fleet.test,7000,20,5",
        "_pull._tcp.fleet.test,host-1.fleet.test,8000,10,5",
        "_pull._tcp.fleet.test,gone.fleet.test,8000,10,5",
        "_pull._tcp.fleet.test,host-1.fleet.test,65535,10,5",
        "_rank-2._tcp.fleet.test,host-1.fleet.test,9000,0,0",
        "_none._tcp.fleet.test",
    ]
    with NameServer(tmp_path, services=services) as server:
        server.set(host_1=["10.0.0.1", "10.0.0.11"], host_2=["10.0.0.2"])
        base = f"?server={server.address}"
        found = watched(f"dns+srv://_pull._tcp.fleet.test{base}", listed, 2).sources
        assert set(found) == {
            Address("10.0.0.1", 8002),
            Address("10.0.0.11", 8002),
            Address("10.0.0.2", 7002),
        }
        by_name = watched(f"dns+srv://_rank-{{rank}}._tcp.fleet.test{base}", listed, 2).sources
        assert set(by_name) == set(at("10.0.0.1", "10.0.0.11", port=9000))
        assert watched(f"dns+srv://_none._tcp.fleet.test{base}", listed).sources == {}
        assert watched(f"dns+srv://_other._tcp.fleet.test{base}", listed).sources == {}


@needs_dnsmasq
def test_a_target_without_an_answer_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The name server refuses names of other domains."""
    services = [
        "_pull._tcp.fleet.test,host-1.fleet.test,8000",
        *(f"_pull._tcp.fleet.test,host-{number}.elsewhere.test,8000" for number in range(20)),
        "_refused._tcp.fleet.test,host-1.elsewhere.test,8000",
    ]

    async def work(watcher: Watcher) -> None:
        await listed(watcher)
        assert list(watcher.sources) == at("10.0.0.1", port=8000)
        await anyio.sleep(10.0)
        assert list(watcher.sources) == at("10.0.0.1", port=8000)

    async def nothing(watcher: Watcher) -> None:
        await anyio.sleep(10.0)
        assert not watcher.listed.is_set()  # that there is nobody is not known

    with NameServer(tmp_path, services=services) as server:
        server.set(host_1=["10.0.0.1"])
        watched(f"dns+srv://_pull._tcp.fleet.test?server={server.address}", work)
        said = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
        assert len(said) == len(set(said)) == 20
        watched(f"dns+srv://_refused._tcp.fleet.test?server={server.address}", nothing)


@needs_dnsmasq
def test_the_configuration_of_the_host_counts(
    server: NameServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search domains and ndots, as in a pod; and a file that is not there yet is waited for."""
    import dns.asyncresolver

    server.set(sources__pull=["10.0.0.1"])
    configuration = tmp_path / "resolv.conf"
    make = dns.asyncresolver.Resolver

    def of_this_host() -> dns.asyncresolver.Resolver:
        resolver = make(str(configuration))
        resolver.port = server.address.port
        return resolver

    monkeypatch.setattr(dns.asyncresolver, "Resolver", of_this_host)

    async def work(watcher: Watcher) -> None:
        await anyio.sleep(10.0)
        assert watcher.words == []
        text = "nameserver 127.0.0.1\nsearch svc.fleet.test fleet.test\noptions ndots:5\n"
        await anyio.Path(configuration).write_text(text)
        await watcher.until(lambda: list(watcher.sources) == at("10.0.0.1"), SOON)

    watched(f"dns://sources.pull:{PORT}", work)


def test_it_is_a_backend_that_others_fill() -> None:
    backend: Backend = open_backend(f"dns://sources:{PORT}")
    assert isinstance(backend, Backend)
    assert backend.publisher() is None
    assert backend.claims() is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("dns://sources", "the port is missing; allowed: dns://NAME:PORT"),
        ("dns:sources:1", "// is missing"),
        ("dns://:19374", "the host is missing"),
        ("dns://sources:0", "the port is not a number"),
        ("dns://sources:x", "the port is not a number"),
        ("dns://sources:19374/path", "nothing but parameters"),
        ("dns://user@sources:19374", "no user name"),
        ("dns://10.0.0.1:19374", "this is an address: give it as a source"),
        ("dns://[fd00::1]:19374", "this is an address"),
        ("dns://[fd00", "Invalid IPv6 URL"),
        ("dns://so urces:19374", "can't be part of a host name"),
        ("dns://{role}.x:19374", "can't be part of a host name"),
        ("dns://sources:19374?server=resolver", "no IP address"),
        ("dns://sources:19374?server=10.0.0.53:0", "no IP address"),
        ("dns://sources:19374?family=5", "family is '5'"),
        ("dns://sources:19374?ttl=5", "no parameter 'ttl'"),
        ("dns+srv://sources:19374", "SRV records have their own ports"),
        ("dns+srv://", "the host is missing"),
    ],
)
def test_a_wrong_url_is_refused_by_name(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_backend(url)


@pytest.mark.parametrize(
    ("server", "expected"),
    [("10.0.0.53", "10.0.0.53:53"), ("10.0.0.53:5353", "10.0.0.53:5353"), ("[fd00::53]:5353", "[fd00::53]:5353")],
)
def test_the_name_server_may_have_a_port(server: str, expected: str) -> None:
    assert _parse(f"dns://sources:1?server={server}").server == expected


def test_a_rank_whose_port_is_too_high_is_refused() -> None:
    backend = open_backend("dns://sources:65530")
    with pytest.raises(ConfigError, match="at most 65535 when rank 6 is added"):
        backend.sources(Wanted("key", 6))
    open_backend("dns://sources-{rank}:65530").sources(Wanted("key", 6))
