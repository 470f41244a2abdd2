"""etcd as a registry: conformance, restarts, several members, users, TLS."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import trustme

from netloader.discovery.conformance import STORE_CHECKS, StoreCheck, check_store
from netloader.discovery.store import MAX_VALUE_BYTES
from tests.discovery.calls import refused, succeeds
from tests.discovery.fault_proxy import a_proxy
from tests.discovery.services import Service, an_etcd, etcdctl, free_port, off_loop, three_etcds

pytest.importorskip("aiohttp", reason="needs the etcd extra")

from netloader.discovery import etcd_http
from netloader.discovery.etcd_http import encoded
from netloader.discovery.etcd_store import EtcdRegistry

LONG = ("renewing_makes_names_last", "a_refused_renewal_prolongs_nothing")
"""Checks that wait for several leases."""


@pytest.mark.parametrize(
    "check",
    [pytest.param(each, marks=[pytest.mark.slow] if each.__name__ in LONG else []) for each in STORE_CHECKS],
    ids=lambda check: check.__name__,
)
async def test_it_conforms(check: StoreCheck, etcd_server: Service) -> None:
    await check_store(EtcdRegistry(f"etcd://{etcd_server.address}"), [check])


def ours(where: str, deadline: float = 10.0) -> EtcdRegistry:
    return EtcdRegistry(where, deadline=deadline)


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[Service]:
    with an_etcd(tmp_path) as service:
        yield service


async def ctl(member: Service, *arguments: str) -> str:
    done = await anyio.to_thread.run_sync(etcdctl, member.port, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def test_a_restarted_server_is_used_again_and_has_kept_everything(own_etcd: Service) -> None:
    async with ours(f"etcd://{own_etcd.address}")() as store:
        await store.put("n/a", b"1", ttl=60)
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            await anyio.to_thread.run_sync(own_etcd.kill)
            await refused(lambda: anext(changes))
        error = await refused(lambda: store.read("n/", limit=10))
        assert own_etcd.address in str(error)
        assert "check that etcd runs" in error.hint
        await anyio.to_thread.run_sync(own_etcd.start)
        assert await succeeds(lambda: store.read("n/", limit=10)) == {"n/a": b"1"}
        assert await store.renew("n/a", b"1", ttl=60)
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            await store.put("n/a", b"2", ttl=60)
            with anyio.fail_after(5):
                await anext(changes)


async def test_renewing_writes_nothing(own_etcd: Service) -> None:
    """Otherwise each renewal would wake all that watch."""
    async with ours(f"etcd://{own_etcd.address}")() as mine, ours(f"etcd://{own_etcd.address}")() as other:
        await mine.put("n/a", b"1", ttl=60)
        before = await ctl(own_etcd, "endpoint", "status", "-w", "fields")
        for _ in range(5):
            assert await mine.renew("n/a", b"1", ttl=60)
            assert await other.renew("n/a", b"1", ttl=60)
        after = await ctl(own_etcd, "endpoint", "status", "-w", "fields")
        revisions = [[line for line in text.splitlines() if line.startswith('"Revision"')] for text in (before, after)]
        assert revisions[0] == revisions[1] != []
        for number in range(5):
            await mine.put("n/a", b"%d" % number, ttl=60)
        assert len((await ctl(own_etcd, "lease", "list")).splitlines()) == 2, "one lease, and a line that counts"


async def test_a_name_without_a_lease_gets_one(own_etcd: Service) -> None:
    """Somebody wrote it by hand."""
    async with ours(f"etcd://{own_etcd.address}")() as store:
        await ctl(own_etcd, "put", "n/a", "1")
        assert await store.renew("n/a", b"1", ttl=60)
        assert '"lease":0' not in await ctl(own_etcd, "get", "n/a", "-w", "json")
        assert await store.read("n/", limit=1) == {"n/a": b"1"}


async def test_a_lease_that_was_revoked_is_made_anew(own_etcd: Service) -> None:
    async with ours(f"etcd://{own_etcd.address}")() as store:
        await store.put("n/a", b"1", ttl=60)
        lease = (await ctl(own_etcd, "lease", "list")).splitlines()[1]
        await ctl(own_etcd, "lease", "revoke", lease)
        assert not await store.renew("n/a", b"1", ttl=60)
        await store.put("n/a", b"2", ttl=60)
        assert await store.read("n/", limit=1) == {"n/a": b"2"}


async def test_what_others_write_hides_no_name(own_etcd: Service) -> None:
    """Long values, and a name that is no UTF-8, beside 300 names that are ours."""
    async with ours(f"etcd://{own_etcd.address}")() as store:
        for number in range(300):
            await store.put(f"n/{number:03}", b"1", ttl=60)
        for number in range(90):
            await store.put(f"n/200/long{number:02}", b"x" * (700 << 10), ttl=60)
        await store._gateway.call("kv/put", {"key": encoded(b"n/\xff"), "value": ""}, dict)  # type: ignore[attr-defined]
        found = await store.read("n/", limit=4096)
        long = [name for name, value in found.items() if len(value) == MAX_VALUE_BYTES + 1]
        assert long == [f"n/200/long{number:02}" for number in range(90)]
        assert sorted({*found} - {*long}) == [f"n/{number:03}" for number in range(300)]


async def test_a_value_that_is_longer_than_any_answer_is_left_out(
    own_etcd: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_http, "_MOST", 64 << 10)
    async with ours(f"etcd://{own_etcd.address}")() as store:
        for name in ("n/a", "n/c"):
            await store.put(name, b"1", ttl=60)
        for name in ("n/b", "n/d"):
            await store.put(name, b"x" * (700 << 10), ttl=60)
        assert await store.read("n/", limit=4096) == {"n/a": b"1", "n/c": b"1"}


async def test_a_partition_is_noticed_and_heals(own_etcd: Service) -> None:
    async with a_proxy(own_etcd.port) as proxy, ours(f"etcd://{proxy.address}", deadline=1.5)() as store:
        await store.put("n/a", b"1", ttl=60)
        proxy.stall()
        assert "does not answer within 1.5 s" in str(await refused(lambda: store.renew("n/a", b"1", ttl=60)))
        async with aclosing(store.changes("n/")) as changes:
            assert "does not answer within 1.5 s" in str(await refused(lambda: anext(changes)))
        proxy.heal()
        assert await succeeds(lambda: store.renew("n/a", b"1", ttl=60))
        async with aclosing(store.changes("n/")) as changes:
            await anext(changes)
            await proxy.cut()
            await refused(lambda: anext(changes))
        await refused(lambda: store.read("n/", limit=10))
        proxy.heal()
        assert await succeeds(lambda: store.read("n/", limit=10)) == {"n/a": b"1"}


@pytest.mark.slow
async def test_members_that_are_down_are_passed_over(tmp_path: Path) -> None:
    async with off_loop(three_etcds(tmp_path)) as members:
        hosts = ",".join([f"127.0.0.1:{free_port()}", *(member.address for member in members)])
        async with ours(f"etcd://{hosts}", deadline=3.0)() as store:
            await store.put("n/a", b"1", ttl=60)
            for member in members[:2]:
                await anyio.to_thread.run_sync(member.kill)
                if member is members[0]:
                    assert await succeeds(lambda: store.renew("n/a", b"1", ttl=60))
                    assert await store.read("n/", limit=10) == {"n/a": b"1"}
            # One of three is no majority.
            await refused(lambda: store.read("n/", limit=10))
            await anyio.to_thread.run_sync(members[0].start)
            assert await succeeds(lambda: store.renew("n/a", b"1", ttl=60))


async def test_users(own_etcd: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (
        "user add root:secret",
        "user add fleet:right",
        "role add fleet",
        "role grant-permission fleet --prefix=true readwrite netloader/",
        "user grant-role root root",
        "user grant-role fleet fleet",
        "auth enable",
    ):
        await ctl(own_etcd, *command.split())
    for user in ("", "fleet:wrong@", "nobody:right@"):
        async with ours(f"etcd://{user}{own_etcd.address}")() as store:
            error = await refused(lambda: store.read("netloader/", limit=10))
            assert "check the user and the password" in error.hint
            assert "wrong" not in str(error)
    monkeypatch.setenv("NETLOADER_ETCD_PASSWORD", "right")
    async with ours(f"etcd://fleet@{own_etcd.address}")() as store:
        async with aclosing(store.changes("netloader/")) as changes:
            await anext(changes)
            await store.put("netloader/a", b"1", ttl=60)
            with anyio.fail_after(5):
                await anext(changes)
        assert await store.renew("netloader/a", b"1", ttl=60)
        assert "docs/registries.md" in (await refused(lambda: store.put("other/a", b"1", ttl=60))).hint
        async with aclosing(store.changes("other/")) as changes:
            assert "docs/registries.md" in (await refused(lambda: _two(changes))).hint
        await anyio.to_thread.run_sync(own_etcd.kill)  # it forgets who has logged in
        await anyio.to_thread.run_sync(own_etcd.start)
        assert await succeeds(lambda: store.read("netloader/", limit=10)) == {"netloader/a": b"1"}
        assert await store.remove("netloader/a", b"1")
        assert await store.create("netloader/a", b"1", ttl=60)


async def _two(changes: AsyncGenerator[None, None]) -> None:
    await anext(changes)
    await anext(changes)


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client.example")
    for name, made in (("server", server), ("client", client)):
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    files = ["--cert-file", "server.pem", "--key-file", "server.key", "--trusted-ca-file", "ca.pem"]
    async with off_loop(an_etcd(tmp_path, tls=[*files, "--client-cert-auth"])) as member:
        ca, mine = f"ca={tmp_path}/ca.pem", f"&cert={tmp_path}/client.pem&key={tmp_path}/client.key"
        async with ours(f"etcds://{member.address}?{ca}{mine}")() as store:
            await succeeds(lambda: store.put("n/a", b"1", ttl=60))
            assert await store.read("n/", limit=10) == {"n/a": b"1"}
            async with aclosing(store.changes("n/")) as changes:
                await anext(changes)
        for options in ("", f"?{ca}", f"?ca={tmp_path}/none.pem"):
            async with ours(f"etcds://{member.address}{options}")() as store:
                error = await refused(lambda: store.read("n/", limit=10))
                assert "check ca=" in error.hint


async def test_what_is_no_etcd_is_said(redis_server: Service) -> None:
    async with ours(f"etcd://{redis_server.address}")() as store:
        assert redis_server.address in str(await refused(lambda: store.read("n/", limit=10)))
