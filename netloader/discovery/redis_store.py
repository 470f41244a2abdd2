"""``redis://`` and its relatives: what their URLs say. `redis_client` speaks to Redis, and is imported on first use."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec

import anyio.to_thread

from netloader.discovery.leases import LeaseBackend
from netloader.discovery.registry_urls import RegistryUrl, parse_registry_url
from netloader.discovery.store import LeaseStore
from netloader.errors import ConfigError

__all__ = ["PASSWORD", "RedisRegistry", "open_redis"]

if find_spec("redis") is None:
    raise ModuleNotFoundError("No module named 'redis'", name="redis")

_PORT = 6379
_SENTINEL_PORT = 26379
PASSWORD = "NETLOADER_REDIS_PASSWORD"  # noqa: S105 - the name of a variable

_DEADLINE = 5.0
"""Seconds that a call may take, with connecting."""


def open_redis(url: str) -> LeaseBackend:
    """The backend of a URL: see docs/registries.md.

    Raises:
        ConfigError: Something is wrong with the URL. No password is shown.
    """
    registry = RedisRegistry(url)
    options = registry.url.options
    return LeaseBackend(
        registry, ttl=registry.url.ttl, prefix=options.get("prefix", "netloader"), name=registry.url.shown
    )


class RedisRegistry:
    """Opens connections to a Redis or Valkey registry. An `OpenStore`.

    Args:
        url: ``redis://``, ``redis+sentinel://`` or ``redis+cluster://``, or the same with ``rediss`` for TLS.
        deadline: Seconds that a call may take.

    Attributes:
        url: What the URL says.

    Raises:
        ConfigError: Something is wrong with the URL. No password is shown.
    """

    def __init__(self, url: str, *, deadline: float = _DEADLINE) -> None:
        scheme, _, kind = url.partition("://")[0].lower().partition("+")
        sentinel, cluster = kind == "sentinel", kind == "cluster"
        options = ["prefix", *([] if cluster else ["db"]), *(["service", "sentinel_password"] if sentinel else [])]
        self.url = parse_registry_url(
            url,
            port=_SENTINEL_PORT if sentinel else _PORT,
            password_variable=PASSWORD,
            secure=scheme == "rediss",
            options=options,
        )
        self._deadline = deadline
        self._kind = kind
        if sentinel and not self.url.options.get("service"):
            reason = "it does not say which master (service=) the Sentinels watch"
            raise ConfigError(field="service", value="", allowed="the name of the master", reason=reason)
        if not kind and len(self.url.hosts) > 1:
            raise ConfigError(
                field="discovery",
                value=len(self.url.hosts),
                allowed="one host",
                reason=f"{scheme}:// names one server",
                hint=f"for several use {scheme}+sentinel:// or {scheme}+cluster://",
            )
        self._db = _database(self.url, numbered=not cluster)

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[LeaseStore]:
        """Open a connection. The first call connects."""
        # Importing redis-py takes long, and other tasks may run on this event loop.
        library = await anyio.to_thread.run_sync(import_module, "netloader.discovery.redis_client")
        clients = library.RedisClients(self.url, self._kind, self._db, self._deadline)
        async with clients.open() as store:
            yield store


def _database(url: RegistryUrl, *, numbered: bool) -> int:
    text = url.path or url.options.get("db", "0")
    reason = None
    if url.path and "db" in url.options:
        reason = "the database is given twice"
    elif not numbered and text != "0":
        reason = "a cluster has no numbered databases"
    elif not re.fullmatch(r"[0-9]{1,9}", text):
        reason = f"the database {text!r} is not a number"
    if reason is not None:
        raise ConfigError(field="db", value=text, allowed="the number of a database", reason=reason)
    return int(text)
