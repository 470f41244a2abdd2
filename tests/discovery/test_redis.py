"""Redis as a registry: one server, Sentinel, a cluster; restarted, emptied, cut off; passwords and TLS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import trustme

from netloader.discovery.conformance import STORE_CHECKS, StoreCheck, check_store
from netloader.discovery.store import MAX_VALUE_BYTES
from netloader.errors import DiscoveryError
from tests.discovery.calls import refused, succeeds, until
from tests.discovery.fault_proxy import a_proxy
from tests.discovery.services import Service, a_redis, a_sentinel, free_port, off_loop, redis_cli

redis = pytest.importorskip("redis", reason="needs the redis extra")

from redis.asyncio import Redis  # noqa: E402

from netloader.discovery import redis_client  # noqa: E402
from netloader.discovery.redis_store import RedisRegistry  # noqa: E402

LONG = ("renewing_makes_names_last", "a_refused_renewal_prolongs_nothing")
"""Checks that wait for several leases."""


@pytest.mark.parametrize(
    "check",
    [pytest.param(each, marks=[pytest.mark.slow] if each.__name__ in LONG else []) for each in STORE_CHECKS],
    ids=lambda check: check.__name__,
)
async def test_a_server_conforms(check: StoreCheck, redis_server: Service) -> None:
    await check_store(RedisRegistry(f"redis://{redis_server.address}"), [check])


@pytest.mark.slow
@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_a_cluster_conforms(check: StoreCheck, redis_cluster: list[Service]) -> None:
    hosts = ",".join(node.address for node in redis_cluster)
    await check_store(RedisRegistry(f"redis+cluster://{hosts}"), [check])


def ours(where: str, deadline: float = 10.0) -> RedisRegistry:
    return RedisRegistry(where, deadline=deadline)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Service]:
    with a_redis(tmp_path) as service:
        yield service


async def test_a_restarted_server_is_used_again(own_redis: Service) -> None:
    async with ours(f"redis://{own_redis.address}")() as store:
        await store.put("n/a", b"1", ttl=30)
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            await anyio.to_thread.run_sync(own_redis.kill)
            await refused(lambda: anext(changes))
        error = await refused(lambda: store.read("n/", limit=10))
        assert own_redis.address in str(error)
        assert "check that it runs" in error.hint
        await anyio.to_thread.run_sync(own_redis.start)
        assert await succeeds(lambda: store.read("n/", limit=10)) == {}
        assert await store.create("n/a", b"2", ttl=30)
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            await store.put("n/a", b"3", ttl=30)
            with anyio.fail_after(5):
                await anext(changes)


async def test_a_server_that_stands_still_is_left_in_time(own_redis: Service) -> None:
    async with ours(f"redis://{own_redis.address}", deadline=1.0)() as store:
        await store.put("n/a", b"1", ttl=30)
        own_redis.suspend()
        assert "does not answer within 1 s" in str(await refused(lambda: store.read("n/", limit=10)))
        own_redis.go_on()
        assert await succeeds(lambda: store.read("n/", limit=10)) == {"n/a": b"1"}


async def test_everything_may_be_flushed(own_redis: Service) -> None:
    async with ours(f"redis://{own_redis.address}/3")() as store:
        await store.put("n/a", b"1", ttl=30)
        await redis_cli(own_redis.port, "flushall")
        assert not await store.renew("n/a", b"1", ttl=30)
        assert await store.read("n/", limit=10) == {}
        assert await store.create("n/a", b"1", ttl=30)
        assert await store.read("n/", limit=10) == {"n/a": b"1"}


async def test_a_list_of_names_that_was_evicted_is_made_again_by_renewing(own_redis: Service) -> None:
    async with ours(f"redis://{own_redis.address}")() as store:
        await store.put("n/a", b"1", ttl=30)
        assert await redis_cli(own_redis.port, "del", "{n}:names", "{n}:ends") == "2"
        assert await store.renew("n/a", b"1", ttl=30)
        assert await store.read("n/", limit=10) == {"n/a": b"1"}


async def test_dead_names_leave_no_trace(own_redis: Service) -> None:
    async with ours(f"redis://{own_redis.address}")() as store:
        await store.put("n/dead", b"1", ttl=1)
        # As if it had ended two minutes ago.
        assert await redis_cli(own_redis.port, "zincrby", "{n}:ends", "-121000", "n/dead") != ""
        await store.put("n/a", b"1", ttl=30)
        assert await redis_cli(own_redis.port, "zrange", "{n}:names", "0", "-1") == "n/a"
        assert await redis_cli(own_redis.port, "zrange", "{n}:ends", "0", "-1") == "n/a"
        assert 30_000 < int(await redis_cli(own_redis.port, "pttl", "{n}:names")) <= 150_000
        assert await store.remove("n/a", b"1")
        assert await redis_cli(own_redis.port, "keys", "{n}:*") == ""


async def test_dead_names_count_for_no_limit(own_redis: Service) -> None:
    async with ours(f"redis://{own_redis.address}")() as store:
        for number in range(600):
            await store.put(f"n/{number:03}", b"1", ttl=30)
        assert await redis_cli(own_redis.port, "del", *(f"{{n}}/{number:03}" for number in range(300))) == "300"
        assert len(await store.read("n/", limit=300)) == 300


async def test_what_others_write_hides_no_name(own_redis: Service) -> None:
    """Long values, another type of value, and a name that is no UTF-8, beside 300 names that are ours."""
    async with ours(f"redis://{own_redis.address}")() as store, Redis(port=own_redis.port) as other:
        for number in range(300):
            await store.put(f"n/{number:03}", b"", ttl=60)
        for number in range(3):
            await store.put(f"n/long{number}", b"1", ttl=60)
            await other.set(f"{{n}}/long{number}", b"x" * (32 << 20), keepttl=True)
        await other.zadd("{n}:names", {b"n/\xff": 0, b"n/list": 0, **{b"n/000\xff%d" % each: 0 for each in range(300)}})
        await other.rpush("{n}/list", "1")
        found = await store.read("n/", limit=4096)
        assert sorted(found) == [*(f"n/{number:03}" for number in range(300)), *(f"n/long{each}" for each in range(3))]
        assert {len(value) for value in found.values()} == {0, MAX_VALUE_BYTES + 1}
        assert list(await store.read("n/long", limit=2)) == ["n/long0", "n/long1"]


async def test_a_partition_is_noticed_and_heals(own_redis: Service) -> None:
    async with a_proxy(own_redis.port) as proxy, ours(f"redis://{proxy.address}", deadline=1.0)() as store:
        await store.put("n/a", b"1", ttl=30)
        proxy.stall()
        await refused(lambda: store.renew("n/a", b"1", ttl=30))
        proxy.heal()
        assert await succeeds(lambda: store.renew("n/a", b"1", ttl=30))
        await proxy.cut()
        await refused(lambda: store.read("n/", limit=10))
        proxy.heal()
        assert await succeeds(lambda: store.read("n/", limit=10)) == {"n/a": b"1"}


async def test_a_watch_that_hears_nothing_is_given_up(own_redis: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "_QUIET", 0.3)
    async with a_proxy(own_redis.port) as proxy, ours(f"redis://{proxy.address}")() as store:
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            with anyio.move_on_after(0.9) as scope:  # silent, and alive
                await anext(changes)
            assert scope.cancelled_caught
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            proxy.stall()
            assert "does not answer" in str(await refused(lambda: anext(changes)))


async def test_calls_are_made_once(own_redis: Service) -> None:
    """An answer that is lost is not asked for again: the second try would be answered by what the first one did."""
    async with a_proxy(own_redis.port) as proxy, ours(f"redis://{proxy.address}")() as store:
        await store.read("n/", limit=1)
        own_redis.suspend()
        async with anyio.create_task_group() as tasks:
            failed: list[DiscoveryError] = []

            async def create() -> None:
                failed.append(await refused(lambda: store.create("n/a", b"1", ttl=30)))

            tasks.start_soon(create)
            await anyio.sleep(0.5)
            await proxy.cut()
        own_redis.go_on()
        proxy.heal()
        assert len(failed) == 1
        assert proxy.connected == 1


async def test_a_password_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with off_loop(a_redis(tmp_path, "--requirepass", "right")) as service:
        for user in ("", ":wrong@", "nobody:right@"):
            async with ours(f"redis://{user}{service.address}")() as store:
                error = await refused(lambda: store.read("n/", limit=10))
                assert "check the user and the password" in error.hint
                assert "wrong" not in str(error)
        async with ours(f"redis://:right@{service.address}")() as store:
            await store.put("n/a", b"1", ttl=30)
        monkeypatch.setenv("NETLOADER_REDIS_PASSWORD", "right")
        async with ours(f"redis://{service.address}")() as store:
            assert await store.read("n/", limit=10) == {"n/a": b"1"}


async def test_the_documented_permissions_are_enough(own_redis: Service) -> None:
    text = (Path(__file__).parents[2] / "docs/registries.md").read_text(encoding="utf-8")
    rules = re.search(r"^ACL SETUSER netloader on >PASSWORD (.*)$", text, re.MULTILINE)
    assert rules is not None
    await redis_cli(own_redis.port, "acl", "setuser", "netloader", "on", ">x", *rules[1].split())
    async with ours(f"redis://netloader:x@{own_redis.address}")() as store:
        async with aclosing(store.changes("netloader/")) as changes:
            await anext(changes)
            await store.put("netloader/a", b"1", ttl=30)
            with anyio.fail_after(5):
                await anext(changes)
        assert await store.renew("netloader/a", b"1", ttl=30)
        assert await store.read("netloader/", limit=10) == {"netloader/a": b"1"}
        assert await store.remove("netloader/a", b"1")
        assert await store.create("netloader/a", b"1", ttl=30)
        assert "docs/registries.md" in (await refused(lambda: store.put("other/a", b"1", ttl=30))).hint


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client.example")
    for name, made in (("server", server), ("client", client)):
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    ca = tmp_path / "ca.pem"
    options = ["--tls-ca-cert-file", "ca.pem", "--tls-cert-file", "server.pem", "--tls-key-file", "server.key"]
    async with off_loop(a_redis(tmp_path, *options, tls=True)) as service:
        mine = f"ca={ca}&cert={tmp_path}/client.pem&key={tmp_path}/client.key"
        async with ours(f"rediss://{service.address}?{mine}")() as store:
            await store.put("n/a", b"1", ttl=30)
            assert await store.read("n/", limit=10) == {"n/a": b"1"}
            async with aclosing(store.changes("n/")) as changes:
                await anext(changes)
        async with ours(f"rediss://{service.address}")() as store:
            assert "check ca=" in (await refused(lambda: store.read("n/", limit=10))).hint
        async with ours(f"rediss://{service.address}?ca={tmp_path}/none.pem")() as store:
            assert "check ca=" in (await refused(lambda: store.read("n/", limit=10))).hint


@pytest.mark.slow
async def test_sentinel_names_the_next_master(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("master", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    async with AsyncExitStack() as stack:
        master = await stack.enter_async_context(off_loop(a_redis(folders[0])))
        replica = await stack.enter_async_context(
            off_loop(
                a_redis(folders[1], "--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
            )
        )
        sentinel = await stack.enter_async_context(off_loop(a_sentinel(folders[2], master, "fleet")))
        # The first Sentinel is not there.
        where = f"redis+sentinel://127.0.0.1:{free_port()},{sentinel.address}?service=fleet"
        async with ours(where)() as store:
            await succeeds(lambda: store.put("n/a", b"1", ttl=60))
            await until(lambda: redis_cli(replica.port, "get", "{n}/a"), "1")
            await until(lambda: redis_cli(sentinel.port, "info"), "slaves=1")
            async with aclosing(store.changes("n/")) as changes:
                await anext(changes)
                await anyio.to_thread.run_sync(master.kill)
                await refused(lambda: anext(changes))
            assert await succeeds(lambda: store.renew("n/a", b"1", ttl=60), within=30)
            assert (await redis_cli(replica.port, "role")).startswith("master")
            async with aclosing(store.changes("n/")) as changes:
                await anext(changes)
                await store.put("n/b", b"1", ttl=60)
                with anyio.fail_after(5):
                    await anext(changes)
        async with ours(where.replace("=fleet", "=other"))() as store:
            assert "service=" in (await refused(lambda: store.read("n/", limit=1))).hint


async def test_a_replica_is_refused_by_name(own_redis: Service, tmp_path: Path) -> None:
    (tmp_path / "replica").mkdir()
    context = off_loop(a_redis(tmp_path / "replica", "--replicaof", "127.0.0.1", str(own_redis.port)))
    async with context as replica, ours(f"redis://{replica.address}")() as store:
        assert "this is a replica" in (await refused(lambda: store.put("n/a", b"1", ttl=30))).hint


async def test_a_node_of_a_cluster_is_no_single_server(redis_cluster: list[Service]) -> None:
    hints = set()
    for node in redis_cluster:
        async with ours(f"redis://{node.address}")() as store:
            with suppress(DiscoveryError):
                await store.put("n/a", b"1", ttl=1)
                continue
            hints.add((await refused(lambda: store.put("n/a", b"1", ttl=1))).hint)
    assert hints == {"this is a node of a cluster: use redis+cluster://"}


async def test_a_single_server_is_no_cluster(redis_server: Service) -> None:
    async with ours(f"redis+cluster://{redis_server.address}")() as store:
        assert "use redis://" in (await refused(lambda: store.read("n/", limit=1))).hint


async def test_a_cluster_moves_its_slots(redis_cluster: list[Service]) -> None:
    async with ours(f"redis+cluster://{redis_cluster[0].address}")() as store:
        await store.put("moving/a", b"1", ttl=60)
        slot = await redis_cli(redis_cluster[0].port, "cluster", "keyslot", "{moving}/a")
        ids = [await redis_cli(node.port, "cluster", "myid") for node in redis_cluster]
        answers = [await redis_cli(node.port, "get", "{moving}/a") for node in redis_cluster]
        owner = answers.index("1")
        to = (owner + 1) % 3
        await redis_cli(redis_cluster[to].port, "cluster", "setslot", slot, "importing", ids[owner])
        await redis_cli(redis_cluster[owner].port, "cluster", "setslot", slot, "migrating", ids[to])
        for key in (await redis_cli(redis_cluster[owner].port, "cluster", "getkeysinslot", slot, "10")).splitlines():
            port = str(redis_cluster[to].port)
            assert await redis_cli(redis_cluster[owner].port, "migrate", "127.0.0.1", port, key, "0", "5000") == "OK"
        for node in (redis_cluster[to], redis_cluster[owner], redis_cluster[3 - owner - to]):
            await redis_cli(node.port, "cluster", "setslot", slot, "node", ids[to])
        assert await succeeds(lambda: store.renew("moving/a", b"1", ttl=60))
        assert await store.read("moving/", limit=10) == {"moving/a": b"1"}


async def test_the_documented_permissions_are_enough_in_a_cluster(redis_cluster: list[Service]) -> None:
    text = (Path(__file__).parents[2] / "docs/registries.md").read_text(encoding="utf-8")
    rules = re.search(r"^ACL SETUSER netloader on >PASSWORD (.*)$", text, re.MULTILINE)
    more = re.search(r"In a cluster add `([^`]*)`", text)
    assert rules is not None
    assert more is not None
    for node in redis_cluster:
        await redis_cli(node.port, "acl", "setuser", "netloader", "on", ">x", *rules[1].split(), *more[1].split())
    async with ours(f"redis+cluster://netloader:x@{redis_cluster[0].address}")() as store:
        async with aclosing(store.changes("netloader/")) as changes:
            await anext(changes)
            await store.put("netloader/a", b"1", ttl=30)
            with anyio.fail_after(5):
                await anext(changes)
        assert await store.read("netloader/", limit=10) == {"netloader/a": b"1"}
        assert await store.remove("netloader/a", b"1")
