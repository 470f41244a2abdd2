"""Where a server listens and how it is reached."""

from __future__ import annotations

import logging
import socket

import pytest

import netloader
from netloader.core.addresses import Address, parse_address
from netloader.errors import ConfigError, NoSourceLeft
from tests.drivers import kit

SOURCE = kit.weights(rows=3)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


async def pulls_from(address: str, hub: kit.Hub) -> None:
    into = kit.blank(SOURCE)
    report = await netloader.pull(into, kit.IDENTITY, sources=[address], transport=hub.transport, timeout=kit.PATIENCE)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert list(report.sources) == [str(parse_address(address))]


def server_at(host: str | None, hub: kit.Hub, port: int = 0) -> netloader.Server:
    return netloader.Server(SOURCE, kit.IDENTITY, host=host, port=port, transport=hub.transport)


@needs_ipv6
async def test_a_server_on_the_wildcard_address_accepts_ipv4_ipv6_and_host_names() -> None:
    hub = kit.Hub()
    async with server_at(None, hub) as server:
        assert server.host == "::"
        for host in ("127.0.0.1", "[::1]", "localhost"):
            await pulls_from(f"{host}:{server.port}", hub)
        assert server.address.host not in ("::", "0.0.0.0")


@pytest.mark.parametrize(
    ("host", "reached_by"),
    [("127.0.0.1", "127.0.0.1"), pytest.param("::1", "[::1]", marks=needs_ipv6), ("localhost", "localhost")],
)
async def test_a_server_bound_to_one_address_is_reached_by_that_address(host: str, reached_by: str) -> None:
    hub = kit.Hub()
    async with server_at(host, hub) as server:
        await pulls_from(f"{reached_by}:{server.port}", hub)
        assert str(server.address).startswith("[" if ":" in server.host else server.host)


async def test_a_server_bound_to_one_address_is_not_reached_by_other_addresses() -> None:
    hub = kit.Hub()
    async with server_at("127.0.0.1", hub) as server:
        with pytest.raises(NoSourceLeft, match="cannot be reached"):
            await pulls_from(f"127.0.0.2:{server.port}", hub)


@pytest.mark.parametrize("host", ["127.0.0.1", None])
async def test_a_port_in_use_is_an_error_that_names_the_configuration_field(host: str | None) -> None:
    hub = kit.Hub()
    async with server_at(host, hub) as server:
        with pytest.raises(ConfigError, match="Address already in use") as caught:
            await server_at(host, hub, server.port).__aenter__()
    assert caught.value.field == "LISTEN_PORT"
    assert str(server.port) in str(caught.value)
    assert "another port" in caught.value.hint


async def test_the_port_is_free_as_soon_as_the_server_has_ended() -> None:
    hub = kit.Hub()
    async with server_at("127.0.0.1", hub) as first:
        await pulls_from(f"127.0.0.1:{first.port}", hub)
    async with server_at("127.0.0.1", hub, first.port) as second:
        assert second.port == first.port
        await pulls_from(f"127.0.0.1:{second.port}", hub)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_an_address_of_another_host_is_an_error_that_names_the_configuration_field(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await server_at(host, kit.Hub()).__aenter__()
    assert caught.value.field == "LISTEN_HOST"
    assert host in str(caught.value)


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_sources_that_cannot_be_reached_leave_no_open_descriptor() -> None:
    sources = [Address("127.0.0.1", 1), Address("no.such.host.invalid", 4000), Address("localhost", 1)]
    with pytest.raises(NoSourceLeft) as caught:
        await kit.pull(kit.blank(SOURCE), sources, kit.Hub().transport)
    assert [attempt.source for attempt in caught.value.attempts] == [str(source) for source in sources]
    assert all("cannot be reached" in attempt.message for attempt in caught.value.attempts)


async def test_a_server_without_free_descriptors_logs_one_warning_and_recovers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "netloader")
    hub, failures = kit.Hub(), 3
    async with server_at("127.0.0.1", hub) as server:
        accept = socket.socket.accept

        def exhausted(listener: socket.socket) -> object:
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError(24, "Too many open files")
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", exhausted)
        await pulls_from(f"127.0.0.1:{server.port}", hub)
        assert failures == 0
    assert sum("Too many open files" in r.getMessage() for r in caplog.records) == 1
