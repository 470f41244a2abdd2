"""Checks arguments that several calls of the library take. Nothing is sent or opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from netloader.client.registries import Search
from netloader.config.arguments import Arguments
from netloader.core.identity import Layout, ModelIdentity, Role, check_sendable
from netloader.discovery.argument import check_discovery, check_zone
from netloader.discovery.base import SourceProvider
from netloader.discovery.fixed import FixedSources
from netloader.transports.base import Transport

__all__ = ["check_asked", "check_identity", "check_pull", "check_tensors", "check_transport"]


def check_tensors(check: Arguments, tensors: object, identity: object, *, none: bool = False) -> None:
    """Check `tensors` and `identity`. `none`: there may be no tensors."""
    if not (none and tensors is None):
        check.kind("tensors", tensors, Mapping, "a mapping of names to tensors", "pass model.state_dict()")
    check_identity(check, identity)


def check_identity(check: Arguments, identity: object) -> None:
    """Check `identity`: a peer would refuse texts that are too long or not valid Unicode."""
    check.kind("identity", identity, (ModelIdentity, type(None)), "a netloader.ModelIdentity, or None")
    if isinstance(identity, ModelIdentity):
        with check.reading():
            check_sendable(identity)


def check_transport(check: Arguments, transport: object) -> None:
    """Check `transport`; the registry checks the names."""
    if not isinstance(transport, Transport):
        check.kind("transport", transport, (str, Sequence), "auto, a name, a netloader.Transport, or a list of them")


def check_asked(check: Arguments, role: object, layouts: object) -> None:
    """Check `role` and `layouts`."""
    check.choice("role", role, get_args(Role))
    check.choices("layouts", layouts, get_args(Layout))


def check_pull(
    check: Arguments,
    sources: object,
    transport: object,
    timeout: object,
    wait: object,
    stall_timeout: object,
    token: object,
    expect_root: object,
    discovery: object,
    zone: object,
) -> Search:
    """Check the arguments that all pulls take, and return where they look for sources."""
    found: SourceProvider = FixedSources(())
    if sources is None:
        allowed = "a list of addresses (host:port), or a netloader.SourceProvider; or pass discovery=..."
        check.kind("sources", sources, (Iterable, *([] if discovery is None else [type(None)])), allowed)
    elif isinstance(sources, SourceProvider):
        found = sources
    elif not isinstance(sources, Iterable):
        check.kind("sources", sources, Iterable, "a list of addresses (host:port), or a netloader.SourceProvider")
    else:
        with check.reading():
            found = FixedSources(sources)
    check_transport(check, transport)
    check.seconds("timeout", timeout, positive=True, none=True)
    check.seconds("wait", wait)
    check.seconds("stall_timeout", stall_timeout, positive=True)
    check.token("token", token)
    check.root("expect_root", expect_root)
    backend = check_discovery(check, discovery)
    return Search(found, backend, check_zone(check, zone))
