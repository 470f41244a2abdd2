"""Discovery in a registry whose entries expire: sources, publishing and claims over any `LeaseStore`."""

from __future__ import annotations

from netloader.discovery.leases.backend import LeaseBackend

__all__ = ["LeaseBackend"]
