"""Redis as a registry: one server, behind Sentinel, a cluster; restarted, emptied, cut off, with a password, with TLS."""

from __future__ import annotations

import pytest

from netloader.discovery.conformance import STORE_CHECKS, StoreCheck, check_store
from tests.discovery.services import Service

redis = pytest.importorskip("redis", reason="needs the redis extra")

from netloader.discovery.redis_store import RedisRegistry  # noqa: E402


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_a_server_conforms(check: StoreCheck, redis_server: Service) -> None:
    await check_store(RedisRegistry(f"redis://{redis_server.address}"), [check])


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_a_cluster_conforms(check: StoreCheck, redis_cluster: list[Service]) -> None:
    hosts = ",".join(node.address for node in redis_cluster)
    await check_store(RedisRegistry(f"redis+cluster://{hosts}"), [check])
