"""Fifty servers that find no mercy, and fifty clients that find them: over Redis, etcd and DNS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from netloader.discovery.store import LeaseStore, OpenStore
from tests.discovery.fault_proxy import FaultProxy, a_proxy
from tests.discovery.fleet import Client, Fleet, a_fleet, go_on, suspend
from tests.discovery.nameserver import NameServer, needs_dnsmasq
from tests.discovery.services import Service, free_port, off_loop

pytest.importorskip("redis", reason="needs the redis extra")
pytest.importorskip("aiohttp", reason="needs the etcd extra")
pytest.importorskip("dns", reason="needs the dns extra")

from netloader.discovery.etcd_store import EtcdRegistry
from netloader.discovery.redis_store import RedisRegistry

TTL = 6.0
SERVERS = 50
CLIENTS = 50
OTHER = 1
"""The seed of other weights."""

HOSTS = [f"127.0.7.{number + 1}" for number in range(SERVERS)]
KILLED, CUT, RESTARTED, HEALTHY = HOSTS[:5], HOSTS[5:8], HOSTS[8], HOSTS[9:]


async def pulls(discovery: str) -> list[Client]:
    """All clients at once; each has pulled."""
    clients = [Client() for _ in range(CLIENTS)]
    async with anyio.create_task_group() as tasks:
        for client in clients:
            tasks.start_soon(client.pull, discovery)
    return clients


def check(clients: Sequence[Client], port: int) -> None:
    for client in clients:
        assert client.exact
        assert client.report is not None
        gave = {address for address, share in client.report.sources.items() if share.nbytes}
        assert gave <= {f"{host}:{port}" for host in (*HEALTHY, *CUT)}
        for host in (*KILLED, *CUT, RESTARTED):
            assert client.chosen[f"{host}:{port}"] <= 1, (client.order, client.report.attempts)


async def names(store: LeaseStore) -> set[str]:
    """The hosts that a registry names."""
    found = await store.read("netloader/servers/", limit=1000)
    return {name.rpartition("/")[2].rpartition(":")[0] for name, value in found.items() if value.startswith(b"{")}


async def over_a_registry(open_store: OpenStore, url: str, proxied: str, proxy: FaultProxy) -> None:
    port = free_port()
    async with a_fleet(port) as fleet, open_store() as store:
        killed = [await fleet.start([host], url) for host in KILLED]
        cut = [await fleet.start([host], proxied) for host in CUT]
        restarted = await fleet.start([RESTARTED], url)
        for first in range(3):
            await fleet.start(HEALTHY[first::3], url)
        with anyio.fail_after(30):
            while await names(store) != set(HOSTS):  # noqa: ASYNC110 - others write
                await anyio.sleep(0.1)

        proxy.stall()  # they can't reach the registry, and two of them nobody
        for process in cut[1:]:
            suspend(process)
        for process in (*killed, restarted):
            await fleet.kill(process)
        began = anyio.current_time()
        await fleet.start([RESTARTED], url, seed=OTHER)
        gone: list[float] = []

        async def watch() -> None:
            while (*KILLED, *CUT) and await names(store) & {*KILLED, *CUT}:  # noqa: ASYNC110 - others write
                await anyio.sleep(0.1)
            gone.append(anyio.current_time() - began)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            check(await pulls(url), port)
        assert gone[0] < 2 * TTL
        assert await names(store) == {RESTARTED, *HEALTHY}

        proxy.heal()
        for process in cut[1:]:
            go_on(process)
        with anyio.fail_after(30):
            while await names(store) != {*CUT, RESTARTED, *HEALTHY}:  # noqa: ASYNC110 - others write
                await anyio.sleep(0.1)


async def test_redis(redis_server: Service) -> None:
    async with a_proxy(redis_server.port) as proxy:
        url = f"redis://{redis_server.address}/5?ttl={TTL}"
        proxied = f"redis://{proxy.address}/5?ttl={TTL}"
        await over_a_registry(RedisRegistry(url), url, proxied, proxy)


async def test_etcd(etcd_server: Service) -> None:
    async with a_proxy(etcd_server.port) as proxy:
        url, proxied = f"etcd://{etcd_server.address}?ttl={TTL}", f"etcd://{proxy.address}?ttl={TTL}"
        await over_a_registry(EtcdRegistry(url), url, proxied, proxy)


@needs_dnsmasq
async def test_dns(tmp_path: Path) -> None:
    port = free_port()
    server = await anyio.to_thread.run_sync(NameServer, tmp_path)
    async with off_loop(server), a_fleet(port) as fleet:
        await dns(fleet, server, port)


async def dns(fleet: Fleet, server: NameServer, port: int) -> None:
    killed = [await fleet.start([host], None) for host in KILLED]
    cut = [await fleet.start([host], None) for host in CUT]
    restarted = await fleet.start([RESTARTED], None)
    for first in range(3):
        await fleet.start(HEALTHY[first::3], None)
    await anyio.to_thread.run_sync(partial(server.set, sources=HOSTS))
    for process in cut:
        suspend(process)
    for process in (*killed, restarted):
        await fleet.kill(process)
    await fleet.start([RESTARTED], None, seed=OTHER)
    # The records of the dead stay: nobody withdraws them.
    check(await pulls(f"dns://sources.fleet.test:{port}?server={server.address}"), port)
