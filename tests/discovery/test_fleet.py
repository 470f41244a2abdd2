"""Fifty servers that find no mercy, and fifty clients that find them: over Redis, etcd and DNS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from anyio.abc import Process

from netloader.discovery.store import LeaseStore, OpenStore
from tests.discovery.fault_proxy import FaultProxy, a_proxy
from tests.discovery.fleet import Client, Fleet, a_fleet, go_on, suspend
from tests.discovery.nameserver import NameServer, needs_dnsmasq
from tests.discovery.services import Service, free_port, off_loop

pytest.importorskip("redis", reason="needs the redis extra")
pytest.importorskip("aiohttp", reason="needs the etcd extra")
pytest.importorskip("dns", reason="needs the dns extra")

import netloader.discovery.dns_records  # noqa: F401 - files are read, not on the event loop
from netloader.discovery.etcd_store import EtcdRegistry
from netloader.discovery.redis_store import RedisRegistry

OTHER = 1
"""The seed of other weights."""


class Plan:
    """What becomes of each host.

    Args:
        hosts: How many there are, and how many clients.
        killed: How many are killed.
        cut: How many can't reach the registry any more. All but the first of them can't be reached by anybody.
        ttl: Seconds of a lease.

    Attributes:
        ttl: As given.
        hosts, killed, cut, restarted, healthy: Their addresses.
    """

    def __init__(self, hosts: int, killed: int, cut: int, ttl: float) -> None:
        self.ttl = ttl
        self.hosts = [f"127.0.7.{number + 1}" for number in range(hosts)]
        self.killed, self.cut = self.hosts[:killed], self.hosts[killed : killed + cut]
        self.restarted, *self.healthy = self.hosts[killed + cut :]


plans = pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(10, 2, 1, 6.0), id="ten"),
        pytest.param(Plan(50, 5, 3, 10.0), id="fifty", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)


async def started(
    plan: Plan, fleet: Fleet, url: str | None, proxied: str | None
) -> tuple[list[Process], list[Process], Process]:
    """All servers: those that are killed, those that are cut off, and the one that is restarted."""
    alone = (*plan.killed, *plan.cut, plan.restarted)
    processes: dict[str, Process] = {}

    async def start(hosts: list[str], discovery: str | None) -> None:
        processes[hosts[0]] = await fleet.start(hosts, discovery)

    async with anyio.create_task_group() as tasks:
        for host in alone:
            tasks.start_soon(start, [host], proxied if host in plan.cut else url)
        for first in range(3):
            tasks.start_soon(start, plan.healthy[first::3], url)
    killed, cut = ([processes[host] for host in hosts] for hosts in (plan.killed, plan.cut))
    return killed, cut, processes[plan.restarted]


async def pulls(plan: Plan, discovery: str) -> list[Client]:
    """As many clients as servers, all at once; each has pulled."""
    clients = [Client() for _ in plan.hosts]
    async with anyio.create_task_group() as tasks:
        for client in clients:
            tasks.start_soon(client.pull, discovery)
    return clients


def check(plan: Plan, clients: Sequence[Client], port: int) -> None:
    for client in clients:
        assert client.exact
        assert client.report is not None
        gave = {address for address, share in client.report.sources.items() if share.nbytes}
        assert gave <= {f"{host}:{port}" for host in (*plan.healthy, *plan.cut)}
        for host in plan.hosts:
            servers = 2 if host == plan.restarted else 1  # each is a generation of its own, and may be tried once
            assert client.chosen[f"{host}:{port}"] <= servers, (client.order, client.report.attempts)


async def names(store: LeaseStore) -> set[str]:
    """The hosts that a registry names."""
    found = await store.read("netloader/servers/", limit=1000)
    return {name.rpartition("/")[2].rpartition(":")[0] for name, value in found.items() if value.startswith(b"{")}


async def over_a_registry(plan: Plan, open_store: OpenStore, url: str, proxied: str, proxy: FaultProxy) -> None:
    port = free_port()
    async with a_fleet(port) as fleet, open_store() as store:
        killed, cut, restarted = await started(plan, fleet, url, proxied)
        with anyio.fail_after(60):
            while await names(store) != set(plan.hosts):  # noqa: ASYNC110 - others write
                await anyio.sleep(0.1)

        proxy.stall()  # they can't reach the registry, and two of them nobody
        for process in cut[1:]:
            suspend(process)
        for process in (*killed, restarted):
            await fleet.kill(process)
        began = anyio.current_time()
        await fleet.start([plan.restarted], url, seed=OTHER)
        gone: list[float] = []

        async def watch() -> None:
            while await names(store) & {*plan.killed, *plan.cut}:  # noqa: ASYNC110 - others write
                await anyio.sleep(0.1)
            gone.append(anyio.current_time() - began)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            check(plan, await pulls(plan, url), port)
        assert gone[0] < 2 * plan.ttl
        assert await names(store) == {plan.restarted, *plan.healthy}

        proxy.heal()
        for process in cut[1:]:
            go_on(process)
        with anyio.fail_after(60):
            while await names(store) != {*plan.cut, plan.restarted, *plan.healthy}:  # noqa: ASYNC110 - others write
                await anyio.sleep(0.1)


@plans
async def test_redis(plan: Plan, redis_server: Service) -> None:
    async with a_proxy(redis_server.port) as proxy:
        url = f"redis://{redis_server.address}/5?ttl={plan.ttl:g}"
        proxied = f"redis://{proxy.address}/5?ttl={plan.ttl:g}"
        await over_a_registry(plan, RedisRegistry(url), url, proxied, proxy)


@pytest.mark.slow
@plans
async def test_etcd(plan: Plan, etcd_server: Service) -> None:
    async with a_proxy(etcd_server.port) as proxy:
        url, proxied = f"etcd://{etcd_server.address}?ttl={plan.ttl:g}", f"etcd://{proxy.address}?ttl={plan.ttl:g}"
        await over_a_registry(plan, EtcdRegistry(url), url, proxied, proxy)


@needs_dnsmasq
@plans
async def test_dns(plan: Plan, tmp_path: Path) -> None:
    port = free_port()
    server = await anyio.to_thread.run_sync(NameServer, tmp_path)
    async with off_loop(server), a_fleet(port) as fleet:
        await dns(plan, fleet, server, port)


async def dns(plan: Plan, fleet: Fleet, server: NameServer, port: int) -> None:
    killed, cut, restarted = await started(plan, fleet, None, None)
    await anyio.to_thread.run_sync(partial(server.set, sources=plan.hosts))
    for process in cut[1:]:
        suspend(process)
    for process in (*killed, restarted):
        await fleet.kill(process)
    await fleet.start([plan.restarted], None, seed=OTHER)
    # The records of the dead stay: nobody withdraws them.
    check(plan, await pulls(plan, f"dns://sources.fleet.test:{port}?server={server.address}"), port)
