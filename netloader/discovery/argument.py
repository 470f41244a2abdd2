"""The argument ``discovery``: one registry or several, each as a URL or as an object."""

from __future__ import annotations

from collections.abc import Sequence

from netloader.config.arguments import Arguments
from netloader.discovery.base import Backend
from netloader.discovery.combined import combined
from netloader.discovery.place import zone_of
from netloader.discovery.registry import open_backend

__all__ = ["Discovery", "check_discovery", "check_zone"]

Discovery = str | Backend | Sequence[str | Backend] | None
"""Registries: a URL, a :class:`~netloader.discovery.Backend`, or several of them; None for no registry."""


def check_discovery(check: Arguments, discovery: object, *, field: str = "discovery") -> Backend | None:
    """Check the argument, and return the registries as one. Nothing is opened. No error shows a password."""
    if discovery is None:
        return None
    if isinstance(discovery, str | Backend) or not isinstance(discovery, Sequence):
        given = {field: discovery}
    else:
        given = {f"{field}[{place}]": one for place, one in enumerate(discovery)}
    if not given:
        check.kind(field, discovery, Backend, "a URL, a netloader.discovery.Backend, or a list of some of them")
        return None
    found: list[Backend] = []
    for name, one in given.items():
        if isinstance(one, str):
            with check.reading():
                found.append(open_backend(one, field=name))
        elif isinstance(one, Backend):
            found.append(one)
        else:
            check.kind(name, one, Backend, "a URL, or a netloader.discovery.Backend")
    return combined(found) if len(found) == len(given) else None


def check_zone(check: Arguments, zone: object) -> str:
    """Check the argument ``zone``, and return the zone of this process."""
    with check.reading():
        return zone_of(zone)
    return ""
