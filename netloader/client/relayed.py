"""What a pull fills, as a holding that the server of a relay serves while the pull runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from netloader.client.session import PullDestination
from netloader.codecs.block_view import BlockView
from netloader.core.plan import Plan
from netloader.core.protocol.events import Announcement

__all__ = ["RelayedHolding", "RelayedMemory"]


@dataclass(frozen=True, slots=True)
class RelayedMemory:
    """The memory that a pull fills, as the memory of a holding."""

    destination: PullDestination
    call_bytes: int | None = None

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order."""
        return self.destination.views(plan, numbers)

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:  # noqa: ARG002 - part of the contract
        """None: the relay's server asks its Supply which blocks are there."""
        return {}


@dataclass(frozen=True, slots=True)
class RelayedHolding:
    """What a pull fills, as a holding for the relay's server."""

    announcement: Announcement
    memory: RelayedMemory
    device: str
