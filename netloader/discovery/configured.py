"""The registries that a configuration names."""

from __future__ import annotations

from netloader.config import Config
from netloader.config.fields import Faults
from netloader.discovery.base import Backend
from netloader.discovery.combined import combined
from netloader.discovery.place import zone_of
from netloader.discovery.registry import open_backend
from netloader.errors import ConfigError

__all__ = ["registries_of"]


def registries_of(config: Config) -> Backend | None:
    """The registries of DISCOVERY as one, or None. Does no I/O; no error shows a password.

    Raises:
        ConfigError: DISCOVERY names a registry that this installation does not know or that does not accept the URL, no
            registry can give a lease and ORIGIN needs one, or the environment names a zone that is none.
    """
    faults, found = Faults(), list[Backend]()
    urls = config.discovery or ()
    for place, url in enumerate(urls):
        with faults:
            found.append(open_backend(url.reveal(), field="DISCOVERY" if len(urls) == 1 else f"DISCOVERY[{place}]"))
    with faults:
        zone_of(config.zone, field="ZONE")
    faults.raise_all()
    backend = combined(found) if found else None
    if config.origin == "lease" and (backend is None or backend.claims() is None):
        names = ", ".join(map(str, urls)) or "nothing"
        raise ConfigError(
            field="ORIGIN",
            value=config.origin,
            allowed="'any'; 'lease' with a DISCOVERY that gives leases",
            reason=f"DISCOVERY is {names}, which can't give a lease",
            hint="name a registry that can, such as redis:// or etcd://, or leave ORIGIN out",
        )
    return backend
