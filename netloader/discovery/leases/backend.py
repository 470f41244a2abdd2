"""A backend over any registry whose names expire."""

from __future__ import annotations

from netloader.discovery.base import Wanted
from netloader.discovery.leases.calls import Pace
from netloader.discovery.leases.claims import LeaseClaims
from netloader.discovery.leases.names import check_prefix
from netloader.discovery.leases.publisher import LeasePublisher
from netloader.discovery.leases.sources import LeaseSources
from netloader.discovery.store import OpenStore

__all__ = ["LeaseBackend"]


class LeaseBackend:
    """Finds, publishes and claims in one registry. A `Backend`.

    Args:
        open_store: Opens a connection to the registry.
        ttl: Seconds that a lease lasts without being renewed, from 1 to 30.
        prefix: The beginning of all names in the registry, so that several fleets can share it.
        name: Of the registry, for the log: a URL without its password.

    Raises:
        ConfigError: `ttl` or `prefix` is not allowed.
    """

    def __init__(
        self, open_store: OpenStore, *, ttl: float = 15.0, prefix: str = "netloader", name: str = "the registry"
    ) -> None:
        self._open = open_store
        self._pace = Pace(ttl)
        self._prefix = check_prefix(prefix)
        self._name = name

    def sources(self, wanted: Wanted) -> LeaseSources:
        """See :meth:`netloader.discovery.Backend.sources`."""
        return LeaseSources(self._open, self._prefix, wanted, self._pace, self._name)

    def publisher(self) -> LeasePublisher:
        """See :meth:`netloader.discovery.Backend.publisher`."""
        return LeasePublisher(self._open, self._prefix, self._pace, self._name)

    def claims(self) -> LeaseClaims:
        """See :meth:`netloader.discovery.Backend.claims`."""
        return LeaseClaims(self._open, self._prefix, self._pace, self._name)
