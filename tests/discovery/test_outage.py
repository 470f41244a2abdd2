"""Redis is restarted, stopped for longer than the leases, and emptied, while servers serve and clients pull."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from netloader.core.model_key import key_of
from netloader.discovery import Wanted
from netloader.discovery.registry import open_backend
from tests.discovery.fleet import Client, a_fleet, identity
from tests.discovery.services import Service, a_redis, free_port, off_loop, redis_cli
from tests.discovery.world import Watcher

pytest.importorskip("redis", reason="needs the redis extra")

LONG = 200.0
"""Seconds that a client waits for a source: longer than the registry is away."""

HOSTS = ["127.0.8.1", "127.0.8.2", "127.0.8.3"]


class Pulls:
    """Clients that pull one after the other, as long as this runs. Each must get all bytes.

    Attributes:
        found: How many found their source in the registry.
        given: How many were given one, and the registry too.
    """

    def __init__(self, url: str, port: int) -> None:
        self.found = self.given = 0
        self._url = url
        self._given = f"{HOSTS[0]}:{port}"

    async def find(self) -> None:
        while True:
            client = Client()
            await client.pull(self._url, wait=LONG)
            assert client.exact
            self.found += 1

    async def use_given(self) -> None:
        while True:
            client = Client()
            await client.pull(self._url, sources=[self._given])
            assert client.exact
            assert client.order[0] == self._given
            self.given += 1

    async def go_on(self, *, found: bool) -> None:
        """Wait until more clients have pulled: two of each kind, or only of those that were given a source."""
        counts = self.found, self.given
        with anyio.fail_after(60):
            while self.given < counts[1] + 2 or (found and self.found < counts[0] + 2):  # noqa: ASYNC110 - loops beside
                await anyio.sleep(0.05)


@asynccontextmanager
async def world(redis: Service, ttl: float) -> AsyncIterator[Pulls]:
    """Three servers, two endless rows of clients, and a stream of the sources, in which none may vanish."""
    url, port = f"redis://{redis.address}?ttl={ttl:g}", free_port()
    pulls = Pulls(url, port)
    watcher = Watcher(open_backend(url).sources(Wanted(key_of(identity(0)))))
    async with a_fleet(port) as fleet:
        await fleet.start(HOSTS, url)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            await watcher.until(lambda: len(watcher.sources) == 3, 60)
            tasks.start_soon(pulls.find)
            tasks.start_soon(pulls.use_given)
            await pulls.go_on(found=True)
            yield pulls
            await pulls.go_on(found=True)
            with anyio.fail_after(60):
                while len((await redis_cli(redis.port, "zrange", "{netloader}:names", "0", "-1")).split()) < 3:  # noqa: ASYNC110 - servers write
                    await anyio.sleep(0.05)
            await anyio.sleep(ttl)  # what is missing would have vanished
            assert [word for word in watcher.words if word.startswith("-")] == []
            tasks.cancel_scope.cancel()


async def restarted(redis: Service, pulls: Pulls, seconds: float) -> None:
    await anyio.to_thread.run_sync(redis.kill)
    await anyio.to_thread.run_sync(redis.start)


async def stopped(redis: Service, pulls: Pulls, seconds: float) -> None:
    until = anyio.current_time() + seconds
    await anyio.to_thread.run_sync(redis.kill)
    found = pulls.found
    while anyio.current_time() < until:
        await pulls.go_on(found=False)
    assert pulls.found <= found + 1, "clients find sources in a registry that is down"
    await anyio.to_thread.run_sync(redis.start)


async def suspended(redis: Service, pulls: Pulls, seconds: float) -> None:
    until = anyio.current_time() + seconds
    redis.suspend()
    while anyio.current_time() < until:
        await pulls.go_on(found=False)
    redis.go_on()


async def flushed(redis: Service, pulls: Pulls, seconds: float) -> None:
    assert await redis_cli(redis.port, "flushall") == "OK"


@pytest.mark.parametrize(
    ("fault", "ttl", "seconds"),
    [
        (stopped, 3.0, 4.0),
        pytest.param(restarted, 6.0, 0.0, marks=pytest.mark.slow),
        pytest.param(flushed, 6.0, 0.0, marks=pytest.mark.slow),
        pytest.param(suspended, 6.0, 8.0, marks=pytest.mark.slow),
        pytest.param(stopped, 15.0, 60.0, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
    ids=lambda value: value.__name__ if callable(value) else f"{value:g}",
)
async def test_serving_and_pulling_go_on(
    fault: Callable[[Service, Pulls, float], Awaitable[None]],
    ttl: float,
    seconds: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "netloader")
    async with off_loop(a_redis(tmp_path)) as redis, world(redis, ttl) as pulls:
        await fault(redis, pulls, seconds)
    said = [record.getMessage() for record in caplog.records if "finding sources" in record.getMessage()]
    if fault is stopped:
        assert said, "a registry that is down is said"
