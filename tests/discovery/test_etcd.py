"""etcd as a registry: conformance, restarts, several members, users, TLS."""

from __future__ import annotations

import pytest

from netloader.discovery.conformance import STORE_CHECKS, StoreCheck, check_store
from tests.discovery.services import Service

pytest.importorskip("aiohttp", reason="needs the etcd extra")

from netloader.discovery.etcd_store import EtcdRegistry


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_it_conforms(check: StoreCheck, etcd_server: Service) -> None:
    await check_store(EtcdRegistry(f"etcd://{etcd_server.address}"), [check])
