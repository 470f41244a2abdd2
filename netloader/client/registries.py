"""Where a pull looks for sources: at the given ones, and in registries under the key of its model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import anyio.to_thread

from netloader.config.arguments import Arguments
from netloader.core.addresses import Address
from netloader.core.choice import Here
from netloader.core.identity import Layout, ModelIdentity, Role, name_of
from netloader.core.model_key import key_of, rank_of
from netloader.discovery.base import Backend, SourceProvider, Wanted
from netloader.discovery.combined import MergedSources
from netloader.discovery.place import this_place
from netloader.discovery.preferred import given_and_found

__all__ = ["Search", "check_named", "wanted_for"]


@dataclass(frozen=True)
class Search:
    """Where a pull looks for sources.

    Attributes:
        given: The given sources.
        backend: The registries; None for none.
        zone: The zone in which this client runs; empty for none.
    """

    given: SourceProvider
    backend: Backend | None = None
    zone: str = ""

    async def provider(
        self, wanted: Sequence[Wanted], name: str = "", own: Callable[[], Collection[Address]] = tuple
    ) -> tuple[SourceProvider, Here]:
        """The provider of all sources, and where this client runs.

        Args:
            wanted: What is looked for in the registries.
            name: Name of the model.
            own: Addresses of this process, from which it must not pull.
        """
        if self.backend is None:
            return self.given, Here()
        here = await anyio.to_thread.run_sync(this_place, self.zone, name)
        found = [self.backend.sources(one) for one in dict.fromkeys(wanted)]
        return given_and_found(self.given, found[0] if len(found) == 1 else MergedSources(found), here, own), here


def wanted_for(identity: ModelIdentity | None, role: Role, layouts: Sequence[Layout]) -> tuple[list[Wanted], str]:
    """What to look for, and the name of the model.

    Args:
        identity: Identity of the model; None for one of which only role and layouts are known.
        role: Role to ask for without an identity.
        layouts: Layouts to accept without an identity.
    """
    if identity is not None:
        return [Wanted(key_of(identity), rank_of(identity), identity.role)], name_of(identity)
    keys = (key_of(ModelIdentity(role=role, layout=layout)) for layout in layouts)
    return [Wanted(key, role=role) for key in keys], ""


def check_named(check: Arguments, search: Search, identity: object, expect_root: object) -> None:
    """Check that a pull by registries says which weights it wants: others than these may be published there."""
    if search.backend is None or expect_root:
        return
    named = isinstance(identity, ModelIdentity) and bool(name_of(identity) or identity.fingerprint)
    if not named:
        allowed = "a netloader.ModelIdentity with a name or a fingerprint, because discovery finds servers of any model"
        check.kind("identity", None, ModelIdentity, f"{allowed}; or expect_root=...")
