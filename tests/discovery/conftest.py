from __future__ import annotations

from tests.discovery.services import etcd_server, redis_cluster, redis_server

__all__ = ["etcd_server", "redis_cluster", "redis_server"]
