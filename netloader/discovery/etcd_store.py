"""``etcd://`` and ``etcds://``: what their URLs say. `etcd_client` speaks to etcd, and is imported on first use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec

import anyio.to_thread

from netloader.discovery.leases import LeaseBackend
from netloader.discovery.registry_urls import parse_registry_url
from netloader.discovery.store import LeaseStore
from netloader.errors import ConfigError

__all__ = ["PASSWORD", "EtcdRegistry", "open_etcd"]

if find_spec("aiohttp") is None:
    raise ModuleNotFoundError("No module named 'aiohttp'", name="aiohttp")

PASSWORD = "NETLOADER_ETCD_PASSWORD"  # noqa: S105 - the name of a variable

_PORT = 2379
_DEADLINE = 5.0
"""Seconds that a call may take, with connecting."""


def open_etcd(url: str) -> LeaseBackend:
    """The backend of a URL: see docs/registries.md.

    Raises:
        ConfigError: Something is wrong with the URL. No password is shown.
    """
    registry = EtcdRegistry(url)
    prefix = registry.url.path or "netloader"
    return LeaseBackend(registry, ttl=registry.url.ttl, prefix=prefix, name=registry.url.shown)


class EtcdRegistry:
    """Opens connections to an etcd. An `OpenStore`.

    Args:
        url: ``etcd://[user[:password]@]host[:port][,host[:port]...][/prefix]``, or ``etcds://`` for TLS.
        deadline: Seconds that a call may take.

    Attributes:
        url: What the URL says.

    Raises:
        ConfigError: Something is wrong with the URL. No password is shown.
    """

    def __init__(self, url: str, *, deadline: float = _DEADLINE) -> None:
        secure = url.partition("://")[0].lower() == "etcds"
        self.url = parse_registry_url(url, port=_PORT, password_variable=PASSWORD, secure=secure)
        if self.url.user and not self.url.password:
            raise ConfigError(
                field="password",
                value="",
                allowed=f"a password in the URL, or in {PASSWORD}",
                reason="it names a user without a password",
            )
        self._deadline = deadline

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[LeaseStore]:
        """Open a connection. The first call connects."""
        # Importing aiohttp takes long, and other tasks may run on this event loop.
        library = await anyio.to_thread.run_sync(import_module, "netloader.discovery.etcd_client")
        async with library.opened(self.url, self._deadline) as store:
            yield store
